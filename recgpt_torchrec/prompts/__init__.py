"""Decoding with a cache, Algorithm 1 of the paper, and the dataset with prompts."""
