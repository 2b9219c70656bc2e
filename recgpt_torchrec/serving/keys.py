"""Raw keys and dense ids of a dataset, both ways, held in memory beside the vectors that they name.

A key takes its own bytes and some 24 more; the vector of an item takes 4 x dim, 256 at dimension 64.
"""

import hashlib
import math
import numbers
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.ids.records import Entity
from recgpt_torchrec.data.ids.slots import read_slots
from recgpt_torchrec.data.ragged import Int64
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.retrieval.exports.keys import Keys

Key = str | int
"""A raw key; a whole number stands for its digits, as in a log."""
UNKNOWN = -1
"""In place of the id of a key that the dataset does not know."""
BLOCK = 2**20
"""Number of keys that are read at once."""
WHOLE = re.compile(r"(-?[0-9]+)\.0+")
INEXACT = 1e16
"""From here on a float is no exact whole number, and is spelled as programs write it."""


class KeyTable:
    """The keys of all items, or of all users, of a dataset.

    Where ids are hashes of keys, a key that the log did not have has the id of its hash's slot, if that is used.

    Example: `KeyTable(dataset, "item").ids_of(["shoe", "hat"])`
    """

    def __init__(self, dataset: Dataset, entity: Entity) -> None:
        """Read all keys.

        Raises:
            InputError: a part of the dataset cannot be read, or lacks a key.
        """
        keys, count = Keys(dataset, f"{entity}s"), getattr(dataset.manifest, f"{entity}s")
        blocks = [keys.of(np.arange(first, min(first + BLOCK, count))) for first in range(0, count, BLOCK)]
        self.keys = pa.chunked_array([block.cast(pa.large_string()) for block in blocks], pa.large_string())
        """[ids] large_string, by id."""
        self.keys = self.keys.combine_chunks()
        table = dataset.manifest.id_table(entity)
        self._hashed = table if table is not None and table.ids == "hash" else None
        if self._hashed is not None:
            buckets = [values for (values,) in read_slots(dataset, entity, ["bucket"])]
            hashes = np.concatenate(buckets or [np.zeros(0, np.int64)])
        else:
            parts = [np.fromiter(map(hash, block.to_pylist()), np.int64, len(block)) for block in blocks]
            hashes = np.concatenate(parts or [np.zeros(0, np.int64)])
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]

    def __len__(self) -> int:
        return len(self._hashes)

    def ids_of(self, keys: Sequence[Key]) -> Int64:
        """[n] int64 ids of `keys` [n]; -1 (`UNKNOWN`) of one that the dataset does not know.

        Raises:
            InputError: one is neither text nor a whole number.
        """
        spelled = [spell_key(key) for key in keys]
        ids = np.full(len(spelled), UNKNOWN, np.int64)
        if self._hashed is not None:
            wanted = np.array([find_bucket(key, self._hashed.seed, self._hashed.rows) for key in spelled], np.int64)
        else:
            wanted = np.fromiter(map(hash, spelled), np.int64, len(spelled))
        places = np.searchsorted(self._hashes, wanted)
        for number, (place, key, value) in enumerate(zip(places.tolist(), spelled, wanted.tolist(), strict=True)):
            while place < len(self._hashes) and self._hashes[place] == value:
                found = int(self._order[place])
                if self._hashed is not None or self.keys[found].as_py() == key:
                    ids[number] = found
                    break
                place += 1
        return ids

    def keys_of(self, ids: Int64) -> list[str]:
        """The keys of `ids` [n] int64."""
        keys: list[str] = self.keys.take(pa.array(ids)).to_pylist()
        return keys


def find_bucket(key: str, seed: int, rows: int) -> int:
    """The bucket of a key where ids are hashes (`preparation.ids.assigning.assign_hashed`)."""
    digits = hashlib.md5(f"{seed}:{key}".encode(), usedforsecurity=False).hexdigest()[:16]
    return min(int(digits, 16) >> 1, 2**63 - 2) % rows


def spell_key(key: Any) -> str:
    """A key as `prepare` spells it: 12, 12.0 and "12.0" are the key "12".

    Raises:
        InputError: it is neither text nor a number.

    Example:
        >>> spell_key(12), spell_key("12.0"), spell_key("shoe")
        ('12', '12', 'shoe')
    """
    if isinstance(key, str):
        whole = WHOLE.fullmatch(key)
        return key if whole is None else whole[1]
    if isinstance(key, numbers.Integral) and not isinstance(key, bool):
        return str(int(key))
    if isinstance(key, numbers.Real) and not isinstance(key, bool) and math.isfinite(key):
        number = float(key)
        return str(int(number)) if number.is_integer() and abs(number) < INEXACT else str(number)
    raise InputError(f"the key {key!r} is a {type(key).__name__}; give keys as in the log, text or whole numbers")
