"""Bags: the ids that embedding tables look up. The only place that builds jagged tensors for a lookup.

A bag is one entity, a user or an item, and for now holds its id alone. Training, evaluation, prompts and export look
entities up through this file.
"""

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recgpt_torchrec.data.ragged import Int64

USER = "user"
ITEM = "item"


def bags_of(key: str, ids: Int64, capacity: int | None = None) -> KeyedJaggedTensor:
    """One bag per id of `ids` [n] int64, in order, and empty bags up to `capacity` (None: n)."""
    lengths = torch.zeros(ids.size if capacity is None else capacity, dtype=torch.int32)
    lengths[: ids.size] = 1
    return KeyedJaggedTensor(keys=[key], values=torch.from_numpy(ids), lengths=lengths)
