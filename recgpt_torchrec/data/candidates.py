"""Candidates: the items that the targets of a batch are scored against, with their logQ.

`SOURCES` holds a class per value of `--loss.candidates`, `DISTRIBUTIONS` one per value of `--loss.negatives_by`. Draws
depend only on the generator that is passed in. Every rank with a batch seeds it alike, so that the tables look up one
set of ids and training does not depend on the number of ranks; a rank that has run out draws others, whose gradients
are zero. Where candidates are *shared*, each rank draws its part of them, and
the targets of all ranks are scored against all parts (`catalogue.softmax`).

What a process holds per item, in bytes: `all` 20 per item of its own range, `in_batch` 5 (logQ, and whether it was ever
trained), `log_uniform` 4 (the items by popularity, 8 from 2^31 items on), `uniform` none. No draw costs time per item,
except that of `all`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from recgpt_torchrec.config import Batch, Loss
from recgpt_torchrec.data.ragged import Float32, Int64

if TYPE_CHECKING:  # packing, and so the dense part of the model, does not need Arrow
    from recgpt_torchrec.data.dataset import Dataset


@dataclass(frozen=True)
class Candidates:
    """The candidate set of one batch, in item ids."""

    ids: Int64
    """[candidates] int64, all distinct."""
    log_q: Float32
    """[candidates] float32: log of the expected count of each; 0: always a candidate."""
    bags: Int64 | None = None
    """[candidates] int64: 0, 1, ... where `ids` are consecutive; their bags then come first, in this order. None: they
    are numbered with the batch's other items."""
    shared: bool = False
    """Whether the targets of all ranks are scored against them; `ids` ascend then."""


def leave_out_untrained(candidates: Candidates, trained: npt.NDArray[np.bool_]) -> Candidates:
    """The candidates that may be a target, where the model tells items that were never trained by their attributes.

    As negatives, items that nobody could choose yet would teach that their attributes are not chosen. Without them
    HR@10 of MovieLens' cold items among all items is .0081 instead of .0002, among cold items .316 instead of .310
    (five draws, pipelines/cold_start.py).

    Args:
        candidates: as drawn among all items.
        trained: [items] bool: whether an item is ever a target.
    """
    counts = trained.take(candidates.ids)
    if counts.all():
        return candidates
    if candidates.bags is None:
        return replace(candidates, ids=candidates.ids[counts], log_q=candidates.log_q[counts])
    return replace(candidates, log_q=np.where(counts, candidates.log_q, np.float32(np.inf)))  # each keeps its bag


def id_range(count: int, rank: int, ranks: int) -> tuple[int, int]:
    """The first and the one past the last of the ids 0 to `count` - 1 that a rank scores, of `ranks` ranks.

    Example: `id_range(10, 1, 3)` is `(3, 6)`
    """
    return count * rank // ranks, count * (rank + 1) // ranks


def no_candidates() -> Candidates:
    """An empty candidate set."""
    return Candidates(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32))


@dataclass(frozen=True)
class ItemStatistics:
    """Number of items, and their counts, for candidate sources."""

    items: int
    counts: Callable[[], Int64]
    """Reads [items] int64 training interactions per item; only some sources ask."""


class Place(NamedTuple):
    """A rank among ranks."""

    rank: int
    ranks: int


ALONE = Place(0, 1)


class CandidateSource(ABC):
    """Where the candidates of a rank's batches come from."""

    room: int = 0
    """Maximum number of candidates that are not targets of the batch, the same on all ranks."""
    count: int
    """Maximum number of candidates of a batch, on any rank."""
    seed: tuple[int, ...] = ()
    """What the seed of the generator needs besides the batch's own: the rank, where ranks draw different candidates."""
    ever: npt.NDArray[np.bool_] | None = None
    """[items] bool: whether an item may be a candidate at all, by its interactions in training; None: all may."""

    @classmethod
    @abstractmethod
    def make(cls, loss: Loss, statistics: ItemStatistics, tokens: int, place: Place = ALONE) -> "CandidateSource":
        """Create the source from the options, for batches of at most `tokens` targets on the rank at `place`."""

    @abstractmethod
    def draw(self, targets: Int64, rng: np.random.Generator) -> Candidates:
        """Draw the candidates of a batch whose targets are the items `targets` [targets] int64."""


class AllItems(CandidateSource):
    """The whole catalogue, an equal range of ids on each rank: an exact softmax."""

    def __init__(self, items: int, place: Place = ALONE) -> None:
        self.room = self.count = -(-items // place.ranks)
        first, stop = id_range(items, *place)
        # All batches share these arrays: nothing writes into a batch.
        bags = np.arange(stop - first)
        log_q = np.zeros(bags.size, dtype=np.float32)
        self.candidates = Candidates(bags + first if first else bags, log_q, bags, shared=place.ranks > 1)

    @classmethod
    def make(cls, loss: Loss, statistics: ItemStatistics, tokens: int, place: Place = ALONE) -> "AllItems":
        """See `CandidateSource`."""
        return cls(statistics.items, place)

    def draw(self, targets: Int64, rng: np.random.Generator) -> Candidates:
        """See `CandidateSource`."""
        return self.candidates


class Sampled(CandidateSource):
    """Negatives drawn for the whole batch, without replacement; the same on all ranks, or shared by them."""

    def __init__(self, distribution: "Distribution", shared_at: Place = ALONE) -> None:
        """
        Args:
            distribution: of a rank's negatives.
            shared_at: the rank, where each draws its own negatives for the targets of all. An item may then be drawn
                by several, and is expected as many times as often.
        """
        self.distribution = distribution
        self.room = self.count = distribution.count
        self.ranks = shared_at.ranks
        self.seed = (shared_at.rank,) if shared_at.ranks > 1 else ()

    @classmethod
    def make(cls, loss: Loss, statistics: ItemStatistics, tokens: int, place: Place = ALONE) -> "Sampled":
        """See `CandidateSource`."""
        shared_at = place if loss.crosses_ranks(place.ranks) else ALONE
        return cls(DISTRIBUTIONS[loss.negatives_by].make(statistics, loss.negatives), shared_at)

    def draw(self, targets: Int64, rng: np.random.Generator) -> Candidates:
        """See `CandidateSource`."""
        ids, log_q = self.distribution.draw(rng)
        if self.ranks == 1:
            return Candidates(ids, log_q)
        order = np.argsort(ids)
        return Candidates(ids[order], log_q[order] + np.float32(np.log(self.ranks)), shared=True)


class InBatch(CandidateSource):
    """The distinct targets of the batch, each with the probability that it is among those of all ranks."""

    def __init__(self, counts: Int64, tokens: int, ranks: int = 1) -> None:
        self.count, self.ranks, self.ever = min(tokens, counts.size), ranks, counts > 0
        # log(1 - (1 - p) ** tokens) in one array, where there may be a hundred million items.
        values = np.maximum(counts, 0.5)
        values /= max(counts.sum(), 1)
        np.minimum(values, 1 - 1e-9, out=values)
        np.log1p(np.negative(values, out=values), out=values)
        np.expm1(np.multiply(values, tokens * ranks, out=values), out=values)
        np.log(np.negative(values, out=values), out=values)
        self.log_q = values.astype(np.float32)
        """[items] float32: log of the probability that an item is among `tokens` targets of each rank."""

    @classmethod
    def make(cls, loss: Loss, statistics: ItemStatistics, tokens: int, place: Place = ALONE) -> "InBatch":
        """See `CandidateSource`."""
        return cls(statistics.counts(), tokens, place.ranks)

    def draw(self, targets: Int64, rng: np.random.Generator) -> Candidates:
        """See `CandidateSource`."""
        ids = np.unique(targets)
        return Candidates(ids, self.log_q[ids], shared=self.ranks > 1)


SOURCES: dict[str, type[CandidateSource]] = {"all": AllItems, "sampled": Sampled, "in_batch": InBatch, "bce": Sampled}
"""By the value of `--loss.candidates`; `bce` takes each target's negatives from those drawn for the batch."""


class Distribution(ABC):
    """A distribution from which negatives are drawn without replacement."""

    count: int
    """Number of negatives per batch."""

    @classmethod
    @abstractmethod
    def make(cls, statistics: ItemStatistics, count: int) -> "Distribution":
        """Create one that draws `count` negatives, or all items where there are fewer."""

    @abstractmethod
    def draw(self, rng: np.random.Generator) -> tuple[Int64, Float32]:
        """Draw ids [count] int64, all distinct, and log of the expected count of each [count] float32."""


class Uniform(Distribution):
    """All items are equally likely; the expected count is `count / items`."""

    def __init__(self, items: int, count: int) -> None:
        self.items, self.count = items, min(count, items)

    @classmethod
    def make(cls, statistics: ItemStatistics, count: int) -> "Uniform":
        """See `Distribution`."""
        return cls(statistics.items, count)

    def draw(self, rng: np.random.Generator) -> tuple[Int64, Float32]:
        """See `Distribution`."""
        # O(count): where 50 times as many items are left, numpy runs Floyd's algorithm, which does not list them.
        ids = rng.choice(self.items, self.count, replace=False, shuffle=False).astype(np.int64)
        return ids, np.full(self.count, np.log(self.count / self.items), dtype=np.float32)


class LogUniform(Distribution):
    """The probability is proportional to log((rank + 2) / (rank + 1)) of the item's popularity rank (Zipf), from 0.

    Word2vec-style trainers use it. Duplicates are drawn again until `count` ids are distinct; the expected count is
    1 - (1 - p) ** tries.
    """

    def __init__(self, counts: Int64, count: int) -> None:
        dtype = np.int32 if counts.size < 2**31 else np.int64
        self.by_rank = np.argsort(-counts, kind="stable").astype(dtype)
        """[items] int32, or int64 where there are more: the items from the most popular on."""
        self.count = min(count, counts.size)

    @classmethod
    def make(cls, statistics: ItemStatistics, count: int) -> "LogUniform":
        """See `Distribution`."""
        return cls(statistics.counts(), count)

    def draw(self, rng: np.random.Generator) -> tuple[Int64, Float32]:
        """See `Distribution`."""
        items = self.by_rank.size
        ranks, tries = np.zeros(0, dtype=np.int64), 0
        while ranks.size < self.count:
            draws = np.exp(rng.random(max(self.count, 16)) * np.log(items + 1)).astype(np.int64) - 1
            drawn = np.concatenate([ranks, draws.clip(0, items - 1)])
            firsts = first_places(drawn)[: self.count]
            # Only the tries up to the one that completes the ids count.
            tries += (firsts[-1] + 1 if firsts.size == self.count else drawn.size) - ranks.size
            ranks = drawn.take(firsts)
        p = np.log((ranks + 2) / (ranks + 1)) / np.log(items + 1)
        expected = -np.expm1(tries * np.log1p(-np.minimum(p, 1 - 1e-12)))
        return self.by_rank[ranks].astype(np.int64), np.log(expected).astype(np.float32)


def first_places(values: Int64) -> Int64:
    """Where each distinct value of `values` [n] int64 comes first, ascending; values are below 2^63 / 2n."""
    bits = max(values.size - 1, 1).bit_length()
    ordered = np.sort(values << bits | np.arange(values.size))  # by value, then by place
    is_first = np.ones(values.size, dtype=bool)
    np.not_equal(ordered[1:] >> bits, ordered[:-1] >> bits, out=is_first[1:])
    return np.sort(ordered[is_first] & ((1 << bits) - 1))


DISTRIBUTIONS: dict[str, type[Distribution]] = {"uniform": Uniform, "log_uniform": LogUniform}
"""By the value of `--loss.negatives_by`."""


def candidate_source(
    loss: Loss, dataset: "Dataset", batch: Batch, rank: int = 0, world_size: int = 1
) -> CandidateSource:
    """The source of a rank's candidates for a loss, in training on a dataset."""
    statistics = ItemStatistics(dataset.manifest.items, lambda: training_counts(dataset))
    return SOURCES[loss.candidates].make(loss, statistics, batch.tokens, Place(rank, world_size))


def training_counts(dataset: "Dataset") -> Int64:
    """[items] int64: number of interactions per item in the training part, from the dataset's `items/` parts."""
    from recgpt_torchrec.data.reading.counts import read_counts

    return read_counts(dataset, 0, dataset.manifest.items)
