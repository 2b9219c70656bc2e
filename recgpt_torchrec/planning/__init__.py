"""Estimates of memory, traffic and time of a training run, from its options and sizes alone."""
