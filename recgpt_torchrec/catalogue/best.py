"""The k best items of queries, exactly, from vectors that come block by block with rising ids.

Scores are computed in tiles of some rows and some items, so that memory is bounded whatever the numbers of both. After
the first tile only rows whose largest score beats their k-th best so far need work: ids rise, so an equal score loses.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recgpt_torchrec.catalogue.pairs import Excluded, Pairs, WeighedPairs

SCORES = {"cpu": 2**18, "cuda": 2**26}
"""Number of scores held at once: on CPU what fits its cache (1 MiB took half the time of 25 MiB), on a GPU 256 MiB."""
FEWEST_ROWS = 16
"""Items are cut into tiles where all of them, for fewer rows than these, are more than the scores held at once: each
tile's vectors are read from memory once per block of rows."""
ROWS = 256
"""Number of rows of a tile where items are cut. A million items x 64 took 1.0 ms per row with 256, 3.0 with 16."""
FEW = 10
"""Up to this k, each item is found by an argmax over the scores: faster than torch.topk, if there are `MANY` scores."""
MANY = 1024


class Best(NamedTuple):
    """The best items of each query, best first; among equal scores the smaller id first."""

    items: Tensor
    """[rows, k] int64; -1 where no item is left."""
    scores: Tensor
    """[rows, k] float32; -inf beside -1."""


class BestFinder:
    """Finds the k best items of each query.

    Example:
        finder = BestFinder(queries, k, excluded, items=len(vectors))
        for first, block in blocks:  # with rising ids
            finder.update(block, first)
        finder.best
    """

    def __init__(
        self,
        queries: Tensor,
        k: int,
        excluded: Pairs | None,
        items: int,
        weighed: Pairs | None = None,
    ) -> None:
        """
        Args:
            queries: [rows, dim] float32.
            k: items per query.
            excluded: items that do not compete, by row.
            items: number of items that will come; decides how tiles are cut.
            weighed: items, by row and each once, that compete with their values added to their scores.
        """
        self.queries, self.k = queries, k
        rows, held = len(queries), SCORES[queries.device.type]
        self.rows, self.width = max(1, held // max(1, items)), max(1, items)
        if self.rows < FEWEST_ROWS:
            self.rows = max(1, min(rows, ROWS))
            self.width = max(1, held // self.rows)
        self.pairs, self.items = excluded, items
        self.excluded: Excluded | None = None
        self.weighed_pairs = weighed
        self.weighed: WeighedPairs | None = None
        self._blocks: list[Best] = []

    @property
    def best(self) -> Best:
        """The best items so far."""
        if not self._blocks:
            rows = len(self.queries)
            items = torch.full((rows, self.k), -1, dtype=torch.int64, device=self.queries.device)
            return Best(items, self.queries.new_full((rows, self.k), -torch.inf))
        return Best(*(torch.cat(parts) for parts in zip(*self._blocks, strict=True)))

    def update(self, vectors: Tensor, first: int) -> None:
        """Score the items `first`, `first` + 1, ... with `vectors` [block, dim] float32."""
        if not len(vectors):
            return
        is_new, blocks = not self._blocks, []
        whole = len(vectors) == self.items <= self.width
        if is_new and self.pairs is not None:
            self.excluded = Excluded(self.pairs, self.rows, vectors.device, whole=whole)
        if is_new and self.weighed_pairs is not None:
            self.weighed = WeighedPairs(self.weighed_pairs, self.rows, vectors.device, whole=whole)
        for number, start in enumerate(range(0, len(self.queries), self.rows)):
            queries = self.queries[start : start + self.rows]
            best = None if is_new else self._blocks[number]
            for place in range(0, len(vectors), self.width):
                scores = queries @ vectors[place : place + self.width].t()
                if self.excluded is not None:
                    self.excluded.mask(scores, number, first + place)
                if self.weighed is not None:
                    self.weighed.add(scores, number, first + place)
                if best is None:
                    items, values = best_items(scores, self.k)
                    best = Best(torch.where(items < 0, items, items + (first + place)), values)
                else:
                    _improve(best, scores, first + place)
            assert best is not None
            blocks.append(best)
        self._blocks = blocks


def _improve(best: Best, scores: Tensor, first: int) -> None:
    """Replace items of `best` by better ones among `scores` [rows, items] of the items from `first` on, in place."""
    worst = best.scores[:, -1]
    (rows,) = torch.nonzero(scores.amax(1) > worst, as_tuple=True)
    if not rows.numel():
        return
    scores = scores[rows]
    better = _find_greater(scores, worst[rows])
    owner, item = better // scores.shape[1], better % scores.shape[1]
    # Left-aligned in a grid, in order of their ids.
    counts = torch.bincount(owner, minlength=len(rows))
    place = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner]
    grid = scores.new_full((len(rows), int(counts.max())), -torch.inf)
    ids = torch.full(grid.shape, -1, dtype=torch.int64, device=grid.device)
    grid[owner, place], ids[owner, place] = scores.flatten()[better], item + first
    merged = merge_best(
        torch.cat([best.items[rows], ids], 1), torch.cat([best.scores[rows], grid], 1), best.items.shape[1]
    )
    best.items[rows], best.scores[rows] = merged.items, merged.scores


def merge_best(items: Tensor, scores: Tensor, k: int) -> Best:
    """The `k` best of candidates [rows, any], among which equal scores come with rising ids. Overwrites `scores`."""
    places, values = best_items(scores, k)
    return Best(torch.where(places < 0, -1, items.gather(1, places.clamp(min=0))), values)


def best_items(scores: Tensor, k: int) -> Best:
    """The `k` best items of each row of `scores` [rows, items] that are not -inf, as `Best`. Overwrites `scores`."""
    rows, items = scores.shape
    if k == 1 or (k <= FEW and items >= MANY):
        ids = torch.full((rows, k), -1, dtype=torch.int64, device=scores.device)
        values = torch.full((rows, k), -torch.inf, dtype=scores.dtype, device=scores.device)
        for place in range(min(k, items)):
            largest = _first_argmax(scores)[:, None]
            ids[:, place], values[:, place] = largest[:, 0], scores.gather(1, largest)[:, 0]
            if place + 1 < k:
                scores.scatter_(1, largest, -torch.inf)
        return Best(ids.masked_fill_(values == -torch.inf, -1), values)
    count = min(k, items)
    values, ids = scores.topk(min(k + 1, items), dim=1)
    if values.shape[1] > count:  # ids decide where the last item equals one left out
        (tied,) = torch.nonzero(
            (values[:, count - 1] == values[:, count]) & (values[:, count] != -torch.inf), as_tuple=True
        )
        values, ids = values[:, :count].contiguous(), ids[:, :count].contiguous()
        if tied.numel():
            ordered = scores[tied].sort(dim=1, descending=True, stable=True)
            values[tied], ids[tied] = ordered.values[:, :count], ordered.indices[:, :count]
    ids, order = ids.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    ids = ids.gather(1, order).masked_fill(values == -torch.inf, -1)
    missing = k - count
    if missing:
        ids = torch.nn.functional.pad(ids, (0, missing), value=-1)
        values = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
    return Best(ids, values)


def _first_argmax(scores: Tensor) -> Tensor:
    """[rows, items] -> [rows] int64, the first of equal ones. On CPU numpy takes a third of torch's time."""
    if scores.device.type == "cpu":
        return torch.from_numpy(scores.numpy().argmax(1))
    return scores.argmax(1)


def _find_greater(scores: Tensor, bounds: Tensor) -> Tensor:
    """Flat places in `scores` [rows, items] that are above their row's bound [rows]. On CPU numpy: an eighth of the
    time."""
    if scores.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(scores.numpy() > bounds.numpy()[:, None]))
    return torch.nonzero((scores > bounds[:, None]).flatten())[:, 0]
