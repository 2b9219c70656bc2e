"""Readable names of items: a text attribute of the dataset (prepare --item_attributes title:text), read on demand."""

import numpy as np

from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.ragged import Int64
from recgpt_torchrec.retrieval.exports.keys import Keys

PREFIX = "text_"
PREFERRED = ("title", "name")


class ItemNames:
    """The names of items, from the column `text_title` or `text_name`, else from the first text attribute.

    Example: `ItemNames(dataset).of(np.array([3, 1]))`
    """

    def __init__(self, dataset: Dataset) -> None:
        with dataset.read_part(dataset.manifest.item_parts[0]) as file:
            texts = [name.removeprefix(PREFIX) for name in file.schema_arrow.names if name.startswith(PREFIX)]
        self.column = next((name for name in (*PREFERRED, *texts) if name in texts), None)
        """Name of the attribute; None: the dataset has no text of items."""
        self._texts = None if self.column is None else Keys(dataset, "items", f"{PREFIX}{self.column}")

    def of(self, ids: Int64) -> list[str]:
        """The names of `ids` [n] int64; empty where there is none, and of -1."""
        names = np.full(len(ids), "", dtype=object)
        if self._texts is not None:
            known = np.flatnonzero(ids >= 0)
            names[known] = [name or "" for name in self._texts.of(ids[known]).to_pylist()]
        return list(names)
