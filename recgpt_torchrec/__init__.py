"""RecGPT (arXiv 2404.08675) on TorchRec: generative sequential retrieval, from interaction log to ANN-ready vectors.

Importing the package imports no torch: torchx imports it to list components, and `data` works without torchrec.
"""

__version__ = "0.1.0"
