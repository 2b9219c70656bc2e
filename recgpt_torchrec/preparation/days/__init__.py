"""Appends a day to a folder of days: keys to ids, histories from what the days before left, and the day's dataset."""
