"""Hashes of numbers: random bits that depend on a key and the number alone, in every process and whatever the order."""

import numpy as np
import numpy.typing as npt

from recgpt_torchrec.data.ragged import Int64

Hashes = npt.NDArray[np.uint64]


def hash_numbers(numbers: Int64, key: int | Hashes) -> Hashes:
    """uint64 hashes of `numbers`: for each key a permutation of all 64-bit numbers, so that none is repeated.

    The mixing is that of splitmix64 (Steele, Lea and Flood 2014).

    Args:
        numbers: [...] int64.
        key: one number, or an array that broadcasts with `numbers`, such as hashes of something else.
    """
    keys = key if isinstance(key, np.ndarray) else np.array([key], dtype=np.uint64)
    with np.errstate(over="ignore"):
        return _mix(_mix(keys) + numbers.astype(np.uint64))


def _mix(values: Hashes) -> Hashes:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
