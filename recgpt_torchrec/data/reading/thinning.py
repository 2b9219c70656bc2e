"""Thinned histories: in training, some entries are left out at random, as if the user had not chosen them.

Each epoch then reads other histories of the same user, and items that stand further apart become neighbours: the model
learns less by heart. The same on any number of ranks, and after any resume.
"""

import numpy as np

from recgpt_torchrec.data.histories import Histories
from recgpt_torchrec.data.reading.draws import THINNED, THINNING, draw_for_entries, draw_for_users
from recgpt_torchrec.data.segments import INTERACTED

FEWEST = 2
"""Interacted entries that a history keeps at least: one to predict from, and its target. Shorter ones stay whole."""


def thin(histories: Histories, probability: float, share: float, seed: int, epoch: int) -> Histories:
    """Leave out entries of a share of the histories; prompts go with the interacted entry that they follow.

    What is left out depends on the seed, the epoch, the user and the place in the history, or in the window of it that
    is trained, alone.

    Args:
        histories: of a batch or a window.
        probability: that an entry of a thinned history is left out, from 0 to less than 1.
        share: of the histories that are thinned, from 0 to 1.
        seed: of the run.
        epoch: from 0.
    """
    if not probability or not share or not histories.items.size:
        return histories
    lengths, owner = histories.lengths, np.repeat(np.arange(histories.users.size), histories.lengths)
    interacted = np.ones(owner.size, dtype=bool) if histories.segments is None else histories.segments == INTERACTED
    thinned = draw_for_users(histories.users, THINNED, seed, epoch) < share
    kept = draw_for_entries(histories, THINNING, seed, epoch) >= probability
    kept |= ~thinned[owner] | ~interacted
    counts = np.bincount(owner[kept & interacted], minlength=lengths.size)
    kept |= (counts < FEWEST)[owner]
    # Prompts before the first interacted entry follow none, and stay.
    newest = np.maximum.accumulate(np.where(interacted, np.arange(owner.size), -1))
    follows = np.where(newest >= histories.offsets[:-1][owner], newest, np.arange(owner.size))
    return histories.keep(kept[follows])
