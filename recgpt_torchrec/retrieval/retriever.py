"""From interest vectors to one list of items per user: search, leave out the history, merge. Knows nothing of files."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from recgpt_torchrec.catalogue.catalogue import Catalogue
from recgpt_torchrec.data.ragged import Ragged
from recgpt_torchrec.retrieval.index import Float32, Index, Int64
from recgpt_torchrec.retrieval.interests import recall_items
from recgpt_torchrec.retrieval.merging import Lists, Merged

Bool = npt.NDArray[np.bool_]


class Search(Protocol):
    """Finds items for interest vectors."""

    def lists(self, vectors: Float32, k: int, seen: Ragged | None) -> Lists:
        """The `k` best items of every interest [users, interests, dim] float32 that are not `seen` by its user."""
        ...


@dataclass
class ExactSearch:
    """Scores every item."""

    catalogue: Catalogue

    def lists(self, vectors: Float32, k: int, seen: Ragged | None) -> Lists:
        """See `Search`."""
        return recall_items(torch.tensor(vectors), self.catalogue, k, seen)


@dataclass
class ApproximateSearch:
    """Asks an index, deeper and deeper until enough of what it finds was not seen."""

    index: Index

    def lists(self, vectors: Float32, k: int, seen: Ragged | None) -> Lists:
        """See `Search`."""
        users, interests, dim = vectors.shape
        queries = vectors.reshape(-1, dim)
        owner = np.repeat(np.arange(users), interests)
        items = np.full((len(queries), k), -1, dtype=np.int64)
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        known = None if seen is None else np.unique(seen.owners * self.index.items + seen.values)
        # Most histories are short: a few items more than k are enough; who needs more is searched again, deeper.
        depth = k if seen is None else k + _usual_length(seen)
        left = np.arange(len(queries))
        while left.size:
            depth = min(depth, self.index.items)
            found, values = self.index.search(queries[left], depth)
            wanted = found >= 0
            if known is not None:
                wanted &= ~_among(owner[left, None] * self.index.items + found, known)
            items[left], scores[left] = _first(found, values, wanted, k)
            enough = wanted.sum(axis=1) >= k
            done = enough | (found < 0).any(axis=1) | (depth == self.index.items)
            left, depth = left[~done], 2 * depth
        shape = (users, interests, k)
        return Lists(torch.from_numpy(items.reshape(shape)), torch.from_numpy(scores.reshape(shape)))


@dataclass
class Retriever:
    """Lists of `k` items, all different and none of the history: exactly k where there are that many.

    Example: `Retriever(ExactSearch(catalogue), k=50, merge=lambda lists: merge_by_score(lists, 50))`
    """

    search: Search
    k: int
    merge: Callable[[Lists], Merged]
    """Makes one list of `k` of those of several interests."""
    exact: Search | None = None
    """Asked for the users for whom an approximate search finds fewer than k."""

    def lists(self, vectors: Float32, seen: Ragged | None = None) -> Merged:
        """One list per user.

        Args:
            vectors: [users, interests, dim] float32.
            seen: items of each user that are left out, repeats allowed; None: nothing.
        """
        # A list of k for every interest is as deep as merging ever looks.
        merged = self.merge(self.search.lists(vectors, self.k, seen))
        (short,) = np.nonzero((merged.items < 0).any(dim=1).numpy())
        if short.size and self.exact is not None:
            of_short = None if seen is None else seen.take(short)
            better = self.merge(self.exact.lists(vectors[short], self.k, of_short))
            for values, others in zip(merged, better, strict=True):
                values[torch.from_numpy(short)] = others
        return merged


def _usual_length(seen: Ragged) -> int:
    """A length that nine in ten histories do not exceed."""
    return int(np.ceil(np.quantile(seen.lengths, 0.9))) if seen.rows else 0


def _among(values: Int64, ascending: Int64) -> Bool:
    """Whether each of `values`, of any shape, stands in `ascending` [n]."""
    if not ascending.size:
        return np.zeros(values.shape, dtype=bool)
    place = np.minimum(np.searchsorted(ascending, values), ascending.size - 1)
    return ascending[place] == values


def _first(items: Int64, scores: Float32, wanted: Bool, count: int) -> tuple[Int64, Float32]:
    """The first `count` wanted items of each row and their scores, in order, filled up with -1 and -inf."""
    order = np.argsort(~wanted, axis=1, kind="stable")[:, :count]
    chosen = np.full((len(items), count), -1, dtype=np.int64)
    values = np.full((len(items), count), -np.inf, dtype=np.float32)
    taken = np.take_along_axis(wanted, order, axis=1)
    chosen[:, : order.shape[1]] = np.where(taken, np.take_along_axis(items, order, axis=1), -1)
    values[:, : order.shape[1]] = np.where(taken, np.take_along_axis(scores, order, axis=1), -np.inf)
    return chosen, values
