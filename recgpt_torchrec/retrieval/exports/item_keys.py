"""Raw keys of an export's items by id, for lists: read once into files that the operating system maps into memory."""

import os
import tempfile
from contextlib import ExitStack

import numpy as np
import pyarrow as pa

from recgpt_torchrec.data.ragged import Int64
from recgpt_torchrec.distributed.lockstep import raise_first_error
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.retrieval.exports.reading import Export
from recgpt_torchrec.storage import find_storage_failure, other_scratch, scratch_beside


class ItemKeys:
    """The keys of all items of an export, in a scratch folder on a local disk; `close` removes it.

    A process holds no key in memory of its own: what it looks up comes from mapped pages, which the system may drop.

    Example:
        with ItemKeys(export, "lists/mine") as keys:
            keys.of(np.array([3, 1]))
    """

    def __init__(self, export: Export, output: str) -> None:
        """Read the keys of `export` into a folder beside `output`, or into the machine's temporary folder (collective).

        Raises:
            InputError: on every rank, where a part cannot be read, an item is missing, or the disk is full for one.
        """
        failure: Exception | None = None
        with ExitStack() as resources:
            try:
                folder = tempfile.TemporaryDirectory(prefix=".keys-", dir=scratch_beside(output))
                self._load(export, resources.enter_context(folder))
            except OSError as error:
                failure = find_storage_failure(error, scratch_beside(output), "keep keys in") or InputError(
                    f"keys cannot be kept in {scratch_beside(output)}: {error}; free space there, or "
                    f"{other_scratch(output)}"
                )
            except Exception as error:
                failure = error
            raise_first_error(failure)
            self._resources = resources.pop_all()

    def _load(self, export: Export, folder: str) -> None:
        items = export.manifest.items
        ends, text, rows = (os.path.join(folder, name) for name in ("ends", "text", "rows"))
        with open(rows, "wb") as rows_file:
            os.posix_fallocate(rows_file.fileno(), 0, 8 * items)  # a full disk is an error here, not a fault at a page
        self._rows = np.memmap(rows, np.int64, "r+", shape=(items,))
        """[items] place of each item's key in `_keys`."""
        self._rows[:] = -1
        row = length = 0
        with open(ends, "wb") as ends_file, open(text, "wb") as text_file:
            ends_file.write(bytes(8))
            for batch in export.items(("item_id", "key")):
                keys = batch["key"]
                _, offsets, values = keys.buffers()
                bounds = np.frombuffer(offsets, np.int32)[keys.offset : keys.offset + len(keys) + 1].astype(np.int64)
                text_file.write(memoryview(values)[bounds[0] : bounds[-1]])
                ends_file.write((bounds[1:] - bounds[0] + length).tobytes())
                self._rows[batch["item_id"].to_numpy()] = np.arange(row, row + len(keys))
                row, length = row + len(keys), length + int(bounds[-1] - bounds[0])
            text_file.write(b"\0")  # an empty file cannot be mapped
        if (missing := np.flatnonzero(self._rows < 0)).size:
            raise export.error("items/", f"item {missing[0]} is missing, and another one is there twice")
        self._keys = pa.LargeStringArray.from_buffers(
            items, *(pa.memory_map(path).read_buffer() for path in (ends, text))
        )

    def of(self, ids: Int64) -> pa.Array:
        """[n] string keys of `ids` [n] int64."""
        return self._keys.take(pa.array(self._rows[ids])).cast(pa.string())

    def __enter__(self) -> "ItemKeys":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the scratch folder."""
        del self._keys, self._rows
        self._resources.close()
