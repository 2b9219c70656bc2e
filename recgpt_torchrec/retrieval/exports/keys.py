"""Raw keys of dense ids, or another text about them, read from a dataset's vocabulary on demand."""

import numpy as np
import pyarrow as pa

from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.ragged import Int64
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.storage.parts import Part


class Keys:
    """Raw keys of dense ids, read from a dataset's `items/` or `users/` parts on demand.

    Those parts hold ids in order, so an id is its row number. The last few row groups read are cached.

    Example: `Keys(dataset, "items").of(np.array([3, 1]))` is an Arrow string array of two keys.
    """

    KEPT = 4

    def __init__(self, dataset: Dataset, kind: str, column: str = "key") -> None:
        """
        Args:
            dataset: with the parts.
            kind: `items` or `users`.
            column: of text; of any but `key` values may be null.
        """
        if kind not in ("items", "users"):
            raise ValueError(f"kind is {kind!r}; it must be 'items' or 'users'")
        self.dataset, self.kind, self.column = dataset, kind, column
        self.parts = dataset.manifest.item_parts if kind == "items" else dataset.manifest.user_parts
        self.groups: list[tuple[Part, int]] = []
        rows = [0]
        for part in self.parts:
            with dataset.read_part(part) as file:
                for group in range(file.num_row_groups):
                    self.groups.append((part, group))
                    rows.append(rows[-1] + file.metadata.row_group(group).num_rows)
        self.first = np.array(rows)
        """[row groups + 1] int64: first id of each row group, and the number of ids."""
        self._read: dict[int, pa.ChunkedArray] = {}

    def of(self, ids: Int64) -> pa.Array:
        """[n] string keys of `ids` [n] int64.

        Raises:
            InputError: the dataset has no such id.
        """
        if len(ids) and (ids.min() < 0 or ids.max() >= self.first[-1]):
            raise InputError(
                f"{self.dataset.path} has {self.first[-1]} {self.kind}, but ids run from {ids.min()} to {ids.max()}; "
                "give the dataset that the checkpoint was trained on"
            )
        if not len(ids):
            return pa.array([], pa.string())
        if len(ids) == ids[-1] - ids[0] + 1 and (np.diff(ids) == 1).all():
            return self._in_order(int(ids[0]), int(ids[-1]) + 1)
        group = np.searchsorted(self.first, ids, side="right") - 1
        arrays, order = [], []
        for index in (group.min() + np.flatnonzero(np.bincount(group - group.min()))).tolist():
            (rows,) = np.nonzero(group == index)
            arrays.append(self._read_group(index).take(pa.array(ids[rows] - self.first[index])))
            order.append(rows)
        keys = pa.chunked_array([chunk for array in arrays for chunk in array.chunks], pa.string())
        return keys.take(pa.array(np.argsort(np.concatenate(order)))).combine_chunks()

    def _in_order(self, start: int, stop: int) -> pa.Array:
        """The keys of the ids `start` to `stop` - 1, as an id range is exported: nothing is looked for."""
        groups = range(*(np.searchsorted(self.first, (start, stop - 1), side="right") - (1, 0)).tolist())
        slices = [
            self._read_group(index).slice(max(start - self.first[index], 0), stop - max(start, self.first[index]))
            for index in groups
        ]
        return pa.chunked_array([chunk for array in slices for chunk in array.chunks], pa.string()).combine_chunks()

    def _read_group(self, index: int) -> pa.ChunkedArray:
        if index not in self._read:
            part, group = self.groups[index]
            with self.dataset.read_part(part) as file:
                columns = [f"{self.kind[:-1]}_id", self.column]
                table = file.read_row_group(group, columns=columns).select(columns)
                table = table.set_column(1, self.column, table[self.column].cast(pa.string()))
            expected = np.arange(self.first[index], self.first[index + 1])
            if not np.array_equal(table.column(0).to_numpy(), expected):
                raise InputError(
                    f"{self.dataset.path}: {part.path}, row group {group}: ids are not the dense ids from "
                    f"{expected[0]} to {expected[-1]} in order; restore the file or run prepare again"
                )
            if self.column == "key" and table.column(1).null_count:
                raise InputError(
                    f"{self.dataset.path}: {part.path}, row group {group}: a key is null; restore the file or run "
                    "prepare again"
                )
            self._read[index] = table.column(1)
            while len(self._read) > self.KEPT:
                del self._read[next(iter(self._read))]
        return self._read[index]
