"""Exact top-k, recall paths, ranking metrics, baselines, export."""
