"""Histories of users by their ids, read from a dataset where they are wanted; only a few row groups are held."""

import numpy as np

from recgpt_torchrec.config import Batch, Loss
from recgpt_torchrec.data.batch import Sequences, no_sequences
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.split import take
from recgpt_torchrec.data.stream import BatchMaker, joined
from recgpt_torchrec.data.windows import Window, row_groups
from recgpt_torchrec.errors import InputError


class Histories:
    """What users have interacted with before the item that a split holds out.

    Asking for users in about the dataset's order, as an export has them, reads every row group once.

    Example: `values, offsets = Histories(dataset, "test").of(np.array([3, 1])).seen`

    Args:
        dataset: of histories, with or without prompts.
        split: `all`, `validation` or `test`, as in `BatchMaker`.
    """

    KEPT = 8
    """Row groups held beside those that are asked for at the moment."""

    def __init__(self, dataset: Dataset, split: str) -> None:
        self.dataset = dataset
        self.maker = BatchMaker(dataset=dataset, split=split, batch=Batch(tokens=1), loss=Loss(), max_len=1, seed=0)
        self.groups = row_groups(dataset)
        bounds = [self._bounds(group.part, group.group) for group in self.groups]
        self.low, self.high = np.array(bounds, dtype=np.int64).reshape(-1, 2).T
        """[row groups] smallest and largest user id of each."""
        self._read: dict[int, Sequences] = {}

    def _bounds(self, part: int, group: int) -> tuple[int, int]:
        with self.dataset.open_part(self.dataset.manifest.sequences[part]) as file:
            meta = file.metadata
            names = [meta.schema.column(c).path for c in range(meta.num_columns)]
            statistics = meta.row_group(group).column(names.index("user_id")).statistics
        known = statistics is not None and statistics.has_min_max
        return (statistics.min, statistics.max) if known else (0, 2**63 - 1)

    def of(self, users: np.ndarray) -> Sequences:
        """The histories of `users` [n] int64, in that order: `seen`, and `held_out` where the split holds out.

        Raises:
            InputError: a user has none, or nothing held out.
        """
        if not users.size:
            return no_sequences()
        needed = [
            number
            for number, (low, high) in enumerate(zip(self.low, self.high, strict=True))
            if low <= users.max() and high >= users.min() and np.any((users >= low) & (users <= high))
        ]
        found = joined([self._group(number) for number in needed])
        for number in [number for number in self._read if number not in needed][: -self.KEPT]:
            del self._read[number]
        order = np.argsort(found.users, kind="stable")
        row = (
            order[np.minimum(np.searchsorted(found.users[order], users), max(0, order.size - 1))]
            if order.size
            else order
        )
        wrong = users[found.users[row] != users] if order.size else users
        if wrong.size:
            raise InputError(
                f"{self.dataset.path} has no {self.maker.split} history of user {wrong[0]}: the export was made from "
                "another dataset, or from another state of it"
            )
        assert found.seen is not None
        values, offsets = found.seen
        seen = take(values, offsets[row], offsets[row + 1])
        return Sequences(
            users=users,
            items=np.zeros(0, dtype=np.int64),
            offsets=np.zeros(users.size + 1, dtype=np.int64),
            held_out=None if found.held_out is None else found.held_out[row],
            seen=(seen.values, seen.offsets),
        )

    def _group(self, number: int) -> Sequences:
        if number not in self._read:
            window = Window(0, (self.groups[number],))
            self._read[number] = self.maker.sequences_of(window, epoch=0, shuffle=False)
        return self._read[number]
