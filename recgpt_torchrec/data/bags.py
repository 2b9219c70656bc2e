"""Bags: the ids that embedding tables look up. The only place that builds jagged tensors for a lookup.

A bag is one entity, a user or an item: its id, and for each attribute of the model the ids of its values, each with
keys and a table of their own. Training, evaluation, prompts and export look entities up through this file.

One jagged tensor holds the bags of users and of items, so that one collection of tables exchanges them between ranks at
once. Its keys must have equal numbers of bags, the *stride*, and a batch has several times as many items as users. So
the items' bags are dealt to several keys, all of which are features of the item table: bag b is number b // keys of key
b % keys. In a row of the looked-up vectors, [stride, user and items], those of the items follow each other in order.
"""

import re
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from recgpt_torchrec.data.inputs.attributes import Attributes, EntityAttributes
from recgpt_torchrec.data.inputs.spec import Attribute
from recgpt_torchrec.data.packed import Capacity
from recgpt_torchrec.data.ragged import Int64

if TYPE_CHECKING:
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

USER = "user"
ITEM = "item"
OUTPUT = "output"
"""Name of the table, beside those of users and items, that scores outputs where there is one."""


def names_of_keys(number: int) -> list[str]:
    """The keys that item bags are dealt to: features of the item table, and of the output table."""
    return [f"{ITEM}_{index}" for index in range(number)]


def names_of_attribute(attribute: Attribute, item_keys: int) -> list[str]:
    """The keys of an attribute's values: one for users, as many as item bags are dealt to for items."""
    return [f"{attribute.table}_{index}" for index in range(1 if attribute.entity == USER else item_keys)]


@cache
def table_of(key: str) -> str:
    """The table whose vectors a key of looked-up vectors holds: `item_3`, or `item_3@output` if tables share keys."""
    return re.sub(r"^.*@|_\d+$", "", key)


def table_name(parameter: str) -> str:
    """The name of a table, from the name of its parameter or state: `user` of `tables.embedding_bags.user.weight`."""
    return parameter.split("embedding_bags.")[1].split(".")[0]


def tables_of(model: nn.Module) -> dict[str, Any]:
    """A model's tables by parameter name: each a `ShardedTensor`, or a tensor where every rank holds a copy."""
    return {name: value for name, value in model.state_dict().items() if "embedding_bags" in name}


def bags_of(
    users: Int64, items: Int64, capacity: Capacity, attributes: Attributes | None = None
) -> "KeyedJaggedTensor":
    """One bag per id of `users` [n] int64 and `items` [m] int64, in order, and empty bags up to the stride.

    Args:
        users, items: ids.
        capacity: number of bags.
        attributes: of the model that looks them up; None: it has none.
    """
    keys = capacity.item_keys
    if attributes is None:
        values = [users, *(items[key::keys] for key in range(keys))]
        counts = [ids.size for ids in values]
        lengths = (np.arange(capacity.stride) < np.array(counts)[:, None]).astype(np.int32)
        return _jagged([USER, *names_of_keys(keys)], values, counts, lengths, capacity.stride)
    of_users = _bags_of_entity(users, 1, capacity.stride, attributes.users)
    of_items = _bags_of_entity(items, keys, capacity.stride, attributes.items)
    names = [USER, *names_of_keys(keys)]
    for attribute in (*attributes.users.attributes, *attributes.items.attributes):
        names += names_of_attribute(attribute, keys)
    dealt = [of_users[0], of_items[0], *of_users[1:], *of_items[1:]]
    lengths = np.concatenate([of_keys for _, of_keys in dealt])
    return _jagged(names, [values for values, _ in dealt], lengths.sum(1).tolist(), lengths, capacity.stride)


def _bags_of_entity(
    ids: Int64, keys: int, stride: int, attributes: EntityAttributes
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The bags of users or of items: of their ids, and then of each attribute.

    Returns:
        Per kind of bag the values [entries], key by key, and how many are in each bag, [keys, stride] int32.
    """
    # Dealt here, once for all: what is looked up by dealt ids comes key by key.
    dealt = np.concatenate([ids[key::keys] for key in range(keys)]) if keys > 1 else ids
    counts = -(-(ids.size - np.arange(keys)) // keys)
    is_filled = np.arange(stride) < counts[:, None]
    bags = []
    for found in (attributes.own_ids(dealt), *(column.of(dealt) for column in attributes.columns)):
        lengths = np.zeros((keys, stride), np.int32)
        lengths[is_filled] = found.lengths
        bags.append((found.ids, lengths))
    return bags


def _jagged(
    keys: list[str], values: list[np.ndarray], counts: list[int], lengths: np.ndarray, stride: int
) -> "KeyedJaggedTensor":
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor  # here: names of tables are needed without torchrec

    # Given here, where they are known: torchrec would read them from the device, a wait for each exchange.
    known = {"length_per_key": counts, "offset_per_key": [0, *np.cumsum(counts).tolist()]}
    return KeyedJaggedTensor(
        keys=keys,
        values=torch.from_numpy(np.concatenate(values, dtype=np.int64)),
        lengths=torch.from_numpy(lengths.ravel()),
        stride=stride,
        **known,
    )
