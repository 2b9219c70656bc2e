"""Tails: a user's newest entries, from which the history in front of a later day's interactions is made.

Each day has an Arrow file with the tails of its users, which `Newest` finds by day and row. A batch of `ROWS` users is
compressed by itself, so an appended day reads the batches that its own users are in and no others.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.fs

from recgpt_torchrec.data.days.newest import Newest
from recgpt_torchrec.data.ragged import Int64, Ragged, ragged_arange
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.writing import list_groups
from recgpt_torchrec.storage import filesystem, raise_storage_failure
from recgpt_torchrec.storage.parts import Part, write_checksummed

ROWS = 1024
"""Users per batch of the file."""
COMPRESSION = "zstd"
"""Of each batch: ids, times and constant columns take about a fifth of their size in memory."""
CUT = "cut"
"""Column that says of each entry whether its user has older ones that are not kept, 0 or 1."""
STALE = "stale"
"""Column that says of each entry that is read whether its item has lost its slot since, 0 or 1."""
BEFORE = -(2**40)
"""Order of the first entry of a tail: before all rows of the day."""


def write_tails(
    fs: pyarrow.fs.FileSystem,
    root: str,
    batches: Iterable[pa.RecordBatch],
    columns: dict[str, pa.DataType],
    users: int,
) -> list[Part]:
    """Write the tails of a day's users to `root`/tails.

    Args:
        fs: file system of `root`.
        root: folder of the day.
        batches: entries to keep, in order: `user_id`, the number of the user among the day's, `cut`, and `columns`.
        columns: columns of the entries with their types.
        users: number of users of the day.
    """
    path = "tails/part-00000.arrow"
    fs.create_dir(f"{root}/tails", recursive=True)
    lists = {name: (name, kind) for name, kind in {**columns, CUT: pa.int8()}.items()}
    schema = pa.schema([(name, pa.list_(kind)) for name, (_, kind) in lists.items()])
    part = Part(path=path, rows=0, items=0, bytes=0, checksum="")
    with (
        write_checksummed(fs, root, path, part) as sink,
        pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(compression=COMPRESSION)) as writer,
    ):
        for table in list_groups(batches, ROWS, lists, stop=users):
            (batch,) = table.select(schema.names).combine_chunks().to_batches()
            writer.write_batch(batch)
            part.rows += batch.num_rows
            part.items += len(batch.column("item_id").values)
    return [part]


@dataclass
class Tails:
    """The tails of all days before one.

    Example: `for table in tails.read(np.array([3, 17])): ...`
    """

    folder: str
    """The folder of days."""
    parts: dict[int, Part]
    """The file of each day."""
    newest: Newest
    columns: dict[str, pa.DataType]
    """Columns of the entries."""
    versions: Int64
    """[days + 1] version of the vocabulary of each day, from day 1 on."""
    since: Mapping[str, Int64] = field(default_factory=dict)
    """Of `user` and `item`, [slots] version in which each slot was given to its key; those without keep their ids."""
    bytes: int = 0
    """Size of the tails that were read, in memory."""
    _files: dict[int, pa.ipc.RecordBatchFileReader] = field(default_factory=dict, repr=False)

    @property
    def schema(self) -> pa.Schema:
        """Columns of `read`."""
        more = {"user_id": pa.int64(), "order": pa.int64(), CUT: pa.int8(), STALE: pa.int8()}
        return pa.schema([*more.items(), *self.columns.items()])

    def read(self, users: Int64) -> Iterator[pa.Table]:
        """The entries of some users' tails: `user_id`, `order` (before all of the day), `cut`, `stale` and `columns`.

        Args:
            users: ids, ascending; those without an earlier day have no entry, nor have those whose slot was another
                user's then.
        """
        days, rows = self.newest.find(users)
        if "user" in self.since:
            days = np.where(self.since["user"][users] > self.versions[days], 0, days)
        for day in np.unique(days[days > 0]).tolist():
            mine = np.flatnonzero(days == day)
            of_batch = rows[mine] // ROWS
            for batch in np.unique(of_batch).tolist():
                chosen = mine[of_batch == batch]
                yield self._read_rows(day, batch, rows[chosen] - batch * ROWS, users[chosen])

    def _read_rows(self, day: int, batch: int, rows: Int64, users: Int64) -> pa.Table:
        path = self.parts[day].path
        try:
            stored = self._open(day).get_batch(batch).select([*self.columns, CUT])
            table = pa.Table.from_batches([stored.take(pa.array(rows))])
        except (OSError, pa.ArrowException, KeyError, IndexError) as error:
            raise_storage_failure(error, f"{self.folder}/{path}")
            raise InputError(
                f"{self.folder}: {path} cannot be read ({' '.join(str(error).split())}); restore the file"
            ) from None
        self.bytes += table.nbytes
        items = Ragged.from_arrow(table["item_id"])
        values = {
            name: pa.array(column.combine_chunks().flatten(), self.schema.field(name).type)
            for name, column in zip(table.column_names, table.columns, strict=True)
        }
        stale = np.zeros(len(items.values), bool)
        if "item" in self.since:
            stale = self.since["item"][items.values] > self.versions[day]
        of_entry = {"user_id": np.repeat(users, items.lengths), "order": BEFORE + ragged_arange(items.lengths)}
        of_entry[STALE] = stale.astype(np.int8)
        return pa.table({**of_entry, **values}).select(self.schema.names).cast(self.schema)

    def _open(self, day: int) -> pa.ipc.RecordBatchFileReader:
        if day not in self._files:
            fs, root = filesystem(self.folder)
            path = f"{root}/{self.parts[day].path}"
            is_local = isinstance(fs, pyarrow.fs.LocalFileSystem)
            source = pa.memory_map(path) if is_local else fs.open_input_file(path)
            self._files[day] = pa.ipc.open_file(source)
        return self._files[day]
