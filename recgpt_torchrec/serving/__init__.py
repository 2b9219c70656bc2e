"""Answers requests: the encoder as a program that runs without this package, and what goes with it in an export."""
