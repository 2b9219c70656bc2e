"""Pairs of a row and an item whose score is changed: left out, or raised or lowered, all alike or each by its own."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from recgpt_torchrec.data.ragged import Float32, Int64, Ragged, offsets_of


@dataclass(frozen=True)
class Pairs:
    """Pairs on the host, in order of their rows; a pair may occur twice."""

    rows: Int64
    """[pairs] int64, rising."""
    items: Int64
    """[pairs] int64."""
    values: Float32 | None = None
    """[pairs] float32, what is added to the score of each; None: nothing is, they are left out."""

    def part(self, start: int, stop: int) -> "Pairs":
        """The pairs of the rows `start:stop`, whose numbers count from `start`."""
        first, last = np.searchsorted(self.rows, (start, stop))
        values = None if self.values is None else self.values[first:last]
        return Pairs(self.rows[first:last] - start, self.items[first:last], values)

    def distinct(self) -> "Pairs":
        """The same pairs, each once; they have no values of their own."""
        span = int(self.items.max(initial=0)) + 1
        keys = np.unique(self.rows * span + self.items)
        return Pairs(keys // span, keys % span)

    def with_values(self, values: Float32 | float) -> "Pairs":
        """The same pairs with `values`: one for each, or the same for all."""
        return replace(self, values=np.array(np.broadcast_to(np.float32(values), self.rows.shape)))

    def to_ragged(self, rows: int) -> Ragged:
        """The items of each of `rows` rows."""
        return Ragged(self.items, offsets_of(np.bincount(self.rows, minlength=rows)))


def pairs_of(seen: Ragged | None, forbidden: Tensor | None = None) -> Pairs:
    """The pairs of ragged lists of items by row, and of a matrix [rows, any] int64 of further items by row."""
    rows: list[Int64] = []
    items: list[Int64] = []
    if seen is not None:
        rows, items = [seen.owners], [seen.values.astype(np.int64, copy=False)]
    if forbidden is not None:
        rows.append(np.repeat(np.arange(forbidden.shape[0]), forbidden.shape[1]))
        items.append(forbidden.cpu().numpy().reshape(-1))
    if not rows:
        return Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64))
    all_rows, all_items = np.concatenate(rows), np.concatenate(items)
    if len(rows) > 1:
        order = np.argsort(all_rows, kind="stable")
        all_rows, all_items = all_rows[order], all_items[order]
    return Pairs(all_rows, all_items)


class TilePairs:
    """Finds the pairs that fall into a tile of scores, whatever the numbers of pairs and of tiles."""

    def __init__(self, pairs: Pairs, rows: int, device: torch.device, *, whole: bool) -> None:
        """
        Args:
            pairs: to find.
            rows: number of rows of a block; the last may have fewer.
            device: of the scores.
            whole: whether a tile has all items of the pairs; they are in order of the tiles then.
        """
        self.whole, self.span = whole, int(pairs.items.max(initial=0)) + 1
        self.keys, own_rows, items = pairs.rows // rows, pairs.rows % rows, pairs.items
        self.order: Int64 | None = None
        """[pairs] int64 order in which they are found; None: the one they came in."""
        if not whole:
            keys = self.keys * self.span + items
            self.order = order = np.argsort(keys)
            self.keys, own_rows, items = keys[order], own_rows[order], items[order]
        self.rows, self.items = torch.from_numpy(own_rows).to(device), torch.from_numpy(items).to(device)

    def find(self, items: int, block: int, first: int) -> tuple[slice, Tensor]:
        """The pairs of a tile, in `order`, and their flat places [found] int64 in its scores [rows, items].

        Args:
            items: number of items of the tile.
            block: number of the block of rows.
            first: id of the first item.
        """
        base = block * self.span
        bounds = base + min(first, self.span), base + min(first + items, self.span)
        if self.whole:
            bounds = block, block + 1
        start, stop = np.searchsorted(self.keys, bounds).tolist()
        return slice(start, stop), self.rows[start:stop] * items + (self.items[start:stop] - first)


class Excluded(TilePairs):
    """Pairs that do not compete."""

    def mask(self, scores: Tensor, block: int, first: int) -> None:
        """Set the scores [rows, items] of a tile's pairs to -inf, in place; `scores` is contiguous."""
        _, places = self.find(scores.shape[1], block, first)
        if len(places):  # scatter takes a fraction of the time of an assignment by two indices
            scores.view(-1).scatter_(0, places, -torch.inf)


class WeighedPairs(TilePairs):
    """Pairs, each of them once, to whose scores something is added."""

    def __init__(self, pairs: Pairs, rows: int, device: torch.device, *, whole: bool) -> None:
        """
        Args:
            pairs: with values.
            rows, device, whole: see `TilePairs`.
        """
        super().__init__(pairs, rows, device, whole=whole)
        assert pairs.values is not None
        values = pairs.values if self.order is None else pairs.values[self.order]
        self.added = torch.from_numpy(values).to(device)

    def add(self, scores: Tensor, block: int, first: int) -> None:
        """Add to the scores [rows, items] of a tile's pairs, in place; `scores` is contiguous."""
        found, places = self.find(scores.shape[1], block, first)
        if len(places):
            scores.view(-1).scatter_add_(0, places, self.added[found])
