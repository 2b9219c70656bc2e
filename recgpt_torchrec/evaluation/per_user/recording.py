"""Collects the ranks of held-out items by user and recall path on disk, and joins them into one Parquet file.

Recall paths are measured one after the other, each by its own passes over the users, and a user may be on another rank
in each. So every rank writes what it measured beside the output, and rank 0 joins it by ranges of user ids: memory is
that of a buffer per path and of one range, whatever the number of users.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from types import TracebackType

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import torch

from recgpt_torchrec import storage
from recgpt_torchrec.data.ragged import Int64, to_numpy
from recgpt_torchrec.distributed.lockstep import raise_first_error
from recgpt_torchrec.distributed.processes import rank, run_on_first_rank
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.evaluation.per_user.files import PerUser, column_of, file_beside
from recgpt_torchrec.storage.folders import temporary_folder
from recgpt_torchrec.storage.parts import Part, write_checksummed

BUFFER = 2**16
"""Rows of a path that a rank holds before it writes them."""
RANGE = 2**18
"""User ids that are joined at once."""
USER = "user_id"
WRITTEN = ".parquet"
"""Ending of what a rank writes."""
FACTS = "facts"
"""Name of what is known of users whatever the path; no recall path has it."""
Values = Mapping[str, npt.NDArray[np.number]]
"""Columns [users] by name."""


class UserRecorder:
    """Collects columns by user and by recall path, and joins them at the end.

    Example: `with UserRecorder("test.json") as recorder: recorder.add_ranks("pretrain", users, ranks)`, then
    `recorder.join(users=manifest.users)`
    """

    def __init__(self, output: str) -> None:
        """Make an empty folder beside the evaluation's file `output` (collective).

        Raises:
            InputError: it cannot be made.
        """
        self.output, self.file = output, file_beside(output)
        self._writers: dict[str, _Writer] = {}
        self._failure: Exception | None = None
        self._resources = ExitStack()  # of rank 0

        def make() -> str:
            try:
                return self._resources.enter_context(temporary_folder(self.file))
            except OSError as error:
                raise _make_write_error(self.file, error) from None

        self.folder = run_on_first_rank(make)

    def __enter__(self) -> "UserRecorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._writers.values():
            writer.abandon()
        self._resources.__exit__(kind, error, trace)

    def add_ranks(self, path: str, users: Int64, ranks: Mapping[str, torch.Tensor]) -> None:
        """Add the ranks [users] float32 of some users' held-out items by protocol; once per user and path."""
        self.add(path, users, {column_of(path, how): values.float().cpu().numpy() for how, values in ranks.items()})

    def add(self, name: str, users: Int64, columns: Values) -> None:
        """Add columns of some users, [users] each; `name` is that of what they belong to.

        A failure to write is raised by `join`, on all ranks.
        """
        if self._failure is not None or not users.size:
            return
        try:
            if name not in self._writers:
                fs, root = storage.filesystem(self.folder)
                self._writers[name] = _Writer(fs, f"{root}/{name}-{rank():05d}{WRITTEN}")
            self._writers[name].add({USER: users, **columns})
        except OSError as error:
            self._failure = _make_write_error(self.folder, error)

    def join(self, users: int, **more: object) -> PerUser:
        """Join what was added into the file, in order of user ids (collective).

        Args:
            users: number of user ids.
            more: further values of the record.

        Raises:
            InputError: something could not be written.
        """
        try:
            for writer in self._writers.values():
                writer.close()
        except OSError as error:
            self._failure = self._failure or _make_write_error(self.folder, error)
        raise_first_error(self._failure)
        part = Part(path=os.path.basename(self.file), rows=0, items=0, bytes=0, checksum="")
        joiners: list[_Joiner] = []  # of rank 0
        run_on_first_rank(lambda: joiners.append(_Joiner(self.folder, self.file, part)))
        for first in range(0, users, RANGE):  # a broadcast per range: no rank waits for long at once

            def join(first: int = first) -> None:
                joiners[0].join(first, min(first + RANGE, users))

            run_on_first_rank(join)
        record: dict[str, object] = run_on_first_rank(lambda: joiners[0].finish())
        return PerUser(**{**record, **more})  # type: ignore[arg-type]


def _make_write_error(path: str, error: OSError) -> Exception:
    return storage.find_storage_failure(error, path, "write") or InputError(f"cannot write {path}: {error}")


class _Writer:
    """Writes columns as row groups of `BUFFER` rows."""

    def __init__(self, fs: pyarrow.fs.FileSystem, path: str) -> None:
        self.fs, self.path = fs, path
        self._buffered: list[Values] = []
        self._rows = 0
        self._writer: pq.ParquetWriter | None = None

    def add(self, columns: Values) -> None:
        """Add rows."""
        self._buffered.append(columns)
        self._rows += columns[USER].size
        if self._rows >= BUFFER:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        names = list(self._buffered[0])
        table = pa.table({name: np.concatenate([each[name] for each in self._buffered]) for name in names})
        if self._writer is None:
            self._writer = pq.ParquetWriter(self.fs.open_output_stream(self.path, compression=None), table.schema)
        self._writer.write_table(table)
        self._buffered, self._rows = [], 0

    def close(self) -> None:
        """Write what is left."""
        self._flush()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def abandon(self) -> None:
        """Close the file, which is about to be deleted."""
        if self._writer is not None:
            try:
                self._writer.close()
            except (OSError, pa.ArrowException):
                pass


class _Joiner:
    """Joins the files of a folder by ranges of user ids; on rank 0 alone."""

    def __init__(self, folder: str, file: str, part: Part) -> None:
        self.fs, self.root = storage.filesystem(folder)
        self.file, self.part = file, part
        self.groups = list(_row_groups(self.fs, self.root))
        self.schema = _joined_schema(self.fs, self.root)
        _, self.target = storage.filesystem(file)
        self.temporary = self.target if storage.remote(file) else f"{self.root}/{self.part.path}"
        self._context = write_checksummed(
            self.fs, os.path.dirname(self.temporary), os.path.basename(self.temporary), part
        )
        self._sink = self._context.__enter__()
        self._writer = pq.ParquetWriter(self._sink, self.schema, compression="zstd", write_page_checksum=True)

    def join(self, first: int, stop: int) -> None:
        """Write the users `first` to `stop` - 1."""
        values = {
            field.name: np.zeros(stop - first, field.type.to_pandas_dtype())
            for field in self.schema
            if field.name != USER
        }
        given = {name: np.zeros(stop - first, bool) for name in values}
        try:
            for path, group, low, high in self.groups:
                if low >= stop or high < first:
                    continue
                with pq.ParquetFile(self.fs.open_input_file(path)) as file:
                    table = file.read_row_group(group)
                users = to_numpy(table[USER])
                chosen = (users >= first) & (users < stop)
                places = users[chosen] - first
                for name in table.column_names:
                    if name != USER:
                        values[name][places] = to_numpy(table[name])[chosen]
                        given[name][places] = True
            rows = np.flatnonzero(np.any(list(given.values()), axis=0)) if given else np.zeros(0, np.int64)
            if rows.size:
                columns = [pa.array(rows + first, pa.int64())]
                columns += [pa.array(values[name][rows], mask=~given[name][rows]) for name in values]
                self._writer.write_table(pa.Table.from_arrays(columns, schema=self.schema))
                self.part.rows += rows.size
        except OSError as error:
            raise _make_write_error(self.file, error) from None

    def finish(self) -> dict[str, object]:
        """Commit the file; returns what is recorded of it."""
        try:
            self._writer.close()
            self._context.__exit__(None, None, None)
            if self.temporary != self.target:
                self.fs.move(self.temporary, self.target)
        except OSError as error:
            raise _make_write_error(self.file, error) from None
        return {name: getattr(self.part, name) for name in ("rows", "bytes", "checksum")} | {"file": self.part.path}


def _files(fs: pyarrow.fs.FileSystem, root: str) -> list[str]:
    """Paths of what all ranks wrote: that of the facts first, then those of the paths in order of their names."""
    names = [info.base_name for info in fs.get_file_info(pyarrow.fs.FileSelector(root))]
    names = [name for name in names if name.endswith(WRITTEN)]
    return [f"{root}/{name}" for name in sorted(names, key=lambda name: (not name.startswith(f"{FACTS}-"), name))]


def _row_groups(fs: pyarrow.fs.FileSystem, root: str) -> Iterator[tuple[str, int, int, int]]:
    """Path and number of every row group, with its smallest and largest user id."""
    for path in _files(fs, root):
        with pq.ParquetFile(fs.open_input_file(path)) as file:
            column = file.schema_arrow.get_field_index(USER)
            for group in range(file.num_row_groups):
                bounds = file.metadata.row_group(group).column(column).statistics
                yield path, group, bounds.min, bounds.max


def _joined_schema(fs: pyarrow.fs.FileSystem, root: str) -> pa.Schema:
    """The columns of all files, each once."""
    fields = {USER: pa.field(USER, pa.int64(), nullable=False)}
    for path in _files(fs, root):
        fields |= {field.name: field for field in pq.read_schema(path, filesystem=fs) if field.name != USER}
    return pa.schema(list(fields.values()))
