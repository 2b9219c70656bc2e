"""Answers of the model and of neighbours together: what others' histories say of an item is added to the model's score.

    score(history, j) = logit(history, j) + weight * c(history, j) / max over j of c(history, j)

where c is the co-occurrence of `data.neighbours.answering`. The items of the user's own training part are no answers:
both the model and the neighbours have learnt them by heart. Those that are held out are not looked at.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from recgpt_torchrec.config import AnswerNeighbours
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.neighbours.answering import ENTRIES, NeighbourAnswers, raises_of
from recgpt_torchrec.data.neighbours.folder import open_neighbours
from recgpt_torchrec.data.neighbours.table import NeighbourTable
from recgpt_torchrec.data.ragged import Float32, Int64, Ragged, offsets_of
from recgpt_torchrec.data.split import HoldOut, Starts
from recgpt_torchrec.distributed.shared_folder import read_on_node
from recgpt_torchrec.prompts.intervals import Intervals

CANDIDATES = 50
"""Neighbours that are raised after an item, the best ones; the others are too many places behind to become answers."""


@dataclass(frozen=True, kw_only=True)
class NeighbourBoost:
    """Raises the scores of neighbours in answers."""

    neighbours: NeighbourAnswers
    """Finds them, `CANDIDATES` after each item."""
    weight: float
    """What the best neighbour's score is raised by."""
    hold_out: HoldOut
    """What the dataset holds out."""

    def count_training(self, histories: Intervals) -> Int64:
        """[users] int64: number of items in the training part of each history."""
        return Starts.of(histories.lengths, self.hold_out, histories.starts).validation

    def of_batch(self, histories: Intervals, rows: Int64, training: Int64, places: Int64) -> "BatchBoost":
        """What is raised after some items.

        Args:
            histories: of some users.
            rows: [batch] int64 users of the batch.
            training: [batch] int64: number of items in their training parts.
            places: [batch, intervals] int64 indices of the items, in `histories.items`.
        """
        starts = histories.offsets[rows]
        items = Ragged(histories.items, histories.offsets)
        lists = items.take(rows)
        own = items.cut(starts, starts + np.minimum(training, histories.lengths[rows]))
        left_out = self.neighbours.find_own(own.owners, own.values)
        entries = (places - starts[:, None] + lists.offsets[:-1, None]).ravel()
        owners = np.repeat(np.arange(rows.size), places.shape[1])
        found = [
            self.neighbours.best(lists, entries[first : first + ENTRIES], owners[first : first + ENTRIES], left_out)
            for first in range(0, entries.size, ENTRIES)
        ]
        ids, scores = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        shape = (*places.shape, -1)
        return BatchBoost(ids.reshape(shape), raises_of(scores, self.weight).reshape(shape), own)


@dataclass(frozen=True)
class BatchBoost:
    """What is raised, and what is left out, in one batch of users."""

    ids: Int64
    """[users, intervals, candidates] int64 items whose scores are raised; -1: none."""
    values: Float32
    """[users, intervals, candidates] float32, by how much."""
    own: Ragged
    """[users] the items of each user's training part, which are no answers."""

    def after(self, users: int, at: Int64) -> tuple[Ragged, Float32]:
        """The items that are raised after the item number `at` [users] of the first `users`, and by how much each."""
        row = np.arange(users)
        ids, values = self.ids[row, at], self.values[row, at]
        there = ids >= 0
        return Ragged(ids[there], offsets_of(there.sum(1))), values[there]


def describe_boost(neighbours: AnswerNeighbours, dataset: Dataset) -> dict[str, Any]:
    """How neighbours take part in answers, as JSON values.

    Raises:
        InputError: the folder is damaged, or of another dataset.
    """
    assert neighbours.path is not None
    fingerprint = open_neighbours(neighbours.path, dataset).fingerprint
    return {**asdict(neighbours), "path": None, "fingerprint": fingerprint}


def open_boost(neighbours: AnswerNeighbours, dataset: Dataset) -> NeighbourBoost | None:
    """What raises neighbours in answers (collective); None: nothing.

    Raises:
        InputError: the folder is damaged, or of another dataset.
    """
    if neighbours.path is None:
        return None
    table = NeighbourTable.of_dataset(neighbours.path, dataset, read_on_node)
    found = NeighbourAnswers(table=table, memory=neighbours.memory, recency=neighbours.recency, answers=CANDIDATES)
    return NeighbourBoost(neighbours=found, weight=neighbours.weight, hold_out=dataset.manifest.hold_out)
