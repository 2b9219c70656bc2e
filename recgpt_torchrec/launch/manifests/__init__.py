"""Writes jobs for Kubernetes: the pod that all kinds share, and a file for each kind."""
