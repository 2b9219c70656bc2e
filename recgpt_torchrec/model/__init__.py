"""User and item tables, decoder, RecGPT, losses. Knows nothing of files or processes."""
