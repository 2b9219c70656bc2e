"""HR and NDCG by groups of users: by how popular the held-out item is in training, and by the length of the history.

The popularity of an item is its number of training interactions. Groups have about equal shares of all training
interactions, so that the head's few items weigh as much as the tail's many; items that were never trained have a group
of their own. Each rank holds the groups of the items of its id range, one byte per item.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from recgpt_torchrec.data.candidates import id_range
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.ragged import Int64
from recgpt_torchrec.data.reading.counts import read_counts
from recgpt_torchrec.distributed.lockstep import raise_first_error
from recgpt_torchrec.distributed.processes import gather_objects, rank, world_size
from recgpt_torchrec.evaluation.holders import ask_holders
from recgpt_torchrec.evaluation.metrics import RankingMetrics, reduce_metrics
from recgpt_torchrec.texts.tables import figures_table

SHARES = 4
"""Number of popularity groups with about equal shares of the training interactions."""
LENGTHS = ((1, 5), (6, 10), (11, 20), (21, 50), (51, None))
"""Smallest and largest number of history items of each group by length; None: no limit."""
COUNTED = 2**16
"""Counts below this are added up in one array; larger ones, of which there are few, are sorted."""
BLOCK = 2**20
"""Items whose counts are looked at together."""
BY_POPULARITY, BY_LENGTH = "by_popularity", "by_length"
PROTOCOLS = ("masked", "unmasked")

Bounds = Sequence[tuple[int, int | None]]
"""Smallest and largest value of each group; None: no limit."""


class UserGroups(NamedTuple):
    """The groups of some users."""

    popularity: Int64
    """[users] int64 index of the group of the held-out item."""
    length: Int64
    """[users] int64 index of the group of the history's length."""


def count_values(counts: Int64) -> tuple[Int64, Int64]:
    """The histogram of some counts: distinct ones [n] int64, ascending, and the number of each [n] int64."""
    of_small, is_large = np.zeros(COUNTED, dtype=np.int64), []
    for block in _blocks(counts):
        small = block < COUNTED
        of_small += np.bincount(block[small], minlength=COUNTED)
        is_large.append(block[~small])
    values = np.flatnonzero(of_small)
    large, of_large = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *is_large]), return_counts=True)
    return np.concatenate([values, large]), np.concatenate([of_small[values], of_large])


def _blocks(counts: Int64) -> list[Int64]:
    """Views of blocks of items: what is computed of counts takes as much memory as they, several times."""
    return [counts[start : start + BLOCK] for start in range(0, counts.size, BLOCK)]


def popularity_bounds(values: Int64, items: Int64) -> list[tuple[int, int]]:
    """Bounds of the popularity groups, the most popular first; a group is left out where no item would be in it.

    Items with equal counts are in one group: that in which the first of their interactions lies.

    Args:
        values: [n] int64 distinct numbers of training interactions, ascending.
        items: [n] int64 number of items with each.
    """
    values, items = values[::-1], items[::-1]
    interactions = values * items
    before = np.cumsum(interactions) - interactions
    group = np.where(values > 0, SHARES * before // max(int(interactions.sum()), 1), SHARES)
    return [(int(some.min()), int(some.max())) for each in np.unique(group) if (some := values[group == each]).size]


class PopularityGroups:
    """The popularity groups of items, each rank holding those of its id range.

    Example: `PopularityGroups.read(dataset).find(histories.held_out)`
    """

    def __init__(self, bounds: list[tuple[int, int]], groups: npt.NDArray[np.int8], items: int) -> None:
        """
        Args:
            bounds: of the groups.
            groups: [own items] int8 group of each item of this rank's id range.
            items: number of items.
        """
        self.bounds, self.groups, self.items = bounds, groups, items

    @classmethod
    def read(cls, dataset: Dataset) -> "PopularityGroups":
        """Read the counts of a dataset's items, and divide the items into groups (collective).

        Raises:
            InputError: the counts cannot be read.
        """
        items, error = dataset.manifest.items, None
        counts = np.zeros(0, dtype=np.int64)
        try:
            counts = read_counts(dataset, *id_range(items, rank(), world_size()))
        except Exception as caught:  # raised here, it would leave the other ranks waiting for this one
            error = caught
        raise_first_error(error)
        parts = gather_objects(count_values(counts))
        values, place = np.unique(np.concatenate([part[0] for part in parts]), return_inverse=True)
        number = np.zeros(values.size, dtype=np.int64)
        np.add.at(number, place, np.concatenate([part[1] for part in parts]))
        bounds = popularity_bounds(values, number)
        # Smallest counts descend from group to group: an item's is the first that does not exceed its count.
        lows = [-low for low, _ in bounds]
        blocks = [np.searchsorted(lows, -block, side="left").astype(np.int8) for block in _blocks(counts)]
        return cls(bounds, np.concatenate([np.zeros(0, dtype=np.int8), *blocks]), items)

    def find(self, items: Int64) -> Int64:
        """[n] int64 groups of this rank's `items` [n] int64: they travel to all ranks, and the holder answers
        (collective)."""
        return ask_holders(items, self.groups, self.items)

    def gather(self) -> npt.NDArray[np.int8]:
        """[items] int8 groups of all items, on every rank (collective)."""
        return np.concatenate(gather_objects(self.groups))


class Grouping:
    """Divides users into groups.

    Example: `Grouping.read(dataset).find(histories.held_out, histories.seen.lengths)`
    """

    def __init__(self, popularity: PopularityGroups) -> None:
        self.popularity = popularity
        self.bounds: dict[str, Bounds] = {BY_POPULARITY: popularity.bounds, BY_LENGTH: LENGTHS}

    @classmethod
    def read(cls, dataset: Dataset) -> "Grouping":
        """Read what it needs of a dataset (collective).

        Raises:
            InputError: see `PopularityGroups.read`.
        """
        return cls(PopularityGroups.read(dataset))

    def find(self, targets: Int64, lengths: Int64) -> UserGroups:
        """The groups of this rank's users (collective).

        Args:
            targets: [users] int64 held-out items.
            lengths: [users] int64 number of items of their histories.
        """
        return UserGroups(self.popularity.find(targets), length_groups(lengths))

    def gather(self) -> Callable[[Int64, Int64], UserGroups]:
        """The same as `find`, with the groups of all items on every rank, so that it asks no other (collective)."""
        groups = self.popularity.gather()
        return lambda targets, lengths: UserGroups(groups[targets].astype(np.int64), length_groups(lengths))


def length_groups(lengths: Int64) -> Int64:
    """[users] int64 index in `LENGTHS` of histories of `lengths` [users] int64 items, at least 1 each."""
    return np.searchsorted([low for low, _ in LENGTHS], lengths, side="right") - 1


class GroupedMetrics:
    """HR and NDCG of one recall path by groups of users, masked and unmasked. Holds sums, as `RankingMetrics` does.

    Example: `grouped.update(grouping.find(targets, lengths), "masked", ranks)` per batch, then `grouped.result()`
    """

    def __init__(self, grouping: Grouping, ks: Sequence[int]) -> None:
        self.grouping, self.ks = grouping, ks
        self._metrics = {
            how: {name: [RankingMetrics(ks) for _ in bounds] for name, bounds in grouping.bounds.items()}
            for how in PROTOCOLS
        }

    def update(self, groups: UserGroups, how: str, ranks: torch.Tensor) -> None:
        """Add a batch.

        Args:
            groups: of its users.
            how: `masked` or `unmasked`.
            ranks: [users] float32 ranks of their held-out items, on CPU.
        """
        for name, index in ((BY_POPULARITY, groups.popularity), (BY_LENGTH, groups.length)):
            for number in np.unique(index).tolist():
                self._metrics[how][name][number].update(ranks[torch.from_numpy(index == number)])

    def result(self) -> dict[str, dict[str, list[dict[str, Any]]]]:
        """The figures over all ranks (collective).

        Returns:
            {"masked": {"by_popularity": [{"from": 7, "to": 90, "users": 12, "HR@5": ...}, ...], "by_length": [...]},
            "unmasked": {...}}: `from` and `to` are the smallest and largest number of training interactions of the
            held-out item, or of items in the history (None: no limit). A group without users has no figures.
        """
        results: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for how, by_name in self._metrics.items():
            results[how] = {}
            for name, metrics in by_name.items():
                lines = results[how][name] = []
                for (low, high), each in zip(self.grouping.bounds[name], metrics, strict=True):
                    figures = each.result() if reduce_metrics(each).users else {}
                    lines.append({"from": low, "to": high, "users": each.users, **figures})
        return results


def group_table(path: str, groups: dict[str, list[dict[str, Any]]]) -> str:
    """The masked figures of a recall path by group, as text; `groups` is the path's "masked" of `GroupedMetrics`."""
    titles = {BY_POPULARITY: "training interactions of the held-out item", BY_LENGTH: "items in the history"}
    lines = []
    for name, rows in groups.items():
        names = [key for key in max(rows, key=len) if key not in ("from", "to", "users")]
        cells = [["", "users", *names]]
        for row in rows:
            if row["users"]:  # a small dataset has none in some groups
                bounds = f"{row['from']:,} or more" if row["to"] is None else f"{row['from']:,} to {row['to']:,}"
                bounds = "never trained" if row["to"] == 0 else bounds
                cells.append([bounds, f"{row['users']:,}", *(f"{row[each]:.4f}" for each in names)])
        lines += [f"\n{path}, masked, by {titles[name]}", figures_table(cells)]
    return "\n".join(lines) + "\n"
