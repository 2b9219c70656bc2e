"""The leave-one-out split: which of a user's interactions are trained on, and which one is held out.

    training     items[:-2]                             (all items of a user with fewer than three)
    validation   history items[:-2], target items[-2]
    test         history items[:-1], target items[-1]   (the history holds the validation item)
    all          history items                          (what export encodes)

A user with fewer than three items has no validation and no test target. Every history is a prefix of the user's
interactions, so a split is arithmetic on offsets and holds for every column. Only this file defines the split; it knows
nothing of files, batches or models.
"""

from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from recgpt_torchrec.data.ragged import Int64

SplitName = Literal["training", "validation", "test", "all"]
SPLITS = ("training", "validation", "test", "all")
EVALUATION = ("validation", "test")
"""Splits that hold an item out."""
FROM_END = {"validation": 2, "test": 1}
"""Index of the target, counted from the end of the user's items."""
HELD_OUT = 2
"""Number of newest interactions that are not trained on."""
FEWEST_ITEMS = 3
"""Minimum number of items of a user with held-out items: one each for history, validation and test."""


class Cut(NamedTuple):
    """The interactions that a split reads, as int64 indices into all interactions of some users."""

    row: Int64
    """[rows] index of the user; users that the split does not read are left out."""
    start: Int64
    """[rows] start of the history, `start:stop`."""
    stop: Int64
    target: Int64 | None
    """[rows] index of the held-out item; None: the split holds nothing out."""


def cut(offsets: npt.ArrayLike, split: SplitName) -> Cut:
    """Cut users' interactions for a split.

    Args:
        offsets: [users + 1] int64 of the ragged list of interactions.
        split: name of the split.

    Raises:
        ValueError: the split is unknown, or `offsets` is not one-dimensional.

    Example: the test targets of `items` are `items.values[cut(items.offsets, "test").target]`.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    offsets = np.asarray(offsets, np.int64)
    if offsets.ndim != 1 or not len(offsets):
        raise ValueError(f"offsets must be [users + 1], not of shape {list(offsets.shape)}")
    start, stop = offsets[:-1], offsets[1:]
    lengths = stop - start
    if split == "training":
        return Cut(np.arange(lengths.size), start, np.where(lengths >= FEWEST_ITEMS, stop - HELD_OUT, stop), None)
    row = np.flatnonzero(lengths if split == "all" else lengths >= FEWEST_ITEMS)
    if split == "all":
        return Cut(row, start[row], stop[row], None)
    target = stop[row] - FROM_END[split]
    return Cut(row, start[row], target, target)


def is_trained_on(from_end: Any, length: Any) -> Any:
    """Whether an interaction is in the training part; for numpy arrays and for Ibis columns.

    Args:
        from_end: number of later interactions of the same user.
        length: number of interactions of the user.
    """
    return (from_end >= HELD_OUT) | (length < FEWEST_ITEMS)
