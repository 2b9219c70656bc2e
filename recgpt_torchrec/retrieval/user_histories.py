"""Histories of users by id, read from a dataset on demand; only a few row groups are held."""

import numpy as np

from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.histories import Histories, join, no_histories
from recgpt_torchrec.data.reading.histories import HistoryReader
from recgpt_torchrec.data.split import SplitName
from recgpt_torchrec.data.windows import row_groups, user_bounds
from recgpt_torchrec.errors import InputError


class UserHistories:
    """What users interacted with before the held-out item of a split.

    Users in about the dataset's order, as in an export, need each row group once.

    Example: `seen = UserHistories(dataset, "test").of(np.array([3, 1])).seen`

    Args:
        dataset: of histories, with or without prompts.
        split: `all`, `validation` or `test`, see `data.split`.
    """

    KEPT = 8
    """Number of row groups held besides those of the current call."""

    def __init__(self, dataset: Dataset, split: SplitName) -> None:
        self.dataset = dataset
        self.reader = HistoryReader(dataset=dataset, split=split, max_len=1)
        self.groups = row_groups(dataset)
        bounds = [user_bounds(dataset, group) for group in self.groups]
        self.low, self.high = np.array(bounds, dtype=np.int64).reshape(-1, 2).T
        """[row groups] smallest and largest user id of each."""
        self._read: dict[int, Histories] = {}

    def of(self, users: np.ndarray) -> Histories:
        """The histories of `users` [n] int64, in that order: `seen`, and `held_out` where the split has one.

        Raises:
            InputError: a user has no history, or no held-out item.
        """
        if not users.size:
            return no_histories()
        needed = [
            number
            for number, (low, high) in enumerate(zip(self.low, self.high, strict=True))
            if low <= users.max() and high >= users.min() and np.any((users >= low) & (users <= high))
        ]
        histories = join([self._read_group(number) for number in needed])
        for number in [number for number in self._read if number not in needed][: -self.KEPT]:
            del self._read[number]
        order = np.argsort(histories.users, kind="stable")
        row = order
        if order.size:
            row = order[np.minimum(np.searchsorted(histories.users[order], users), order.size - 1)]
        missing = users[histories.users[row] != users] if order.size else users
        if missing.size:
            raise InputError(
                f"{self.dataset.path} has no {self.reader.split} history of user {missing[0]}: the export is of "
                "another dataset, or this one has changed since; export again"
            )
        return histories.reorder(row)

    def _read_group(self, number: int) -> Histories:
        if number not in self._read:
            self._read[number] = self.reader.read([self.groups[number]])
        return self._read[number]
