"""The neighbours of all items in memory: one copy for the ranks and loader processes of a node."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.neighbours.folder import NeighboursManifest, open_neighbours
from recgpt_torchrec.data.ragged import Ragged, to_numpy
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.storage import filesystem, raise_storage_failure
from recgpt_torchrec.storage.buffers import Buffer, Fill, fill_in_memory
from recgpt_torchrec.storage.parts import Part, open_part

ROWS = 65_536
"""Rows that are read at once."""
NONE = -1
"""In place of an id: there are no more neighbours."""
Read = Callable[[str, int, Fill, float, str], Buffer]
"""Makes a buffer and has it filled: see `distributed.shared_folder.read_on_node`."""


@dataclass(frozen=True)
class NeighbourTable:
    """The neighbours of every item. Pickled for another process, it travels as its buffer does."""

    ids: npt.NDArray[np.int32]
    """[items, count] int32, best first; `NONE` where there are no more."""
    scores: npt.NDArray[np.float32]
    """[items, count] float32, see `data.neighbours.pairs`; 0 where there are no more."""
    buffer: Buffer
    """What they are views of."""

    @property
    def items(self) -> int:
        """Number of items that it knows."""
        return len(self.ids)

    @classmethod
    def open(cls, path: str, manifest: NeighboursManifest, read: Read = fill_in_memory) -> "NeighbourTable":
        """Read the neighbours in a folder.

        Args:
            path: of the folder.
            manifest: of it.
            read: makes the buffer that holds them, and has it filled; by default in this process's memory.

        Raises:
            InputError: a part is damaged; names the part, and what is wrong with it.
        """
        shape = manifest.items, manifest.count

        def fill(content: npt.NDArray[np.uint8], advance: Callable[[float], None]) -> None:
            table = cls.view(shape, content)
            table[0].fill(NONE)
            row = 0
            for part in manifest.parts:
                row = _fill_part(path, part, table, row, advance)

        buffer = read("neighbours", 8 * manifest.items * manifest.count, fill, manifest.items, "items")
        return cls(*cls.view(shape, buffer.bytes), buffer)

    @classmethod
    def of_dataset(cls, path: str, dataset: Dataset, read: Read = fill_in_memory) -> "NeighbourTable":
        """Check that a folder's neighbours are of a dataset, and read them; see `open_neighbours` and `open`."""
        return cls.open(path, open_neighbours(path, dataset), read)

    @staticmethod
    def view(
        shape: tuple[int, int], content: npt.NDArray[np.uint8]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Ids and scores in a buffer [8 items count] uint8: the ids, then the scores."""
        half = content.size // 2
        return content[:half].view(np.int32).reshape(shape), content[half:].view(np.float32).reshape(shape)

    def __reduce__(self) -> Any:
        return _of_buffer, (self.ids.shape, self.buffer)


def _of_buffer(shape: tuple[int, int], buffer: Buffer) -> NeighbourTable:
    return NeighbourTable(*NeighbourTable.view(shape, buffer.bytes), buffer)


def _fill_part(
    path: str,
    part: Part,
    table: tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]],
    row: int,
    advance: Callable[[float], None],
) -> int:
    """Read a part into the rows of a table from `row` on; returns the number of the row after it.

    Raises:
        InputError: it is damaged.
    """
    fs, root = filesystem(path)
    try:
        with open_part(fs, root, part) as file:
            for batch in file.iter_batches(ROWS, columns=["item_id", "neighbour_ids", "scores"]):
                row = _fill_rows(batch, table, row)
                advance(batch.num_rows)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise_storage_failure(error, f"{path}/{part.path}")
        reason = " ".join(str(error).split())
        remedy = "restore the file or run find_neighbours again into a new folder"
        raise InputError(f"{path}: the part {part.path} is damaged ({reason}); {remedy}") from None
    return row


def _fill_rows(batch: pa.RecordBatch, table: tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]], row: int) -> int:
    """Put the rows of a batch into a table, from `row` on; returns the number of the row after them.

    Raises:
        ValueError: what is wrong with them.
    """
    (items, count), stop = table[0].shape, row + batch.num_rows
    if stop > items or not np.array_equal(to_numpy(batch["item_id"].cast(pa.int64())), np.arange(row, stop)):
        raise ValueError(f"its item ids are not in order from {row:,} on")
    ids = Ragged.from_arrow(batch["neighbour_ids"].cast(pa.list_(pa.int64())))
    scores = Ragged.from_arrow(batch["scores"].cast(pa.list_(pa.float32())))
    if not np.array_equal(ids.offsets, scores.offsets) or int(ids.lengths.max(initial=0)) > count:
        raise ValueError(f"a row has more than {count} neighbours, or not a score for each")
    if ids.values.size and not (0 <= ids.values.min() and ids.values.max() < items):
        raise ValueError(f"it has a neighbour whose id is not from 0 to {items - 1}")
    if not (np.isfinite(scores.values).all() and (scores.values > 0).all()):
        raise ValueError("it has a score that is not more than 0")
    if ((np.diff(scores.values) > 0) & (np.diff(scores.owners) == 0)).any():
        raise ValueError("a row's neighbours are not best first")
    if (ids.values == row + ids.owners).any():
        raise ValueError("it has an item that is its own neighbour")
    rows, places = row + ids.owners, np.arange(ids.values.size) - np.repeat(ids.offsets[:-1], ids.lengths)
    table[0][rows, places], table[1][rows, places] = ids.values, scores.values
    return stop
