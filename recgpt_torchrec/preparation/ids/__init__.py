"""Assigns the ids of users and items: from a vocabulary, by hash, or by managed collision with eviction."""
