"""Turns ordered interactions into rows of a dataset, one per user, and computes the vocabulary's fingerprint."""

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recgpt_torchrec.data.ragged import offsets_of


def sequence_groups(
    batches: Iterable[pa.RecordBatch],
    users: int,
    lists: dict[str, tuple[str, pa.DataType]],
    total: int,
    counts: dict[str, str] | None = None,
) -> Iterator[pa.Table]:
    """Turn interactions, ordered by user and time, into row groups with one row per user.

    Args:
        batches: interactions with a column `user_id`, sorted by it; users without interactions get empty lists.
        users: number of users, and so rows, per table (the last may have fewer).
        lists: for each list column of the result, the column of `batches` that it collects, and its value type.
        total: number of all users; those after the last with an interaction get empty lists too.
        counts: for each int64 column of the result, the boolean column of `batches` of which it counts the true values.

    Example:
        `sequence_groups(batches, 350, {"item_ids": ("item_id", pa.int64())}, 22363)`
    """

    def cut(start: int, stop: int, events: pa.Table, ids: np.ndarray) -> pa.Table:
        offsets = pa.array(np.searchsorted(ids, np.arange(start, stop + 1)).astype(np.int32))
        columns = {"user_id": pa.array(np.arange(start, stop, dtype=np.int64))}
        for name, (source, kind) in lists.items():
            values = pa.concat_arrays([pa.array([], kind), *events.column(source).cast(kind).chunks])
            columns[name] = pa.ListArray.from_arrays(offsets, values)
        for name, source in (counts or {}).items():
            before = offsets_of(events.column(source).to_numpy())
            columns[name] = pa.array(np.diff(before[offsets.to_numpy()]))
        return pa.table(columns)

    start = 0
    pending: list[pa.RecordBatch] = []
    for batch in batches:
        if batch.num_rows == 0:
            continue
        pending.append(batch)
        if batch.column("user_id")[-1].as_py() < start + users:
            continue
        table = pa.Table.from_batches(pending)
        ids = table.column("user_id").to_numpy()
        last = int(ids[-1])
        done = 0
        while last >= start + users:
            end = int(np.searchsorted(ids, start + users))
            yield cut(start, start + users, table.slice(done, end - done), ids[done:end])
            start, done = start + users, end
        pending = table.slice(done).to_batches()
    if pending:
        table = pa.Table.from_batches(pending)
        ids = table.column("user_id").to_numpy()
        for first in range(start, total, users):
            stop = min(first + users, total)
            inside = slice(*np.searchsorted(ids, [first, stop]).tolist())
            yield cut(first, stop, table.slice(inside.start, inside.stop - inside.start), ids[inside])


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
