"""A ragged list: rows of different lengths as one array of values and the offsets between them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # packing, and so the dense part of the model, does not need Arrow
    import pyarrow as pa

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
ListColumn: TypeAlias = Union["pa.ListArray", "pa.LargeListArray", "pa.ChunkedArray"]


@dataclass(frozen=True)
class Ragged:
    """Row i is `values[offsets[i]:offsets[i + 1]]`.

    Example: `Ragged.from_lists([[5, 6], [], [7]]).take(np.array([2, 0]))` holds the rows [7] and [5, 6].
    """

    values: npt.NDArray[Any]
    """[entries, ...], any dtype."""
    offsets: Int64
    """[rows + 1] int64, from 0 to the number of entries."""

    @classmethod
    def from_lengths(cls, values: npt.NDArray[Any], lengths: npt.NDArray[np.integer]) -> "Ragged":
        """Rows of `lengths` [rows], stored end to end in `values`."""
        return cls(values, offsets_of(lengths))

    @classmethod
    def from_lists(cls, lists: Sequence[Sequence[int]]) -> "Ragged":
        """Rows of int64 from Python lists."""
        values = np.array([value for row in lists for value in row], dtype=np.int64)
        return cls.from_lengths(values, np.array([len(row) for row in lists], dtype=np.int64))

    @classmethod
    def from_arrow(cls, column: ListColumn) -> "Ragged":
        """An Arrow list column of numbers, in its own dtype, without a copy where Arrow allows it.

        Raises:
            ValueError: a list or a value is null.
        """
        rows, null_rows, null_values = read_nullable(column)
        if null_rows.size:
            raise ValueError(f"{null_rows.size} of {rows.rows} lists are null; a user without items has an empty list")
        if null_values.size:
            raise ValueError(f"{null_values.size} values are null")
        return rows

    def to_lists(self) -> list[list[Any]]:
        """The rows as Python lists."""
        return [self.values[a:b].tolist() for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True)]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Int64:
        """[rows] int64 entries of each row."""
        return np.diff(self.offsets)

    @property
    def owners(self) -> Int64:
        """[entries] int64 row of each entry."""
        return np.repeat(np.arange(self.rows), self.lengths)

    def rows_of(self, entries: npt.NDArray[np.integer]) -> npt.NDArray[np.intp]:
        """The row of each entry, given by its index."""
        return np.searchsorted(self.offsets, entries, side="right") - 1

    def with_values(self, values: npt.NDArray[Any]) -> "Ragged":
        """The same rows with other values [entries, ...]."""
        return Ragged(values, self.offsets)

    def keep(self, mask: npt.NDArray[np.bool_]) -> "Ragged":
        """The entries where `mask` [entries] is true, in the same rows."""
        return Ragged(self.values[mask], offsets_of(mask)[self.offsets])

    def part(self, start: int, stop: int) -> "Ragged":
        """The rows `start:stop`, without a copy."""
        first, last = self.offsets[start], self.offsets[stop]
        return Ragged(self.values[first:last], self.offsets[start : stop + 1] - first)

    def take(self, rows: npt.NDArray[np.integer]) -> "Ragged":
        """The rows with these numbers, in this order; one may occur twice."""
        return self.cut(self.offsets[:-1][rows], self.offsets[1:][rows])

    def cut(self, start: Int64, stop: Int64) -> "Ragged":
        """The ranges `values[start[i]:stop[i]]` as rows; both are [n] int64 indices of entries."""
        lengths = stop - start
        offsets = offsets_of(lengths)
        indices = np.arange(offsets[-1]) + np.repeat(start - offsets[:-1], lengths)
        return Ragged(self.values[indices], offsets)


def join(lists: Sequence[Ragged]) -> Ragged:
    """Concatenate the rows of one or more ragged lists."""
    if len(lists) == 1:
        return lists[0]
    lengths = np.concatenate([each.lengths for each in lists])
    return Ragged.from_lengths(np.concatenate([each.values for each in lists]), lengths)


def offsets_of(lengths: npt.NDArray[Any]) -> Int64:
    """[rows + 1] int64: 0, then the running sum of `lengths` [rows]."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def ragged_arange(lengths: npt.NDArray[np.integer]) -> Int64:
    """0, 1, ..., length - 1 for each of `lengths`, end to end, int64."""
    ends = np.cumsum(lengths)
    return np.arange(int(ends[-1]) if lengths.size else 0, dtype=np.int64) - np.repeat(ends - lengths, lengths)


def read_nullable(
    column: ListColumn,
) -> tuple[Ragged, npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Read an Arrow list column of numbers that may have nulls.

    Returns:
        rows: a null list is an empty row, a null value is 0.
        null_rows: indices of the rows that are null.
        null_values: indices of the entries that are null.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    array = _in_one_chunk(column)
    none = np.zeros(0, dtype=np.intp)
    null_rows = np.flatnonzero(array.is_null()) if array.null_count else none
    if null_rows.size:
        array = pc.if_else(array.is_valid(), array, pa.scalar([], array.type))
    offsets = to_numpy(array.offsets).astype(np.int64)
    values = array.values.slice(offsets[0], offsets[-1] - offsets[0])
    null_values = np.flatnonzero(values.is_null()) if values.null_count else none
    if null_values.size:
        values = values.fill_null(0)
    return Ragged(to_numpy(values), offsets - offsets[0]), null_rows, null_values


def to_numpy(column: Union["pa.Array", "pa.ChunkedArray"]) -> npt.NDArray[Any]:
    """An Arrow column of numbers without nulls as a read-only array, without a copy where it has one chunk.

    Arrow's own `to_numpy` first imports pandas where it is installed: in every process that reads a dataset 1.3 s for
    which the first step would wait.
    """
    return np.from_dlpack(_in_one_chunk(column))


def _in_one_chunk(column: Any) -> Any:
    import pyarrow as pa

    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return pa.array([], array.type) if isinstance(array, pa.ChunkedArray) else array  # combine_chunks of no chunks
