"""Sharding plan, DMP, optimizers, the loop, checkpoints, run log. Knows nothing of what a batch means."""
