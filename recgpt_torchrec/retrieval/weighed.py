"""Items that compete with another score than the model's: those of a history, and its neighbours."""

from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from recgpt_torchrec.data.ragged import Float32, Int64, Ragged


class Weighed(NamedTuple):
    """Items of some users, and what is added to their scores, for every interest of the user.

    Example: `Weighed(seen, -1.5).beside(neighbours.of(seen))`
    """

    items: Ragged
    """By user; without repeats where each has a value of its own."""
    values: float | Float32
    """Added to their scores: the same for all, or [entries] float32."""

    @property
    def is_zero(self) -> bool:
        """Whether nothing is added to any score."""
        return not isinstance(self.values, np.ndarray) and self.values == 0

    def take(self, users: Int64) -> Self:
        """Those of the users with these numbers, in this order; one may occur twice."""
        if not isinstance(self.values, np.ndarray):
            return self._replace(items=self.items.take(users))
        values = self.items.with_values(self.values).take(users).values
        return self._replace(items=self.items.take(users), values=values)

    def renamed(self, items: Ragged, kept: npt.NDArray[np.bool_]) -> Self:
        """The entries `kept` [entries] bool, under other ids, which `items` has for these alone."""
        return self._replace(
            items=items, values=self.values[kept] if isinstance(self.values, np.ndarray) else self.values
        )

    def beside(self, other: "Weighed | None") -> "Weighed":
        """These and others of the same users, each item once, with the sum of its values."""
        if other is None or other.is_zero:
            return self
        ids = 1 + max((int(each.items.values.max()) for each in (self, other) if each.items.values.size), default=0)
        pairs = [each._distinct(ids) for each in (self, other)]
        keys, values = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
        keys, places = np.unique(keys, return_inverse=True)
        lengths = np.bincount(keys // ids, minlength=self.items.rows)
        return Weighed(Ragged.from_lengths(keys % ids, lengths), np.bincount(places, values).astype(np.float32))

    def _distinct(self, ids: int) -> tuple[Int64, Float32]:
        """Each pair of a user and an item as one number, and its value; items are less than `ids`."""
        keys = self.items.owners * ids + self.items.values
        if isinstance(self.values, np.ndarray):
            return keys, self.values
        keys = np.unique(keys)
        return keys, np.full(keys.size, self.values, np.float32)
