"""RecGPT (arXiv 2404.08675) on TorchRec: generative sequential retrieval, from an interaction log to lists of items.

Importing the package does not import torch, because torchx imports it to list components.
"""

__version__ = "0.1.0"
