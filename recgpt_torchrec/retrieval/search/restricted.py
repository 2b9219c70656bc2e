"""Searches some of the items: they get ids from 0 on, in order, so that excluded items are neither held nor scored."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from recgpt_torchrec.data.ragged import Float32, Ragged
from recgpt_torchrec.retrieval.merging import Lists
from recgpt_torchrec.retrieval.search.retriever import Search
from recgpt_torchrec.retrieval.weighed import Weighed

Bool = npt.NDArray[np.bool_]
Ids = npt.NDArray[Any]


def compact_ids(allowed: Bool) -> Ids:
    """The ids of the allowed items [items] bool, rising, in 4 bytes each where they fit."""
    dtype = np.uint32 if len(allowed) <= 2**32 else np.int64
    step = 2**22  # np.flatnonzero of all would take 8 bytes per item meanwhile
    parts = [np.flatnonzero(allowed[first : first + step]) + first for first in range(0, len(allowed), step)]
    return np.concatenate([part.astype(dtype) for part in parts])


@dataclass
class RestrictedSearch:
    """A search over the allowed items alone, asked and answering in the ids of all items.

    Ids keep their order, so of equal scores the smaller id still comes first.

    Example: `RestrictedSearch(ExactSearch(catalogue), compact_ids(allowed))`
    """

    search: Search
    """Over items whose id is their place in `ids`."""
    ids: Ids
    """[allowed items] rising, at least one; every rank has all of them."""

    def lists(self, vectors: Float32, k: int, left_out: Ragged | None, weighed: Weighed | None = None) -> Lists:
        """See `Search`."""
        if left_out is not None:
            left_out, _ = self._place(left_out)
        if weighed is not None:
            weighed = weighed.renamed(*self._place(weighed.items))
        found = self.search.lists(vectors, k, left_out, weighed)
        places = found.items.numpy()
        ids = self.ids[np.maximum(places, 0)].astype(np.int64)
        return Lists(torch.from_numpy(np.where(places < 0, -1, ids)), found.scores)

    def _place(self, items: Ragged) -> tuple[Ragged, Bool]:
        """The places in `ids` of the items that are allowed, and [entries] which of them are."""
        values = items.values.astype(self.ids.dtype)
        places = np.searchsorted(self.ids, values)
        is_allowed = self.ids[np.minimum(places, len(self.ids) - 1)] == values
        return items.with_values(places).keep(is_allowed), is_allowed
