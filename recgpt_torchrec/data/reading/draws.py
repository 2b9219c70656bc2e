"""Random numbers that depend on the seed, the epoch and what they are for alone: not on ranks, order or resuming."""

import numpy as np
import numpy.typing as npt

from recgpt_torchrec.data.histories import Histories
from recgpt_torchrec.data.ragged import Int64, ragged_arange
from recgpt_torchrec.data.reading.hashing import hash_numbers

HIDING, THINNED, THINNING, CUTTING = range(4)
"""Purposes, whose numbers have nothing to do with each other."""
PLACES = 2**24
"""Users are numbered so far apart, that each entry of a history has a number of its own."""


def draw_for_users(users: Int64, purpose: int, seed: int, epoch: int) -> npt.NDArray[np.float64]:
    """[users] float64 from 0 to less than 1, one for each of `users` [users] int64.

    Args:
        users: ids, or other numbers.
        purpose: one of those above.
        seed: of the run.
        epoch: from 0.
    """
    key = int(hash_numbers(np.array([epoch]), seed)[0]) ^ purpose
    drawn: npt.NDArray[np.float64] = (hash_numbers(users, key) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return drawn


def draw_for_entries(histories: Histories, purpose: int, seed: int, epoch: int) -> npt.NDArray[np.float64]:
    """[entries] float64 from 0 to less than 1, by user and place in the history or its window; see above."""
    lengths = histories.lengths
    numbers = np.repeat(histories.users * PLACES, lengths) + ragged_arange(lengths)
    return draw_for_users(numbers, purpose, seed, epoch)
