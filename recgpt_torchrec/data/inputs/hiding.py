"""Which tokens are not told what is asked for, in training: the same on any number of ranks, and after any resume."""

import numpy as np
import numpy.typing as npt

from recgpt_torchrec.data.histories import Histories
from recgpt_torchrec.data.ragged import ragged_arange
from recgpt_torchrec.data.reading.sample import hash_users

PLACES = 2**24
"""Users are numbered so far apart, that each entry of a history has a number of its own."""


def draw_hidden(histories: Histories, probability: float, seed: int, epoch: int) -> npt.NDArray[np.bool_]:
    """Draw the entries after which the event type asked for is hidden, [entries] bool.

    They depend on the seed, the epoch, the user and the place in the history alone.

    Args:
        histories: of a batch.
        probability: from 0 to 1.
        seed: of the run.
        epoch: from 0.
    """
    lengths = histories.lengths
    numbers = np.repeat(histories.users * PLACES, lengths) + ragged_arange(lengths)
    drawn = hash_users(numbers, int(hash_users(np.array([epoch]), seed)[0]))
    return (drawn >> np.uint64(11)).astype(np.float64) < probability * 2.0**53
