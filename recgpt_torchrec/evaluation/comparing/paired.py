"""Paired bootstrap over users: by how much one recall path is ahead of another, and whether beyond chance.

The gain of a user depends on the rank alone, and ranks below k are a multiple of one half. So the users are counted by
the pair of their ranks in both paths, at most (2 k + 1)^2 pairs, and to draw as many users with replacement is to draw
such counts from a multinomial distribution: the plain bootstrap exactly, at a cost and in memory that do not grow with
the users.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from recgpt_torchrec.data.ragged import Int64

DRAWS = 4000
"""Number of bootstrap samples."""
LEVEL = 0.95
"""Of intervals."""
CELLS = 2**21
"""Numbers drawn at once."""
SEED = 0
PER_RANK = 2
"""Ranks are multiples of 1 / PER_RANK."""
Metric = Literal["HR", "NDCG"]
Ranks = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Interval:
    """A mean over users, and its bootstrap interval of `LEVEL` (percentiles)."""

    mean: float
    low: float
    high: float

    @property
    def beyond_chance(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


def gains(metric: Metric, k: int) -> npt.NDArray[np.float64]:
    """[2 k + 1] float64: what a user with the rank 0, 1/2, 1, ... adds to the metric at k; the last: rank k or more."""
    ranks = np.arange(PER_RANK * k) / PER_RANK
    return np.append(1 / np.log2(ranks + 2) if metric == "NDCG" else np.ones(ranks.size), 0.0)


@dataclass
class PairCounts:
    """Users by their ranks in two recall paths.

    Example: `PairCounts(10).add(ranks, other_ranks).difference("NDCG")`
    """

    k: int
    counts: Int64 = field(init=False)
    """[2 k + 1, 2 k + 1] int64 users by the rank in the first and in the second path."""

    def __post_init__(self) -> None:
        self.counts = np.zeros((PER_RANK * self.k + 1,) * 2, dtype=np.int64)

    def add(self, first: Ranks, second: Ranks) -> "PairCounts":
        """Add users: their ranks [users] in both paths; returns itself."""
        size = len(self.counts)
        index = _levels(first, self.k) * size + _levels(second, self.k)
        self.counts += np.bincount(index, minlength=size**2).reshape(size, size)
        return self

    @property
    def users(self) -> int:
        """Number of users added."""
        return int(self.counts.sum())

    def mean(self, metric: Metric, path: Literal[0, 1]) -> float:
        """The metric of one of the paths."""
        return float(self.counts.sum(axis=1 - path) @ gains(metric, self.k) / self.users)

    def difference(self, metric: Metric, seed: int = SEED) -> Interval:
        """By how much the first path is ahead of the second."""
        gain = gains(metric, self.k)
        return bootstrap(self.counts.ravel(), (gain[:, None] - gain[None, :]).ravel(), seed)


@dataclass
class RankCounts:
    """Users by their rank in one recall path.

    Example: `RankCounts(10).add(ranks).interval("NDCG")`
    """

    k: int
    counts: Int64 = field(init=False)
    """[2 k + 1] int64 users by rank."""

    def __post_init__(self) -> None:
        self.counts = np.zeros(PER_RANK * self.k + 1, dtype=np.int64)

    def add(self, ranks: Ranks) -> "RankCounts":
        """Add users: their ranks [users]; returns itself."""
        self.counts += np.bincount(_levels(ranks, self.k), minlength=self.counts.size)
        return self

    @property
    def users(self) -> int:
        """Number of users added."""
        return int(self.counts.sum())

    def interval(self, metric: Metric, seed: int = SEED) -> Interval:
        """The metric."""
        return bootstrap(self.counts, gains(metric, self.k), seed)


def _levels(ranks: Ranks, k: int) -> Int64:
    """[users] int64 index in `gains` of each rank."""
    return np.minimum(ranks * PER_RANK, PER_RANK * k).astype(np.int64)


def bootstrap(counts: Int64, values: npt.NDArray[np.float64], seed: int = SEED) -> Interval:
    """The mean of values over users, and its interval over `DRAWS` samples of as many users.

    Args:
        counts: [n] int64 users with each value; at least one in all.
        values: [n] float64.
        seed: of the draws.
    """
    present = np.flatnonzero(counts)
    counts, values = counts[present], values[present]
    users = int(counts.sum())
    rng, means, at_once = np.random.default_rng(seed), [], max(1, CELLS // present.size)
    for done in range(0, DRAWS, at_once):
        drawn = rng.multinomial(users, counts / users, size=min(at_once, DRAWS - done))
        means.append(drawn @ values / users)
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(counts @ values / users), float(low), float(high))
