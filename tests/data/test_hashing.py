"""Hashes against splitmix64 in plain Python."""

import numpy as np

from recgpt_torchrec.data.reading.hashing import hash_numbers

MASK = 2**64 - 1


def splitmix64(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def reference(number: int, key: int) -> int:
    return splitmix64((splitmix64(key) + number) & MASK)


def test_hashes_are_those_of_splitmix64_for_any_number_and_key():
    numbers = np.array([0, 1, -1, 2**31, 2**62, -(2**63)])
    for key in (0, 1, 2**31 - 1, 2**64 - 1):
        assert hash_numbers(numbers, key).tolist() == [reference(number, key) for number in numbers.tolist()]
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the first output of the published generator with seed 0


def test_a_key_for_each_row_broadcasts():
    keys = hash_numbers(np.arange(3), 5)
    made = hash_numbers(np.arange(4), keys[:, None])
    assert made.tolist() == [[reference(n, key) for n in range(4)] for key in keys.tolist()]


def test_no_hash_is_repeated():
    assert np.unique(hash_numbers(np.arange(100_000), 3)).size == 100_000
