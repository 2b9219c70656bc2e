"""From interest vectors to one list of items a user: search, leave out the history, merge. Knows nothing of files."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from recgpt_torchrec.data.split import take
from recgpt_torchrec.evaluation.metrics import Jagged
from recgpt_torchrec.retrieval.index import Float32, Index, Int64
from recgpt_torchrec.retrieval.merging import Lists, Merged

Bool = npt.NDArray[np.bool_]


@dataclass
class Retriever:
    """Lists of `k` items, all different and none of the history: exactly k where there are that many.

    Example: `Retriever(Index(exact(items), exact=True), k=50, merge=lambda lists: merge_by_score(lists, 50))`
    """

    index: Index
    k: int
    merge: Callable[[Lists], Merged]
    """Makes one list of `k` of those of several interests."""
    whole: Index | None = None
    """An exact index of the same items, asked for the users for whom an approximate one finds fewer than k."""

    def lists(self, vectors: Float32, seen: Jagged | None = None) -> Merged:
        """One list a user.

        Args:
            vectors: [users, interests, dim] float32.
            seen: (items, offsets [users + 1]) that are left out, repeats allowed; None: nothing.
        """
        merged = self.merge(self._found(self.index, vectors, seen))
        (short,) = np.nonzero((merged.items < 0).any(dim=1).numpy())
        if short.size and self.whole is not None:
            better = self.merge(self._found(self.whole, vectors[short], None if seen is None else rows_of(seen, short)))
            for values, others in zip(merged, better, strict=True):
                values[torch.from_numpy(short)] = others
        return merged

    def _found(self, index: Index, vectors: Float32, seen: Jagged | None) -> Lists:
        """The k best items of every interest that are not seen: a list that long is as deep as merging ever looks."""
        users, interests, dim = vectors.shape
        queries = vectors.reshape(-1, dim)
        owner = np.repeat(np.arange(users), interests)
        items = np.full((len(queries), self.k), -1, dtype=np.int64)
        scores = np.full((len(queries), self.k), -np.inf, dtype=np.float32)
        known = None if seen is None else pairs_of(seen, index.items)
        # Most histories are short: a few items more than k are enough; who needs more is searched again, deeper.
        depth = self.k if seen is None else self.k + _usual_length(seen)
        left = np.arange(len(queries))
        while left.size:
            depth = min(depth, index.items)
            found, values = index.search(queries[left], depth)
            wanted = found >= 0
            if known is not None:
                wanted &= ~_among(owner[left, None] * index.items + found, known)
            items[left], scores[left] = _first(found, values, wanted, self.k)
            enough = wanted.sum(axis=1) >= self.k
            done = enough | (found < 0).any(axis=1) | (depth == index.items)
            left, depth = left[~done], 2 * depth
        shape = (users, interests, self.k)
        return Lists(torch.from_numpy(items.reshape(shape)), torch.from_numpy(scores.reshape(shape)))


def pairs_of(seen: Jagged, items: int) -> Int64:
    """[pairs] int64, ascending: user * items + item, for every item of every history."""
    values, offsets = (np.asarray(part) for part in seen)
    return np.unique(np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)) * items + values)


def rows_of(lists: Jagged, rows: Int64) -> Jagged:
    """The lists `rows` of a jagged list of lists, as numpy arrays."""
    values, offsets = (np.asarray(part) for part in lists)
    return take(values, offsets[rows], offsets[rows + 1])


def _usual_length(seen: Jagged) -> int:
    """A length that nine in ten histories do not exceed."""
    lengths = np.diff(np.asarray(seen[1]))
    return int(np.ceil(np.quantile(lengths, 0.9))) if len(lengths) else 0


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
