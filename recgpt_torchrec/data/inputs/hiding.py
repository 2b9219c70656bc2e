"""Which tokens are not told what is asked for, in training: the same on any number of ranks, and after any resume."""

import numpy as np
import numpy.typing as npt

from recgpt_torchrec.data.histories import Histories
from recgpt_torchrec.data.reading.draws import HIDING, draw_for_entries


def draw_hidden(histories: Histories, probability: float, seed: int, epoch: int) -> npt.NDArray[np.bool_]:
    """Draw the entries after which the event type asked for is hidden, [entries] bool.

    They depend on the seed, the epoch, the user and the place in the history alone.

    Args:
        histories: of a batch.
        probability: from 0 to 1.
        seed: of the run.
        epoch: from 0.
    """
    return draw_for_entries(histories, HIDING, seed, epoch) < probability
