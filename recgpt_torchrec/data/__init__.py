"""From a dataset to batches. Knows nothing of models; only bags and batches need torchrec."""
