"""Bags: the ids that embedding tables look up. The only place that builds jagged tensors for a lookup.

A bag is one entity, a user or an item, and for now holds its id alone. Training, evaluation, prompts and export look
entities up through this file.

One jagged tensor holds the bags of users and of items, so that one collection of tables exchanges them between ranks at
once. Its keys must have equal numbers of bags, the *stride*, and a batch has several times as many items as users. So
the items' bags are dealt to several keys, all of which are features of the item table: bag b is number b // keys of key
b % keys. In a row of the looked-up vectors, [stride, user and items], those of the items follow each other in order.
"""

import re
from functools import cache

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recgpt_torchrec.data.packed import Capacity
from recgpt_torchrec.data.ragged import Int64

USER = "user"
ITEM = "item"
OUTPUT = "output"
"""Name of the table, beside those of users and items, that scores outputs where there is one."""


def names_of_keys(number: int) -> list[str]:
    """The keys that item bags are dealt to: features of the item table, and of the output table."""
    return [f"{ITEM}_{index}" for index in range(number)]


@cache
def table_of(key: str) -> str:
    """The table whose vectors a key of looked-up vectors holds: `item_3`, or `item_3@output` if tables share keys."""
    return re.sub(r"^.*@|_\d+$", "", key)


def bags_of(users: Int64, items: Int64, capacity: Capacity) -> KeyedJaggedTensor:
    """One bag per id of `users` [n] int64 and `items` [m] int64, in order, and empty bags up to the stride."""
    keys = capacity.item_keys
    values = [users, *(items[key::keys] for key in range(keys))]
    counts = [ids.size for ids in values]
    lengths = (np.arange(capacity.stride) < np.array(counts)[:, None]).astype(np.int32)
    # Given here, where they are known: torchrec would read them from the device, a wait for each exchange.
    known = {"length_per_key": counts, "offset_per_key": [0, *np.cumsum(counts).tolist()]}
    return KeyedJaggedTensor(
        keys=[USER, *names_of_keys(keys)],
        values=torch.from_numpy(np.concatenate(values)),
        lengths=torch.from_numpy(lengths.ravel()),
        stride=capacity.stride,
        **known,
    )
