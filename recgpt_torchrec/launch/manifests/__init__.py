"""Writes jobs for clusters: what all kinds share, a file for each kind, and the pod of those for Kubernetes."""
