"""Attributes of users and items: tables are read, values get ids, and each user or item the ids of its values."""
