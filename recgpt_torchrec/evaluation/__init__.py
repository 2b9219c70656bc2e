"""Metrics, baselines, recall paths and validation."""
