"""Soft targets from neighbours: for each entry of a history, the best neighbours of its newest items.

What the user's own history holds is left out: it was counted when the neighbours were found, so it would tell the model
what comes next. What is left is what the histories of others say.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from recgpt_torchrec.data.histories import Histories
from recgpt_torchrec.data.neighbours.table import NONE, NeighbourTable
from recgpt_torchrec.data.ragged import Float32, Int64, Ragged
from recgpt_torchrec.data.segments import Interacted

ENTRIES = 512
"""Entries whose neighbours are summed at once: few enough that a core's cache holds them, which is 40% faster than
4,096."""
HIGHEST = np.iinfo(np.int32).max


def raises_of(scores: Float32, weight: float) -> Float32:
    """[rows, neighbours] float32: what a model's scores are raised by, `weight` for the best neighbour of each row, and
    for the others in proportion to their `scores` [rows, neighbours] float32, best first."""
    raised = weight * scores / np.maximum(scores[:, :1], np.finfo(np.float32).tiny)
    return raised.astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class NeighbourAnswers:
    """Finds the neighbours that share a target's weight, or that answers of a model are raised by.

    score(history, j) = sum over the newest `memory` items i of the history of recency^age(i) score(i -> j)
    """

    table: NeighbourTable
    share: float = 0.0
    """Share of a target's weight that is spread over them, by their scores."""
    memory: int
    """Number of items of a history, from the newest, whose neighbours are summed."""
    recency: float
    """Weight of an item's neighbours, as a share of those of the item after it."""
    answers: int
    """Number of neighbours that are kept, the best ones."""

    def attach(self, histories: Histories, whole: Histories) -> Histories:
        """Histories with their `neighbours` and `neighbour_scores`.

        Args:
            histories: after each of whose interacted entries the neighbours are wanted.
            whole: the same histories before any entries were left out; no item that a user has there is an answer,
                also where it is in another piece of the user's history.
        """
        entries, answers = histories.items.size, self.answers
        ids, scores = np.full((entries, answers), -1, np.int64), np.zeros((entries, answers), np.float32)
        interacted = Interacted.among(histories.offsets, histories.segments)
        lists = Ragged(histories.items[interacted.places], interacted.offsets)
        users, numbers = np.unique(whole.users, return_inverse=True)
        own = self.find_own(np.repeat(numbers, whole.lengths), whole.items)
        owners = np.searchsorted(users, histories.users)[lists.owners]
        for first in range(0, lists.values.size, ENTRIES):
            part = np.arange(first, min(first + ENTRIES, lists.values.size))
            places = interacted.places[part]
            ids[places], scores[places] = self.best(lists, part, owners[part], own)
        return replace(histories, neighbours=ids, neighbour_scores=scores)

    def find_own(self, owners: Int64, items: Int64) -> Int64:
        """What users have, ascending without repeats: number of the user times the number of items, plus the item."""
        known = items < self.table.items
        return np.unique(owners[known] * self.table.items + items[known])

    def best(self, lists: Ragged, entries: Int64, owners: Int64, own: Int64) -> tuple[Int64, Float32]:
        """The best neighbours after some entries of lists, less what their owners have.

        Args:
            lists: items of histories.
            entries: [entries] int64 indices of their values.
            owners: [entries] int64 number of the user of each.
            own: what the users have, see `find_own`.

        Returns:
            ids: [entries, answers] int64, best first, of equal scores the smaller id first; `NONE` if there are no
                more.
            scores: [entries, answers] float32.
        """
        return self._sum_best(*self._look_up(lists, entries), owners, own)

    def _look_up(self, lists: Ragged, entries: Int64) -> tuple[npt.NDArray[np.int32], Float32]:
        """The neighbours of the newest items up to some entries of `lists`, and their weights there, both
        [entries, memory * count]; `NONE` and 0 where there are no more."""
        sources = entries[:, None] - np.arange(self.memory)
        there = sources >= lists.offsets[lists.rows_of(entries)][:, None]
        rows = lists.values.take(np.maximum(sources, 0))
        there &= rows < self.table.items  # others are newer than the table
        rows[~there] = 0
        recency = np.float32(self.recency) ** np.arange(self.memory, dtype=np.float32)
        found = np.where(there[..., None], self.table.ids.take(rows, axis=0), np.int32(NONE))
        weights = self.table.scores.take(rows, axis=0)
        weights *= recency[:, None]
        return found.reshape(entries.size, -1), weights.reshape(entries.size, -1)

    def _sum_best(
        self, found: npt.NDArray[np.int32], weights: Float32, owners: Int64, own: Int64
    ) -> tuple[Int64, Float32]:
        """The best of `found` [entries, n] by the sums of their `weights`, see `best`.

        An id and its place in one number are sorted at once, and so are a score and its place: vectorised, four times
        as fast as argsort, and twice as fast as argpartition, which chooses at random among equal scores.
        """
        entries, size = found.shape
        bits = max(1, (size - 1).bit_length())
        mask, starts = (1 << bits) - 1, np.arange(0, found.size, size)[:, None]
        keys = (found.astype(np.int64) << bits) | np.arange(size)
        keys.sort(axis=1)
        ids = keys >> bits
        ordered = weights.ravel().take((keys & mask) + starts)
        begins = np.ones(ids.shape, bool)
        np.not_equal(ids[:, 1:], ids[:, :-1], out=begins[:, 1:])
        places = np.flatnonzero(begins)
        candidates, sums = ids.ravel().take(places), np.add.reduceat(ordered.ravel(), places)
        sums[candidates == NONE] = 0
        if own.size:
            numbers = np.repeat(owners * self.table.items, np.count_nonzero(begins, axis=1)) + candidates
            sums[own.take(np.searchsorted(own, numbers), mode="clip") == numbers] = 0
        scores = np.zeros(found.shape, np.float32)
        scores.ravel()[places] = sums
        # A score of at least 0 has the order of its bits as a whole number.
        ranked = (np.int64(HIGHEST) - scores.view(np.int32) << bits) | np.arange(size)
        ranked.sort(axis=1)
        best = (ranked[:, : self.answers] & mask) + starts
        answer_ids = np.full((entries, self.answers), NONE, np.int64)
        answer_scores = np.zeros((entries, self.answers), np.float32)
        chosen = scores.ravel().take(best)
        answer_ids[:, : best.shape[1]] = np.where(chosen > 0, ids.ravel().take(best), NONE)
        answer_scores[:, : best.shape[1]] = chosen
        return answer_ids, answer_scores
