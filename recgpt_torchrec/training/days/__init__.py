"""Trains on a folder of days, day after day."""
