"""Negatives for the sampled losses: which items a batch is scored against, and how likely each was to be drawn.

Draws depend on (seed, epoch, worker, batch) only, so every rank draws the same negatives for the same step: each table
is asked for one set of ids, and one rank or several train alike.
"""

from typing import Protocol

import numpy as np


class NegativeSampler(Protocol):
    """Draws negatives without replacement."""

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids [negatives] int64, all different, and log of the expected count of each [negatives] float32."""
        ...


class Uniform:
    """Every item equally likely; expected count `count / items`."""

    def __init__(self, items: int, count: int) -> None:
        self.items, self.count = items, min(count, items)

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """See `NegativeSampler`."""
        ids = rng.choice(self.items, self.count, replace=False, shuffle=False).astype(np.int64)
        return ids, np.full(self.count, np.log(self.count / self.items), dtype=np.float32)


class LogUniform:
    """Likely in proportion to log((rank + 2) / (rank + 1)) of the item's popularity rank (Zipf), as word2vec-style
    trainers do.

    Duplicates are drawn again until `count` ids are different; the expected count is 1 - (1 - p) ** tries.
    """

    def __init__(self, counts: np.ndarray, count: int) -> None:
        self.by_rank = np.argsort(-counts, kind="stable").astype(np.int64)
        self.count = min(count, counts.size)

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """See `NegativeSampler`."""
        items = self.by_rank.size
        seen: dict[int, None] = {}
        tries = 0
        while len(seen) < self.count:
            draws = np.exp(rng.random(max(self.count, 16)) * np.log(items + 1)).astype(np.int64) - 1
            for rank in draws.clip(0, items - 1).tolist():
                tries += 1
                seen[rank] = None
                if len(seen) == self.count:
                    break
        ranks = np.fromiter(seen, dtype=np.int64, count=self.count)
        p = np.log((ranks + 2) / (ranks + 1)) / np.log(items + 1)
        expected = -np.expm1(tries * np.log1p(-np.minimum(p, 1 - 1e-12)))
        return self.by_rank[ranks], np.log(expected).astype(np.float32)
