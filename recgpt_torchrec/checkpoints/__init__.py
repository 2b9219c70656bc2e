"""Checkpoints of a run: their folder and commit, what is in them, saving, restoring and growing."""
