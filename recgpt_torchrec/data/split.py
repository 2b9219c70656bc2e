"""Leave one out, in the one place that knows it: which items of a user are trained on, and which is the target.

    training     items[:-2]                           all items of a user with fewer than three
    validation   history items[:-2], target items[-2]
    test         history items[:-1], target items[-1]   (the history holds the validation item)

A user with fewer than three items has no validation and no test target. Every part is a prefix of the user's
sequence, so the split is arithmetic on offsets and holds for every column that goes with the items (timestamps,
segments). Knows nothing of files, batches or models.
"""

from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recgpt_torchrec.data.segments import INTERACTED

Int64 = npt.NDArray[np.int64]
SplitName = Literal["validation", "test"]

FEWEST_ITEMS = 3
"""A user with fewer items is not held out: one item each for history, validation and test."""


class ItemLists(NamedTuple):
    """One list of ids a user, jagged: list i is `values[offsets[i]:offsets[i + 1]]`."""

    values: Int64
    """[items] int64"""
    offsets: Int64
    """[users + 1] int64, from 0 to the number of values"""

    @property
    def users(self) -> int:
        """Number of lists."""
        return len(self.offsets) - 1


class HeldOut(NamedTuple):
    """The users of a batch that have a target: positions into the batch's lists, nothing copied.

    Example: the test targets are `values[test(offsets).target]`.
    """

    row: Int64
    """[held out users] which list of the batch"""
    start: Int64
    """[held out users] the history is `values[start:stop]`"""
    stop: Int64
    target: Int64
    """[held out users] the target is `values[target]`"""


def training(offsets: npt.ArrayLike) -> tuple[Int64, Int64]:
    """Where each user's training items lie: `values[start:stop]`.

    Args:
        offsets: [users + 1] int64, of one jagged column.

    Returns:
        start, stop: [users] int64 each.
    """
    start, stop = _bounds(offsets)
    return start, np.where(stop - start >= FEWEST_ITEMS, stop - 2, stop)


def validation(offsets: npt.ArrayLike) -> HeldOut:
    """History `items[:-2]` and target `items[-2]` of every user with at least three items."""
    return _held_out(offsets, from_end=2)


def test(offsets: npt.ArrayLike) -> HeldOut:
    """History `items[:-1]`, validation item included, and target `items[-1]`, of users with three items or more."""
    return _held_out(offsets, from_end=1)


test.__test__ = False  # type: ignore[attr-defined]  # pytest would collect the name wherever it is imported


def held_out(offsets: npt.ArrayLike, split: SplitName) -> HeldOut:
    """`validation` or `test`, by name."""
    if split not in ("validation", "test"):
        raise ValueError(f"split is {split!r}; it must be 'validation' or 'test'")
    return validation(offsets) if split == "validation" else test(offsets)


class Interacted(NamedTuple):
    """The interacted entries (segment 0) among all entries of some users, so that the split can count them alone."""

    places: Int64
    """[interacted] where each lies among all entries."""
    offsets: Int64
    """[users + 1] of the users' lists of interacted entries."""

    @classmethod
    def among(cls, offsets: npt.ArrayLike, segments: npt.NDArray[Any] | None) -> "Interacted":
        """Find them; `segments` [entries], None: all entries were interacted with."""
        offsets = np.asarray(offsets, np.int64)
        if segments is None:
            return cls(np.arange(offsets[-1], dtype=np.int64), offsets)
        (places,) = np.nonzero(segments == INTERACTED)
        return cls(places.astype(np.int64, copy=False), np.searchsorted(places, offsets).astype(np.int64))

    def entries(self, stop: Int64) -> Int64:
        """The end, among all entries, of the history that ends before interacted entry `stop` [n]: its last one + 1."""
        return self.places[stop - 1] + 1


def take(values: npt.NDArray[Any], start: Int64, stop: Int64) -> ItemLists:
    """Copy the ranges `values[start[i]:stop[i]]` into lists of their own.

    Args:
        values: [items], any dtype.
        start, stop: [users] int64.
    """
    lengths = stop - start
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    where = np.arange(offsets[-1]) + np.repeat(start - offsets[:-1], lengths)
    return ItemLists(values[where], offsets)


def item_lists(column: pa.ListArray | pa.LargeListArray | pa.ChunkedArray) -> ItemLists:
    """An Arrow list column of ids as int64 values and offsets from 0, without a copy where Arrow allows it.

    Raises:
        ValueError: a list or an id is null.
    """
    values, offsets = lists_of(column)
    return ItemLists(values.astype(np.int64, copy=False), offsets)


def lists_of(column: pa.ListArray | pa.LargeListArray | pa.ChunkedArray) -> tuple[npt.NDArray[Any], Int64]:
    """Any Arrow list column of numbers as values of their own dtype and int64 offsets from 0.

    Raises:
        ValueError: a list or an id is null.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # combine_chunks of no chunks
        array = pa.array([], array.type)
    if array.null_count:
        raise ValueError(f"{array.null_count} of {len(array)} lists are null; a user without items has an empty list")
    offsets = array.offsets.to_numpy().astype(np.int64)
    values = array.values.slice(offsets[0], offsets[-1] - offsets[0])
    if values.null_count:
        raise ValueError(f"{values.null_count} ids are null")
    return values.to_numpy(), offsets - offsets[0]


def _bounds(offsets: npt.ArrayLike) -> tuple[Int64, Int64]:
    offsets = np.asarray(offsets, np.int64)
    if offsets.ndim != 1 or not len(offsets):
        raise ValueError(f"offsets must be [users + 1], not of shape {list(offsets.shape)}")
    return offsets[:-1], offsets[1:]


def _held_out(offsets: npt.ArrayLike, from_end: int) -> HeldOut:
    start, stop = _bounds(offsets)
    (row,) = np.nonzero(stop - start >= FEWEST_ITEMS)
    target = stop[row] - from_end
    return HeldOut(row.astype(np.int64, copy=False), start[row], target, target)
