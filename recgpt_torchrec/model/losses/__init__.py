"""Losses of next-item prediction, and the kernels that compute them."""
