"""Turns ordered rows into the parts of a dataset, and computes the vocabulary's fingerprint.

Knows nothing of engines: one writes all parts in this process, another each part where its rows are.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs

from recgpt_torchrec.data.ragged import offsets_of
from recgpt_torchrec.storage.parts import Part, open_part, regroup, write_parts

NUMBER = "number"
"""Column that numbers rows which have no id of their own."""


class MakeGroups(Protocol):
    """Turns rows into tables, one per row group."""

    def __call__(self, batches: Iterable[pa.RecordBatch], *, start: int, stop: int) -> Iterator[pa.Table]:
        """The row groups of the ids from `start` up to `stop`, given the rows of these ids, in order."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How rows with dense ids become a folder of Parquet parts: which ids are in which file, and in which order."""

    folder: str
    """For example `sequences`."""
    id: str
    """Column of the ids, from 0 to `ids` - 1."""
    ids: int
    """Number of ids."""
    columns: list[str]
    """The columns that `make_groups` needs, in its order."""
    order: list[str] = field(default_factory=list)
    """Columns that order the rows of one id."""
    ids_per_group: int
    groups_per_part: int
    make_groups: MakeGroups

    @property
    def ids_per_part(self) -> int:
        """Number of ids per file; the last may have fewer."""
        return self.ids_per_group * self.groups_per_part

    @property
    def parts(self) -> int:
        """Number of files."""
        return -(-self.ids // self.ids_per_part)

    def write_all(self, fs: pyarrow.fs.FileSystem, root: str, batches: Iterable[pa.RecordBatch]) -> list[Part]:
        """Write all rows, which are in order of id."""
        groups = self.make_groups(batches, start=0, stop=self.ids)
        return write_parts(fs, root, self.folder, groups, self.groups_per_part)

    def write_part(
        self, fs: pyarrow.fs.FileSystem, root: str, batches: Iterable[pa.RecordBatch], number: int, prefix: str
    ) -> Part:
        """Write the part of this number: the same file as `write_all` writes, given its rows alone.

        The folder exists: were it made here, a task that outlives a failure would make again what has been removed.
        """
        start = number * self.ids_per_part
        groups = self.make_groups(batches, start=start, stop=min(start + self.ids_per_part, self.ids))
        place = fs, root, self.folder
        (part,) = write_parts(*place, groups, self.groups_per_part, prefix, first=number, makes_folder=False)
        return part


def lay_out_rows(folder: str, columns: list[str], ids: int, ids_per_group: int, groups_per_part: int) -> Layout:
    """The layout of a table with one row per id, which is its first column; a part has its rows as they are.

    An id called `number` only puts the rows in order, and is not written.
    """
    return Layout(
        folder=folder,
        id=columns[0],
        ids=ids,
        columns=[column for column in columns if column != NUMBER],
        ids_per_group=ids_per_group,
        groups_per_part=groups_per_part,
        make_groups=partial(_regroup_ids, rows=ids_per_group),
    )


def _regroup_ids(batches: Iterable[pa.RecordBatch], rows: int, *, start: int, stop: int) -> Iterator[pa.Table]:
    return regroup(batches, rows)


def list_groups(
    batches: Iterable[pa.RecordBatch],
    ids_per_group: int,
    lists: dict[str, tuple[str, pa.DataType]],
    counts: dict[str, str] | None = None,
    id: str = "user_id",
    *,
    start: int = 0,
    stop: int,
) -> Iterator[pa.Table]:
    """Turn rows that are ordered by id, such as interactions by user and time, into row groups with one row per id.

    Args:
        batches: rows with a column `id`, sorted by it; ids without rows get empty lists.
        ids_per_group: number of ids, and so rows, per table (the last may have fewer).
        lists: for each list column of the result, the column of `batches` that it collects, and its value type.
        counts: for each int64 column of the result, the boolean column of `batches` of which it counts the true values.
        id: column of the ids.
        start: the first id.
        stop: the number after the last id, whether these have rows or not.

    Example:
        `list_groups(batches, 350, {"item_ids": ("item_id", pa.int64())}, stop=22363)`
    """

    def cut(first: int, end: int, events: pa.Table, ids: np.ndarray) -> pa.Table:
        offsets = pa.array(np.searchsorted(ids, np.arange(first, end + 1)).astype(np.int32))
        columns = {id: pa.array(np.arange(first, end, dtype=np.int64))}
        for name, (source, kind) in lists.items():
            values = pa.concat_arrays([pa.array([], kind), *events.column(source).cast(kind).chunks])
            columns[name] = pa.ListArray.from_arrays(offsets, values)
        for name, source in (counts or {}).items():
            before = offsets_of(events.column(source).to_numpy())
            columns[name] = pa.array(np.diff(before[offsets.to_numpy()]))
        return pa.table(columns)

    pending: list[pa.RecordBatch] = []
    for batch in batches:
        if batch.num_rows == 0:
            continue
        pending.append(batch)
        if batch.column(id)[-1].as_py() < start + ids_per_group:
            continue
        table = pa.Table.from_batches(pending)
        ids = table.column(id).to_numpy()
        last = int(ids[-1])
        done = 0
        while last >= start + ids_per_group:
            end = int(np.searchsorted(ids, start + ids_per_group))
            yield cut(start, start + ids_per_group, table.slice(done, end - done), ids[done:end])
            start, done = start + ids_per_group, end
        pending = table.slice(done).to_batches()
    nothing = {source: pa.array([], kind) for source, kind in lists.values()}
    nothing |= {source: pa.array([], pa.bool_()) for source in (counts or {}).values()}
    table = pa.Table.from_batches(pending) if pending else pa.table({id: pa.array([], pa.int64()), **nothing})
    ids = table.column(id).to_numpy()
    for first in range(start, stop, ids_per_group):
        end = min(first + ids_per_group, stop)
        inside = slice(*np.searchsorted(ids, [first, end]).tolist())
        yield cut(first, end, table.slice(inside.start, inside.stop - inside.start), ids[inside])


class Fingerprint:
    """A hash of keys in id order, independent of their split into batches."""

    def __init__(self) -> None:
        self.lengths, self.text = hashlib.sha256(), hashlib.sha256()

    def add(self, keys: pa.ChunkedArray) -> None:
        """Add the next keys."""
        for chunk in keys.cast(pa.large_string()).chunks:
            self.lengths.update(pc.binary_length(chunk).to_numpy(zero_copy_only=False).astype("<i8").tobytes())
            self.text.update("".join(chunk.to_pylist()).encode())

    def hex(self) -> str:
        """The hash as 32 hex digits."""
        return hashlib.sha256(self.lengths.digest() + self.text.digest()).hexdigest()[:32]


def fingerprint_parts(
    fs: pyarrow.fs.FileSystem, root: str, folders: dict[str, list[Part]], rules: Iterable[str] = ()
) -> str:
    """The fingerprint of what ids mean, from written parts, by the name of their folder, a row group at a time.

    It is that of the keys and, where a slot may be given to another key, of when it was; where keys share a slot, of
    their bucket. And of `rules`, which describe how slots are assigned.
    """
    fingerprint = Fingerprint()
    for rule in rules:
        fingerprint.add(pa.chunked_array([[rule]]))
    for name, parts in folders.items():
        fingerprint.add(pa.chunked_array([[name]]))
        for part in parts:
            with open_part(fs, root, part) as file:
                names = file.schema_arrow.names
                meaning = ["bucket"] if "bucket" in names else [name for name in ("key", "since") if name in names]
                for batch in file.iter_batches(columns=meaning):
                    for column in meaning:
                        fingerprint.add(pa.chunked_array([batch.column(column).cast(pa.string())]))
    return fingerprint.hex()
