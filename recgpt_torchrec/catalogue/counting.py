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
from recgpt_torchrec.catalogue.ranks import COUNTS, RankCounter

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

    def __init__(
        self,
        queries: Tensor,
        targets: Tensor,
        target_vectors: Tensor,
        history: Pairs,
        items: int,
        biases: Tensor | None = None,
    ) -> None:
        """
        Args:
            queries: [rows, dim] float32.
            targets: [rows] int64 item ids.
            target_vectors: [rows, dim] float32.
            history: items that do not compete when masked, by row.
            items: number of items that will come; decides how tiles are cut.
            biases: [rows, 2] float32, what is added when unmasked to the scores of the history's items, and to that of
                the target, which may be one of them; None: nothing.
        """
        self.biases = queries.new_zeros(len(queries), 2) if biases is None else biases
        self.queries, self.targets, self.target_vectors = queries, targets, target_vectors
        self.history = history
        rows, held, narrowest = len(queries), SCORES[queries.device.type], NARROWEST[queries.device.type]
        tile = max(1, -(-items // WIDTH))
        if tile * WIDTH * rows > held:
            tile = min(tile, max(narrowest, min(held // (WIDTH * rows), tile // TARGETS_SHARE)))
        self.width, self.rows = WIDTH * tile, max(1, held // (WIDTH * tile))
        self._counters: list[RankCounter] = []

    @property
    def counts(self) -> Tensor:
        """[8, rows] int64 so far, see `RankCounter`; zeros before the first update."""
        if not self._counters:
            return torch.zeros(COUNTS, len(self.queries), dtype=torch.int64, device=self.queries.device)
        return torch.cat([counter.counts for counter in self._counters], dim=1)

    def update(self, vectors: Tensor, first: int) -> None:
        """Count the items `first`, `first` + 1, ... with `vectors` [block, dim] float32.

        Raises:
            ValueError: a score is NaN.
        """
        for number, start in enumerate(range(0, len(self.queries), self.rows)):
            rows = slice(start, start + self.rows)
            for place in range(0, len(vectors), self.width):
                tile = vectors[place : place + self.width]
                scores = self._score(self.queries[rows], tile)
                if number == len(self._counters):
                    self._counters.append(self._count_from_zero(rows, scores, first + place, len(tile)))
                self._counters[number].update(scores[:, : len(tile)], first + place)

    def _count_from_zero(self, rows: slice, scores: Tensor, first: int, items: int) -> RankCounter:
        """The counter of a block of rows, whose first tile has the `scores` of `items` items from `first` on."""
        places = self.targets[rows] - first
        if ((places >= 0) & (places < items)).all():  # a small catalogue: the targets' scores are there already
            own = scores.gather(1, places[:, None])[:, 0]
        else:
            own = self._score_targets(self.queries[rows], self.target_vectors[rows])
        seen = self.history.part(rows.start, rows.start + len(places)).to_ragged(len(places))
        return RankCounter(self.targets[rows], own + self.biases[rows, 1], seen, self.biases[rows, 0])

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
