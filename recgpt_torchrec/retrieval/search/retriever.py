"""From interest vectors to one list per user: search, leave out or weigh the history, merge; without files."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch

from recgpt_torchrec.catalogue.catalogue import Catalogue
from recgpt_torchrec.data.ragged import Float32, Int64, Ragged
from recgpt_torchrec.retrieval.interests import recall_items
from recgpt_torchrec.retrieval.merging import Lists, Merged
from recgpt_torchrec.retrieval.weighed import Weighed

if TYPE_CHECKING:  # exact lists need no FAISS
    from recgpt_torchrec.retrieval.search.sharded_index import ShardedIndex

Bool = npt.NDArray[np.bool_]


class Search(Protocol):
    """Finds items for interest vectors."""

    def lists(self, vectors: Float32, k: int, left_out: Ragged | None, weighed: Weighed | None = None) -> Lists:
        """The `k` best items of every interest [users, interests, dim] float32, without what is `left_out` for its
        user; the `weighed` items compete with another score."""
        ...


@dataclass
class ExactSearch:
    """Scores every item, each rank those of its id range (collective)."""

    catalogue: Catalogue

    def lists(self, vectors: Float32, k: int, left_out: Ragged | None, weighed: Weighed | None = None) -> Lists:
        """See `Search`."""
        queries = torch.tensor(vectors, device=self.catalogue.device)
        return Lists(*(values.cpu() for values in recall_items(queries, self.catalogue, k, left_out, weighed)))


@dataclass
class ApproximateSearch:
    """Searches an index, and doubles the depth until `k` items that were not seen are found."""

    index: "ShardedIndex"

    def lists(self, vectors: Float32, k: int, left_out: Ragged | None, weighed: Weighed | None = None) -> Lists:
        """See `Search`. What is weighed has one value of at most 0: an item that the index does not find stays behind.
        With more it could belong to the best, and not be found."""
        bias = None if weighed is None else weighed.values
        assert bias is None or (left_out is None and not isinstance(bias, np.ndarray) and bias <= 0)
        seen = left_out if weighed is None else weighed.items
        users, interests, dim = vectors.shape
        queries = vectors.reshape(-1, dim)
        owner = np.repeat(np.arange(users), interests)
        items = np.full((len(queries), k), -1, dtype=np.int64)
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        seen_pairs = None if seen is None else np.unique(seen.owners * self.index.items + seen.values)
        # Most histories are short: a few items more than k are enough. The other queries are searched again, deeper.
        depth = k if seen is None else k + _estimate_length(seen)
        unfinished = np.arange(len(queries))
        while unfinished.size:
            depth = min(depth, self.index.items)
            nearest, values = self.index.search(queries[unfinished], depth)
            is_found = nearest >= 0
            unseen = is_found
            if seen_pairs is not None:
                unseen = is_found & ~_is_in_sorted(owner[unfinished, None] * self.index.items + nearest, seen_pairs)
            # Enough are found with k unseen items: what is not found scores no more than the least of them.
            done = (unseen.sum(axis=1) >= k) | ~is_found.all(axis=1) | (depth == self.index.items)
            if bias is not None:
                nearest, values = _weigh(nearest, values, is_found & ~unseen, bias)
            wanted = unseen if bias is None else nearest >= 0
            items[unfinished], scores[unfinished] = _pick_first(nearest, values, wanted, k)
            unfinished, depth = unfinished[~done], 2 * depth
        shape = (users, interests, k)
        return Lists(torch.from_numpy(items.reshape(shape)), torch.from_numpy(scores.reshape(shape)))


@dataclass
class Retriever:
    """Retrieves one list of `k` distinct items per user; shorter only where no items are left.

    Example: `Retriever(ExactSearch(catalogue), k=50, merge=lambda lists: merge_by_score(lists, 50))`
    """

    search: Search
    k: int
    merge: Callable[[Lists], Merged]
    """Merges the lists of several interests into one of `k` items."""
    exact: Search | None = None
    """Searches for the users for whom an approximate search finds fewer than k items."""
    bias: float | None = None
    """Added to the scores of items of the history, which then compete; None: they are left out."""
    neighbours: Callable[[Ragged], Weighed] | None = None
    """What the neighbours of histories `seen` raise, for an exact search alone; None: nothing is."""

    def lists(self, vectors: Float32, seen: Ragged | None = None, excluded: Ragged | None = None) -> Merged:
        """Retrieve one list per user.

        Args:
            vectors: [users, interests, dim] float32.
            seen: items of the history, by user, repeats allowed: left out, or with the `bias`; None: none.
            excluded: other items that are left out, by user, also where neighbours raise them; None: none.
        """
        left_out, weighed = excluded, None
        if seen is not None and self.bias is not None:
            weighed = Weighed(seen, self.bias)
        elif seen is not None:
            left_out = seen if excluded is None else _join_rows(seen, excluded)
        if seen is not None and self.neighbours is not None:
            weighed = self.neighbours(seen).beside(weighed)
        # Merging never needs more than k items of an interest.
        merged = self.merge(self.search.lists(vectors, self.k, left_out, weighed))
        (short,) = np.nonzero((merged.items < 0).any(dim=1).numpy())
        if short.size and self.exact is not None:
            left_out = None if left_out is None else left_out.take(short)
            weighed = None if weighed is None else weighed.take(short)
            exact = self.merge(self.exact.lists(vectors[short], self.k, left_out, weighed))
            for values, replacements in zip(merged, exact, strict=True):
                values[torch.from_numpy(short)] = replacements
        return merged


def _join_rows(first: Ragged, second: Ragged) -> Ragged:
    """Each row of `first`, followed by the same row of `second`."""
    both = Ragged(
        np.concatenate([first.values, second.values]), np.append(first.offsets, second.offsets[1:] + first.offsets[-1])
    )
    rows = np.arange(first.rows)
    taken = both.take(np.stack([rows, rows + first.rows], axis=1).ravel())
    return Ragged(taken.values, taken.offsets[::2])


def _estimate_length(seen: Ragged) -> int:
    """Length that 90% of the histories do not exceed."""
    return int(np.ceil(np.quantile(seen.lengths, 0.9))) if seen.rows else 0


def _is_in_sorted(values: Int64, ascending: Int64) -> Bool:
    """Whether each of `values`, of any shape, is in `ascending` [n]."""
    if not ascending.size:
        return np.zeros(values.shape, dtype=bool)
    place = np.minimum(np.searchsorted(ascending, values), ascending.size - 1)
    return ascending[place] == values


def _weigh(items: Int64, scores: Float32, is_seen: Bool, bias: float) -> tuple[Int64, Float32]:
    """Items and scores [rows, any] with the bias added where seen, best first, of equal ones the smaller id.

    -1 with -inf stays at the end.
    """
    scores = np.where(is_seen, scores + np.float32(bias), scores)
    order = np.lexsort((np.where(items < 0, np.iinfo(np.int64).max, items), -scores), axis=1)
    return np.take_along_axis(items, order, axis=1), np.take_along_axis(scores, order, axis=1)


def _pick_first(items: Int64, scores: Float32, wanted: Bool, count: int) -> tuple[Int64, Float32]:
    """[rows, count] the first wanted items of each row and their scores, in order, filled up with -1 and -inf."""
    order = np.argsort(~wanted, axis=1, kind="stable")[:, :count]
    chosen = np.full((len(items), count), -1, dtype=np.int64)
    values = np.full((len(items), count), -np.inf, dtype=np.float32)
    is_wanted = np.take_along_axis(wanted, order, axis=1)
    chosen[:, : order.shape[1]] = np.where(is_wanted, np.take_along_axis(items, order, axis=1), -1)
    values[:, : order.shape[1]] = np.where(is_wanted, np.take_along_axis(scores, order, axis=1), -np.inf)
    return chosen, values
