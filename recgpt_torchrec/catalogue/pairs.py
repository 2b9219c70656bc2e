"""Pairs of a row and an item that does not compete for it: items of a history, or otherwise forbidden ones."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recgpt_torchrec.data.ragged import Int64, Ragged, offsets_of


@dataclass(frozen=True)
class Pairs:
    """Pairs on the host, in order of their rows; a pair may occur twice."""

    rows: Int64
    """[pairs] int64, rising."""
    items: Int64
    """[pairs] int64."""

    def part(self, start: int, stop: int) -> "Pairs":
        """The pairs of the rows `start:stop`, whose numbers count from `start`."""
        first, last = np.searchsorted(self.rows, (start, stop))
        return Pairs(self.rows[first:last] - start, self.items[first:last])

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


class Excluded:
    """Masks the pairs that fall into a tile of scores, whatever the numbers of pairs and of tiles."""

    def __init__(self, pairs: Pairs, rows: int, device: torch.device, *, whole: bool) -> None:
        """
        Args:
            pairs: to mask.
            rows: number of rows of a block; the last may have fewer.
            device: of the scores.
            whole: whether a tile has all items of the pairs; they are in order of the tiles then.
        """
        self.whole, self.span = whole, int(pairs.items.max(initial=0)) + 1
        self.keys, own_rows, items = pairs.rows // rows, pairs.rows % rows, pairs.items
        if not whole:
            keys = self.keys * self.span + items
            order = np.argsort(keys)
            self.keys, own_rows, items = keys[order], own_rows[order], items[order]
        self.rows, self.items = torch.from_numpy(own_rows).to(device), torch.from_numpy(items).to(device)

    def mask(self, scores: Tensor, block: int, first: int) -> None:
        """Set the scores [rows, items] of a block of rows and of the items from `first` on to -inf, in place.

        Args:
            scores: contiguous.
            block: number of the block.
            first: id of the first item.
        """
        base, items = block * self.span, scores.shape[1]
        bounds = base + min(first, self.span), base + min(first + items, self.span)
        if self.whole:
            bounds = block, block + 1
        start, stop = np.searchsorted(self.keys, bounds).tolist()
        if start < stop:  # scatter takes a fraction of the time of an assignment by two indices
            places = self.rows[start:stop] * items + (self.items[start:stop] - first)
            scores.view(-1).scatter_(0, places, -torch.inf)
