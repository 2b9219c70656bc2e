"""Lists from two sources: the model, and the neighbours of a history's items, which others took after them.

    score(history, j) = h . v_j + weight * c(history, j) / max over j of c(history, j)

where c is the co-occurrence of `data.neighbours.answering`, counted in training parts alone, of the best `CANDIDATES`
neighbours. The items of the history are none: they have been left out, or have a bias of their own. Where a filter
allows some items alone, the maximum is over all neighbours nevertheless.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from recgpt_torchrec.config import RecallNeighbours
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.neighbours.answering import ENTRIES, NeighbourAnswers, raises_of
from recgpt_torchrec.data.neighbours.folder import open_neighbours
from recgpt_torchrec.data.neighbours.table import NONE, NeighbourTable, Read
from recgpt_torchrec.data.ragged import Ragged, offsets_of
from recgpt_torchrec.distributed.shared_folder import read_on_node
from recgpt_torchrec.retrieval.weighed import Weighed

CANDIDATES = 200
"""Neighbours of a history that are raised, the best ones."""


@dataclass(frozen=True, kw_only=True)
class NeighbourRecall:
    """Finds what the neighbours of histories raise. Example: `NeighbourRecall.open(options, dataset).of(seen)`"""

    neighbours: NeighbourAnswers
    weight: float
    """What the best neighbour's score is raised by."""
    fingerprint: str
    """Of the folder of neighbours."""

    @classmethod
    def open(cls, options: RecallNeighbours, dataset: Dataset, read: Read = read_on_node) -> Self | None:
        """Read the neighbours of a dataset's items; None: the options name none.

        Args:
            options: which neighbours, and how they count.
            dataset: whose items they are of.
            read: makes the buffer that holds them; by default once per node (collective).

        Raises:
            InputError: the folder is damaged, or of another dataset.
        """
        if options.path is None:
            return None
        manifest = open_neighbours(options.path, dataset)
        table = NeighbourTable.open(options.path, manifest, read)
        found = NeighbourAnswers(table=table, memory=options.memory, recency=options.recency, answers=CANDIDATES)
        return cls(neighbours=found, weight=options.weight, fingerprint=manifest.fingerprint)

    def describe(self) -> dict[str, Any]:
        """Which neighbours take part, and how, as JSON values."""
        found = self.neighbours
        how = {"weight": self.weight, "memory": found.memory, "recency": found.recency}
        return {**how, "fingerprint": self.fingerprint}

    def of(self, seen: Ragged) -> Weighed:
        """What is raised after histories, `seen` [users] whole lists of items, oldest first."""
        (rows,) = np.nonzero(seen.lengths)
        entries, own = seen.offsets[rows + 1] - 1, self.neighbours.find_own(seen.owners, seen.values)
        parts = [slice(first, first + ENTRIES) for first in range(0, rows.size, ENTRIES)]
        found = [self.neighbours.best(seen, entries[part], rows[part], own) for part in parts]
        if not found:
            return Weighed(Ragged(np.zeros(0, np.int64), np.zeros(seen.rows + 1, np.int64)), np.zeros(0, np.float32))
        ids, scores = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        is_neighbour = ids != NONE
        counts = np.zeros(seen.rows, np.int64)
        counts[rows] = is_neighbour.sum(1)
        return Weighed(Ragged(ids[is_neighbour], offsets_of(counts)), raises_of(scores, self.weight)[is_neighbour])
