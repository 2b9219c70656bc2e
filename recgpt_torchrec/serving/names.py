"""Readable names of items: a text attribute of the dataset (prepare --item_attributes title:text), read on demand."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.ragged import Int64
from recgpt_torchrec.storage.parts import Part

PREFIX = "text_"
PREFERRED = ("title", "name")
KEPT = 4
"""Number of row groups that are kept."""


class ItemNames:
    """The names of items, from the column `text_title` or `text_name`, else from the first text attribute.

    Example: `ItemNames(dataset).of(np.array([3, 1]))`
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.column: str | None = None
        """Name of the attribute; None: the dataset has no text of items."""
        self._groups: list[tuple[Part, int]] = []
        first = [0]
        for part in dataset.manifest.item_parts:
            with dataset.read_part(part) as file:
                if self.column is None:
                    self.column = _choose([name for name in file.schema_arrow.names if name.startswith(PREFIX)])
                if self.column is None:
                    break
                for group in range(file.num_row_groups):
                    self._groups.append((part, group))
                    first.append(first[-1] + file.metadata.row_group(group).num_rows)
        self._first = np.array(first)
        self._read: dict[int, pa.ChunkedArray] = {}

    def of(self, ids: Int64) -> list[str]:
        """The names of `ids` [n] int64; empty where there is none, and of -1."""
        if self.column is None:
            return [""] * len(ids)
        names = []
        for item in ids.tolist():
            if item < 0:
                names.append("")
                continue
            group = int(np.searchsorted(self._first, item, side="right")) - 1
            name = self._read_group(group)[item - int(self._first[group])].as_py()
            names.append("" if name is None else str(name))
        return names

    def _read_group(self, number: int) -> pa.ChunkedArray:
        if number not in self._read:
            part, group = self._groups[number]
            with self.dataset.read_part(part) as file:
                self._read[number] = file.read_row_group(group, columns=[f"{PREFIX}{self.column}"]).column(0)
            while len(self._read) > KEPT:
                del self._read[next(iter(self._read))]
        return self._read[number]


def _choose(columns: Sequence[str]) -> str | None:
    names = [column.removeprefix(PREFIX) for column in columns]
    return next((name for name in (*PREFERRED, *names) if name in names), None)
