"""Ids that are slots of a table of fixed size: how they are assigned, and which were given to another key."""
