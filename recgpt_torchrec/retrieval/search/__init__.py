"""Searching an export's item vectors: exact or approximate, with some items left out."""
