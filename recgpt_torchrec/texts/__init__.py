"""How programs write: commands that go on, tables, counted nouns. Knows nothing of what is written."""
