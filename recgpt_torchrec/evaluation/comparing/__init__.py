"""Comparisons between recall paths and between evaluations, user by user; knows nothing of models."""
