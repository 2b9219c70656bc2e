"""Popular items, for requests in whose history there is nothing that the model reads."""

import numpy as np

from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.ragged import Int64
from recgpt_torchrec.retrieval.fallback import find_popular

KEPT = 1000
"""Number of popular items that are kept, so that few requests read all counts."""


class Popular:
    """The items with the most interactions in the whole log; of equally many the smaller id comes first."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self._kept: tuple[Int64, Int64] | None = None

    def best(self, k: int, allowed: Int64 | None, left_out: Int64) -> tuple[Int64, Int64]:
        """The `k` most popular items and their numbers of interactions, [up to k] int64 each.

        Args:
            k: number of items.
            allowed: [any] int64 ids of the only items that count; None: all do.
            left_out: [any] int64 ids of items that do not count.

        Raises:
            InputError: a part of the dataset cannot be read.
        """
        if self._kept is None:
            self._kept = find_popular(self.dataset, KEPT, None, "count")
        items, counts = self._kept
        wanted = ~np.isin(items, left_out)
        if allowed is not None:
            wanted &= np.isin(items, allowed)
        total = self.dataset.manifest.items
        if wanted.sum() < k and items.size < total:
            mask = np.full(total, allowed is None)
            if allowed is not None:
                mask[allowed] = True
            mask[left_out] = False
            return find_popular(self.dataset, k, mask, "count")
        return items[wanted][:k], counts[wanted][:k]
