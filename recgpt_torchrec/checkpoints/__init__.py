"""Checkpoints of a run: folders and commit, contents, saving, restoring, and tables that grow."""
