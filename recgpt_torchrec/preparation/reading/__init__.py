"""Reads raw interaction logs of every format into the engine."""
