"""Candidates: which items the targets of a batch are scored against, and how likely each was to be there.

A source is a class in `SOURCES`, under the name that `--loss.candidates` takes; a distribution of sampled negatives one
in `DISTRIBUTIONS`, under that of `--loss.negatives_by`. Draws depend on the generator that is given alone, which every
rank seeds alike: each table is asked for one set of ids, and one rank or several train alike.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from recgpt_torchrec.config import Loss
from recgpt_torchrec.data.ragged import Int64

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Candidates:
    """The candidate set of one batch, in item ids."""

    ids: Int64
    """[candidates] int64, all different."""
    log_q: Float32
    """[candidates] float32: log of the expected count of each; 0 where it is always there."""
    every_item: bool = False
    """Whether `ids` is the whole catalogue, in order."""


def no_candidates() -> Candidates:
    """Nothing to score against."""
    return Candidates(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32))


@dataclass(frozen=True)
class ItemStatistics:
    """What sources know of the items."""

    items: int
    counts: Int64 | None = None
    """[items] int64 training interactions of each item, for sources that need them."""


class CandidateSource(ABC):
    """Where the candidates of a batch come from."""

    room: int | None = 0
    """Maximum number of candidates that are no targets of the batch; None: every item may be asked for."""

    @classmethod
    @abstractmethod
    def make(cls, loss: Loss, statistics: ItemStatistics, tokens: int) -> "CandidateSource":
        """The source of these options, for batches of at most `tokens` targets."""

    @staticmethod
    def needs_counts(loss: Loss) -> bool:
        """Whether it has to know how popular each item is."""
        return False

    @abstractmethod
    def draw(self, targets: Int64, rng: np.random.Generator) -> Candidates:
        """The candidates of a batch whose targets are the items `targets` [targets] int64."""


class AllItems(CandidateSource):
    """The whole catalogue: an exact softmax."""

    room = None

    def __init__(self, items: int) -> None:
        # Every batch has these very arrays: nobody writes into a batch.
        self.candidates = Candidates(np.arange(items), np.zeros(items, dtype=np.float32), every_item=True)

    @classmethod
    def make(cls, loss: Loss, statistics: ItemStatistics, tokens: int) -> "AllItems":
        """See `CandidateSource`."""
        return cls(statistics.items)

    def draw(self, targets: Int64, rng: np.random.Generator) -> Candidates:
        """See `CandidateSource`."""
        return self.candidates


class Sampled(CandidateSource):
    """Negatives drawn for the whole batch, without replacement."""

    def __init__(self, distribution: "Distribution") -> None:
        self.distribution, self.room = distribution, distribution.count

    @classmethod
    def make(cls, loss: Loss, statistics: ItemStatistics, tokens: int) -> "Sampled":
        """See `CandidateSource`."""
        return cls(DISTRIBUTIONS[loss.negatives_by].make(statistics, loss.negatives))

    @staticmethod
    def needs_counts(loss: Loss) -> bool:
        """See `CandidateSource`."""
        return DISTRIBUTIONS[loss.negatives_by].needs_counts

    def draw(self, targets: Int64, rng: np.random.Generator) -> Candidates:
        """See `CandidateSource`."""
        return Candidates(*self.distribution.draw(rng))


class InBatch(CandidateSource):
    """The distinct targets of the batch, each with the chance that it is among them."""

    def __init__(self, counts: Int64, tokens: int) -> None:
        p = np.maximum(counts, 0.5) / max(counts.sum(), 1)
        log_q = np.log(-np.expm1(tokens * np.log1p(-np.minimum(p, 1 - 1e-9))))
        self.log_q = log_q.astype(np.float32)
        """[items] float32: log of the chance that an item is among the targets of a batch of `tokens` positions."""

    @classmethod
    def make(cls, loss: Loss, statistics: ItemStatistics, tokens: int) -> "InBatch":
        """See `CandidateSource`."""
        assert statistics.counts is not None
        return cls(statistics.counts, tokens)

    @staticmethod
    def needs_counts(loss: Loss) -> bool:
        """See `CandidateSource`."""
        return True

    def draw(self, targets: Int64, rng: np.random.Generator) -> Candidates:
        """See `CandidateSource`."""
        ids = np.unique(targets)
        return Candidates(ids, self.log_q[ids])


SOURCES: dict[str, type[CandidateSource]] = {"all": AllItems, "sampled": Sampled, "in_batch": InBatch, "bce": Sampled}
"""By the value of `--loss.candidates`; the binary cross-entropy takes each target's negatives from those drawn."""


class Distribution(ABC):
    """What sampled negatives are drawn from, without replacement."""

    count: int
    """Negatives drawn."""
    needs_counts = False
    """Whether it has to know how popular each item is."""

    @classmethod
    @abstractmethod
    def make(cls, statistics: ItemStatistics, count: int) -> "Distribution":
        """One that draws `count` negatives, or all items where there are fewer."""

    @abstractmethod
    def draw(self, rng: np.random.Generator) -> tuple[Int64, Float32]:
        """Ids [count] int64, all different, and log of the expected count of each [count] float32."""


class Uniform(Distribution):
    """Every item equally likely; expected count `count / items`."""

    def __init__(self, items: int, count: int) -> None:
        self.items, self.count = items, min(count, items)

    @classmethod
    def make(cls, statistics: ItemStatistics, count: int) -> "Uniform":
        """See `Distribution`."""
        return cls(statistics.items, count)

    def draw(self, rng: np.random.Generator) -> tuple[Int64, Float32]:
        """See `Distribution`."""
        ids = rng.choice(self.items, self.count, replace=False, shuffle=False).astype(np.int64)
        return ids, np.full(self.count, np.log(self.count / self.items), dtype=np.float32)


class LogUniform(Distribution):
    """Likely in proportion to log((rank + 2) / (rank + 1)) of the item's popularity rank (Zipf), as word2vec-style
    trainers do.

    Duplicates are drawn again until `count` ids are different; the expected count is 1 - (1 - p) ** tries.
    """

    needs_counts = True

    def __init__(self, counts: Int64, count: int) -> None:
        self.by_rank = np.argsort(-counts, kind="stable").astype(np.int64)
        self.count = min(count, counts.size)

    @classmethod
    def make(cls, statistics: ItemStatistics, count: int) -> "LogUniform":
        """See `Distribution`."""
        assert statistics.counts is not None
        return cls(statistics.counts, count)

    def draw(self, rng: np.random.Generator) -> tuple[Int64, Float32]:
        """See `Distribution`."""
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


DISTRIBUTIONS: dict[str, type[Distribution]] = {"uniform": Uniform, "log_uniform": LogUniform}
"""By the value of `--loss.negatives_by`."""
