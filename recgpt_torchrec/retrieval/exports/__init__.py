"""The export folder: vectors of items and users, whole or as the difference to an earlier export."""
