"""What a dataset holds: one pass over its sequences and items, in bounded memory."""

import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.inputs.spec import Inputs
from recgpt_torchrec.data.reading.counts import read_counts
from recgpt_torchrec.data.reading.damage import Damage, SetAside
from recgpt_torchrec.data.reading.footers import time_range
from recgpt_torchrec.data.reading.histories import HistoryReader
from recgpt_torchrec.data.windows import row_groups
from recgpt_torchrec.progress import progress_bar

WHOLE = 2**31 - 1
"""Maximum length of a history that is longer than all."""
ITEMS_AT_ONCE = 2**20
"""Items whose counts are read together."""


@dataclass
class Contents:
    """Figures of a dataset."""

    lengths: Counter[int] = field(default_factory=Counter)
    """Number of users by the length of their history."""
    entries: int = 0
    """Interactions of all of them."""
    repeats: int = 0
    """Interactions with an item that comes earlier in the same history."""
    repeats_in_a_row: int = 0
    """Those whose item is that of the interaction before."""
    times: tuple[int, int] | None = None
    """Oldest and newest timestamp; None: there are none."""
    damages: list[Damage] = field(default_factory=list)
    """Rows that cannot be used; a whole part counts once."""
    items: Counter[int] = field(default_factory=Counter)
    """Number of items by their interactions in the training part."""

    @classmethod
    def read(cls, dataset: Dataset) -> "Contents":
        """Read all of a dataset that was opened with `damaged="skip"`."""
        found = cls()
        with tempfile.TemporaryDirectory() as scratch:
            listed = SetAside(str(Path(scratch, "damaged.jsonl")), limit=2**62)
            groups = row_groups(dataset)
            timed = bool(groups) and "timestamps" in dataset.columns
            reader = HistoryReader(
                dataset=dataset,
                split="all",
                max_len=WHOLE,
                set_aside=listed,
                time_order=timed,
                inputs=Inputs(),
            )
            with progress_bar(dataset.manifest.users, "users") as bar:
                for group in groups:
                    histories = reader.read([group])
                    found._add(histories.items, histories.offsets, dataset.manifest.items)
                    bar.update(histories.users.size)
            found.damages = listed.listed()
        listed_parts = {each.part for each in found.damages if each.row_group is None}
        found.damages += [
            Damage(path, None, None, 1, why) for path, why in dataset.lost_parts.items() if path not in listed_parts
        ]
        found.times = time_range(dataset)
        for first in range(0, dataset.manifest.items, ITEMS_AT_ONCE):
            counts = read_counts(dataset, first, min(first + ITEMS_AT_ONCE, dataset.manifest.items))
            found.items.update(
                dict(zip(*(each.tolist() for each in np.unique(counts, return_counts=True)), strict=True))
            )
        return found

    def _add(self, items: np.ndarray, offsets: np.ndarray, catalogue: int) -> None:
        lengths = np.diff(offsets)
        self.lengths.update(dict(zip(*(each.tolist() for each in np.unique(lengths, return_counts=True)), strict=True)))
        self.entries += items.size
        row = np.repeat(np.arange(lengths.size), lengths)
        self.repeats += items.size - np.unique(row * catalogue + items).size
        self.repeats_in_a_row += int(((items[1:] == items[:-1]) & (row[1:] == row[:-1])).sum())

    def length_at(self, share: float) -> int:
        """The length that this share of the users' histories do not exceed; 0: there are none."""
        wanted, reached = share * sum(self.lengths.values()), 0
        for length in sorted(self.lengths):
            reached += self.lengths[length]
            if reached >= wanted:
                return length
        return 0

    def share_longer_than(self, length: int) -> float:
        """Share of the users whose history is longer than `length`."""
        longer = sum(users for each, users in self.lengths.items() if each > length)
        return longer / max(sum(self.lengths.values()), 1)

    @property
    def most_popular(self) -> int:
        """Training interactions of the most popular item."""
        return max(self.items, default=0)

    def items_of_half(self) -> int:
        """Number of the most popular items that have half of the training interactions."""
        left = sum(count * number for count, number in self.items.items()) / 2
        taken = 0
        for count in sorted(self.items, reverse=True):
            if left <= 0 or not count:
                break
            needed = min(self.items[count], int(-(-left // count)))
            taken, left = taken + needed, left - needed * count
        return taken
