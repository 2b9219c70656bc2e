"""The split of users' interactions: which are trained on, and which are held out as validation and test items.

A user's interactions, in the dataset's order, have three parts. `validation` and `test` are where the second and the
third start, and `n` is their number (`Starts`):

    training     interactions 0:validation
    validation   history 0:validation, target `validation`, if 0 < validation < test
    test         history 0:test, target `test`, if 0 < test < n      (the history holds the validation part)
    all          history 0:n                                          (what export encodes)

`prepare --hold_out` says where the parts start:

    last         validation = n - 2 and test = n - 1 where n is at least 3, else n and n
    none         n and n
    time, given, targets  as the dataset stores them (int64 columns `validation_start` and `test_start`)

So a user has at most one target per split: the first interaction of the part, ranked by what was known when the part
began. Every history is a prefix of the user's interactions, so a split is arithmetic on offsets and holds for every
column. Only this file defines the split; it knows nothing of files, batches or models.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from recgpt_torchrec.data.ragged import Int64

SplitName = Literal["training", "validation", "test", "all"]
SPLITS = ("training", "validation", "test", "all")
EVALUATION: tuple[Literal["validation", "test"], ...] = ("validation", "test")
"""Splits that hold an item out."""
HoldOut = Literal["last", "time", "given", "targets", "none"]
STORED = ("time", "given", "targets")
"""Values of `--hold_out` for which the dataset stores where the parts start."""
FROM_END = {"validation": 2, "test": 1}
"""With `last`: index of the target, counted from the end of the user's items."""
FEWEST_ITEMS = 3
"""With `last`: minimum number of items of a user with held-out items, one each for history, validation and test."""
MEANINGS = {
    "last": f"the last two interactions of each user with at least {FEWEST_ITEMS} are held out",
    "time": "interactions from a moment on are held out",
    "given": "the interactions of --validation_input and --test_input are held out",
    "targets": "the last two interactions of each user that are of --target_events are held out",
    "none": "nothing is held out",
}
"""What each value of `--hold_out` means, for messages."""


@dataclass(frozen=True)
class Starts:
    """Where the parts of users' interactions start: indices among each user's interactions, from 0."""

    validation: Int64
    """[users] int64: number of interactions in the training part."""
    test: Int64
    """[users] int64: index of the first interaction of the test part; at least `validation`."""

    @classmethod
    def of(cls, lengths: Int64, hold_out: HoldOut, stored: "Starts | None" = None) -> "Starts":
        """Where the parts start.

        Args:
            lengths: [users] int64 number of interactions.
            hold_out: the dataset's.
            stored: those that the dataset stores, with the values of `STORED`.

        Raises:
            ValueError: `hold_out` is unknown, or `stored` is missing.
        """
        if hold_out in STORED and stored is not None:
            return stored
        if hold_out == "none":
            return cls(lengths, lengths)
        if hold_out != "last":
            raise ValueError(
                f"hold_out is {hold_out!r}; it must be last or none, or time, given or targets with stored starts"
            )
        has_held_out = lengths >= FEWEST_ITEMS
        validation, test = (lengths - has_held_out * FROM_END[split] for split in EVALUATION)
        return cls(validation, test)

    def has_target(self, split: SplitName, lengths: Int64) -> npt.NDArray[np.bool_]:
        """[users] bool: whether users of `lengths` [users] interactions have a target in `validation` or `test`."""
        start, stop = (self.validation, self.test) if split == "validation" else (self.test, lengths)
        return (start > 0) & (start < stop)


class Cut(NamedTuple):
    """The interactions that a split reads, as int64 indices into all interactions of some users."""

    row: Int64
    """[rows] index of the user; users that the split does not read are left out."""
    start: Int64
    """[rows] start of the history, `start:stop`."""
    stop: Int64
    target: Int64 | None
    """[rows] index of the held-out item; None: the split holds nothing out."""

    def keep(self, mask: npt.NDArray[np.bool_]) -> "Cut":
        """The rows at which `mask` [rows] is true."""
        target = None if self.target is None else self.target[mask]
        return Cut(self.row[mask], self.start[mask], self.stop[mask], target)


def cut(offsets: npt.ArrayLike, split: SplitName, hold_out: HoldOut = "last", stored: Starts | None = None) -> Cut:
    """Cut users' interactions for a split.

    Args:
        offsets: [users + 1] int64 of the ragged list of interactions.
        split: name of the split.
        hold_out: what the dataset holds out.
        stored: where the parts start, for datasets that store it.

    Raises:
        ValueError: the split is unknown, `offsets` is not one-dimensional, or see `Starts.of`.

    Example: the test targets of `items` are `items.values[cut(items.offsets, "test").target]`.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    offsets = np.asarray(offsets, np.int64)
    if offsets.ndim != 1 or not len(offsets):
        raise ValueError(f"offsets must be [users + 1], not of shape {list(offsets.shape)}")
    start, stop = offsets[:-1], offsets[1:]
    lengths = stop - start
    if split == "all":
        row = np.flatnonzero(lengths)
        return Cut(row, start[row], stop[row], None)
    starts = Starts.of(lengths, hold_out, stored)
    if split == "training":
        return Cut(np.arange(lengths.size), start, start + starts.validation, None)
    row = np.flatnonzero(starts.has_target(split, lengths))
    target = (start + (starts.validation if split == "validation" else starts.test))[row]
    return Cut(row, start[row], target, target)


def is_held_out(from_end: Any, length: Any, split: str) -> Any:
    """With `last`: whether an interaction is at or after the target of `split`; for numpy arrays and Ibis columns.

    Args:
        from_end: number of later interactions of the same user.
        length: number of interactions of the user.
        split: `validation` or `test`.
    """
    return (from_end < FROM_END[split]) & (length >= FEWEST_ITEMS)
