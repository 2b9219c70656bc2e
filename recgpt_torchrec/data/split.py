"""Leave one out: which of a user's interactions are trained on, and which one is held out.

    training     items[:-2]                             all items of a user with fewer than three
    validation   history items[:-2], target items[-2]
    test         history items[:-1], target items[-1]   (the history holds the validation item)
    all          the whole history, nothing held out    (what export encodes)

A user with fewer than three items has no validation and no test target. Every part is a prefix of the user's
interactions, so a split is arithmetic on offsets and holds for every column beside the items. The only place that knows
a split; it knows nothing of files, batches or models.
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
"""Where the target is, counted from the end of the history."""
HELD_OUT = 2
"""Interactions at a history's end that are not trained on."""
FEWEST_ITEMS = 3
"""A user with fewer items is not held out: one item each for history, validation and test."""


class Cut(NamedTuple):
    """What of some users' interactions a split reads: places among all interactions, nothing copied."""

    row: Int64
    """[rows] number of the user; those whom the split does not read are left out."""
    start: Int64
    """[rows] the history is `start:stop`."""
    stop: Int64
    target: Int64 | None
    """[rows] place of the held-out item; None where the split holds nothing out."""


def cut(offsets: npt.ArrayLike, split: SplitName) -> Cut:
    """Cut users' interactions for a split.

    Args:
        offsets: [users + 1] int64 of the ragged list of interactions.
        split: its name.

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
    """Whether an interaction is in the training part: of arrays as of columns of a query.

    Args:
        from_end: interactions of the same user after it.
        length: interactions of the user.
    """
    return (from_end >= HELD_OUT) | (length < FEWEST_ITEMS)
