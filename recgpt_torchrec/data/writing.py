"""The writing side of a dataset folder: Parquet parts with checksums, committed whole or not at all.

Knows the format, not where rows come from; everything here takes and writes a bounded number of rows at a time.
"""

import fcntl
import glob
import hashlib
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs
import pyarrow.parquet as pq

from recgpt_torchrec.data.dataset import MANIFEST, Part, filesystem
from recgpt_torchrec.errors import InputError

RENAMING = ("local", "hdfs")
"""File systems where a folder is renamed in one step."""
INCOMPLETE = ".incomplete"
"""A file in a folder, as long as the folder is being written."""


@contextmanager
def staged(path: str) -> Iterator[tuple[pyarrow.fs.FileSystem, str]]:
    """A folder to write a dataset into, that becomes `path` when the block ends without an error.

    Until then it has a temporary name beside `path`. Where folders cannot be renamed (object stores) it is `path` from
    the start, and the manifest, written last, is what makes it a dataset; a file that is there meanwhile says that what
    a kill left may be written over. After an error nothing of it is left; what a kill left on a local disk is deleted
    when `path` is written again.

    Yields:
        The file system, and the folder on it.
    """
    fs, final = filesystem(path)
    if fs.type_name == "local":
        final = os.path.realpath(final)  # a link may lead to another disk: not itself is replaced
    parent, name = os.path.split(final)
    renames = fs.type_name in RENAMING
    folder = f"{parent}/.{name}.incomplete-{os.getpid()}" if renames else final
    try:
        fs.create_dir(folder, recursive=True)
        fs.delete_dir_contents(folder)  # left by a kill, or nothing: `check_free` saw to it
        with fs.open_output_stream(f"{folder}/{INCOMPLETE}", compression=None) as stream:
            stream.write(b"being written")
        with _locked(parent, name, folder) if fs.type_name == "local" else nullcontext():
            yield fs, folder
            fs.delete_file(f"{folder}/{INCOMPLETE}")
            if renames:
                if fs.get_file_info(final).type == pyarrow.fs.FileType.Directory:
                    if fs.get_file_info(pyarrow.fs.FileSelector(final)):
                        raise InputError(f"{path} was written by another process meanwhile; give another --output")
                    fs.delete_dir(final)
                fs.move(folder, final)
    except BaseException as error:
        with suppress(OSError):  # a store that does not answer; the error that led here is the one to be said
            if fs.get_file_info(folder).type == pyarrow.fs.FileType.Directory:
                fs.delete_dir_contents(folder, missing_dir_ok=True)
                if renames:
                    fs.delete_dir(folder)
        if isinstance(error, OSError):
            raise InputError(f"cannot write {path}: {error}") from error
        raise


@contextmanager
def _locked(parent: str, name: str, folder: str) -> Iterator[None]:
    """Hold the lock of a folder that is written to become `parent`/`name`, and delete those that nobody holds."""
    for other in glob.glob(f"{glob.escape(parent)}/.{glob.escape(name)}.incomplete-*"):
        with suppress(OSError), open(f"{other}/{INCOMPLETE}", "rb+") as file:
            if other != folder:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(other)
    with open(f"{folder}/{INCOMPLETE}", "rb+") as file:
        with suppress(OSError):  # a file system without locks: none is deleted
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def check_free(path: str, finished: str = "finished dataset") -> None:
    """Raise `InputError` unless `path` does not exist, is an empty folder, or one that a kill left half written.

    `finished` is what would be welcome.
    """
    fs, root = filesystem(path)
    if fs.type_name == "local" and os.path.ismount(os.path.realpath(root)):
        raise InputError(f"--output {path} is where a disk is mounted, which no folder can replace; name one in it")
    info = fs.get_file_info(root)
    if info.type == pyarrow.fs.FileType.File:
        raise InputError(f"--output {path} is a file; name a folder that does not exist or is empty")
    if info.type == pyarrow.fs.FileType.Directory:
        there = sorted(entry.base_name for entry in fs.get_file_info(pyarrow.fs.FileSelector(root)))
        if there and INCOMPLETE not in there:
            more = f" and {len(there) - 3} more" if len(there) > 3 else ""
            raise InputError(
                f"--output {path} already holds something that is not a {finished} ({', '.join(there[:3])}"
                f"{more}); nothing was touched. Name a folder that does not exist or is empty"
            )


def write_manifest(fs: pyarrow.fs.FileSystem, folder: str, manifest: str) -> None:
    """Write `manifest.json`, given as text; everything it promises must be there already."""
    with fs.open_output_stream(f"{folder}/{MANIFEST}", compression=None) as stream:
        stream.write(manifest.encode())


def write_parts(
    fs: pyarrow.fs.FileSystem,
    root: str,
    folder: str,
    groups: Iterable[pa.Table],
    groups_per_part: int,
    prefix: str = "part",
) -> list[Part]:
    """Write tables as the row groups of `folder/part-00000.parquet`, ...

    Args:
        groups: one table a row group; none may be empty.
        groups_per_part: row groups in a file.
        prefix: what the files' names begin with; processes that write into one folder need different ones.

    Returns:
        A `Part` for each file; its `items` are the entries of `item_ids` where that column is, rows otherwise.
    """
    fs.create_dir(f"{root}/{folder}", recursive=True)
    parts: list[Part] = []
    writer: _PartWriter | None = None
    try:
        for group in groups:
            if writer is None:
                writer = _PartWriter(fs, root, f"{folder}/{prefix}-{len(parts):05d}.parquet", group.schema)
            writer.write(group)
            if writer.groups == groups_per_part:
                parts.append(writer.close())
                writer = None
        if writer is not None:
            parts.append(writer.close())
    except BaseException:
        if writer is not None:
            writer.abandon()
        raise
    return parts


class _PartWriter:
    """One Parquet file being written, its checksum taken on the way."""

    def __init__(self, fs: pyarrow.fs.FileSystem, root: str, path: str, schema: pa.Schema) -> None:
        self.path = path
        self.rows = self.items = self.groups = 0
        self.sink = _ChecksummedFile(fs.open_output_stream(f"{root}/{path}", compression=None))
        # Ids are random, so a dictionary of them costs more than it saves.
        plain = [field.name for field in schema if field.type == pa.int64()]
        dictionaries = [field.name for field in schema if field.name not in plain and not pa.types.is_list(field.type)]
        self.writer = pq.ParquetWriter(
            pa.PythonFile(self.sink, mode="w"), schema, compression="zstd", use_dictionary=dictionaries
        )

    def write(self, group: pa.Table) -> None:
        self.writer.write_table(group, row_group_size=group.num_rows)
        self.groups += 1
        self.rows += group.num_rows
        lists = group.column("item_ids") if "item_ids" in group.column_names else None
        self.items += group.num_rows if lists is None else pc.sum(pc.list_value_length(lists)).as_py()

    def close(self) -> Part:
        self.writer.close()
        self.sink.close()
        return Part(
            path=self.path,
            rows=self.rows,
            items=self.items,
            bytes=self.sink.size,
            checksum=f"{self.sink.crc:08x}",
        )

    def abandon(self) -> None:
        """Close what is open; the file is about to be deleted."""
        try:
            self.writer.close()
            self.sink.close()
        except (OSError, pa.ArrowException):
            pass


class _ChecksummedFile:
    """An output stream that counts its bytes and takes their crc32."""

    def __init__(self, stream: pa.NativeFile) -> None:
        self.stream = stream
        self.size = 0
        self.crc = 0

    @property
    def closed(self) -> bool:
        return self.stream.closed

    def write(self, data: bytes) -> int:
        self.stream.write(data)
        self.crc = zlib.crc32(data, self.crc)
        size = memoryview(data).nbytes
        self.size += size
        return size

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self.stream.flush()

    def close(self) -> None:
        self.stream.close()


def row_groups(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.Table]:
    """Cut a stream of batches into tables of exactly `rows` rows (the last may have fewer)."""
    held: list[pa.RecordBatch] = []
    count = 0
    for batch in batches:
        held.append(batch)
        count += batch.num_rows
        while count >= rows:
            table = pa.Table.from_batches(held)
            yield table.slice(0, rows).combine_chunks()
            held = table.slice(rows).to_batches()
            count -= rows
    if count:
        yield pa.Table.from_batches(held).combine_chunks()


def sequence_groups(
    batches: Iterable[pa.RecordBatch], users: int, lists: dict[str, tuple[str, pa.DataType]], total: int = 0
) -> Iterator[pa.Table]:
    """Turn interactions, ordered by user and time, into row groups of one row a user.

    Args:
        batches: interactions with a column `user_id`, in its order; users who have none get empty lists.
        users: rows in each table that comes out (the last may have fewer).
        lists: for each list column of the result: the column of `batches` it collects, and its value type.
        total: number of users; 0: up to the last that has an interaction.

    Example:
        `sequence_groups(batches, 350, {"item_ids": ("item_id", pa.int64())})`
    """

    def cut(start: int, stop: int, events: pa.Table, ids: np.ndarray) -> pa.Table:
        offsets = pa.array(np.searchsorted(ids, np.arange(start, stop + 1)).astype(np.int32))
        columns = {"user_id": pa.array(np.arange(start, stop, dtype=np.int64))}
        for name, (source, kind) in lists.items():
            values = pa.concat_arrays([pa.array([], kind), *events.column(source).cast(kind).chunks])
            columns[name] = pa.ListArray.from_arrays(offsets, values)
        return pa.table(columns)

    start = 0
    held: list[pa.RecordBatch] = []
    for batch in batches:
        if batch.num_rows == 0:
            continue
        held.append(batch)
        if batch.column("user_id")[-1].as_py() < start + users:
            continue
        table = pa.Table.from_batches(held)
        ids = table.column("user_id").to_numpy()
        last = int(ids[-1])
        done = 0
        while last >= start + users:
            end = int(np.searchsorted(ids, start + users))
            yield cut(start, start + users, table.slice(done, end - done), ids[done:end])
            start, done = start + users, end
        held = table.slice(done).to_batches()
    if held:
        table = pa.Table.from_batches(held)
        ids = table.column("user_id").to_numpy()
        last = max(int(ids[-1]) + 1, total)
        for first in range(start, last, users):
            stop = min(first + users, last)
            inside = slice(*np.searchsorted(ids, [first, stop]).tolist())
            yield cut(first, stop, table.slice(inside.start, inside.stop - inside.start), ids[inside])


class Fingerprint:
    """A hash over keys in id order, the same however they were split into batches."""

    def __init__(self) -> None:
        self.lengths, self.text = hashlib.sha256(), hashlib.sha256()

    def add(self, keys: pa.ChunkedArray) -> None:
        """Take the next keys in."""
        for chunk in keys.cast(pa.large_string()).chunks:
            self.lengths.update(pc.binary_length(chunk).to_numpy(zero_copy_only=False).astype("<i8").tobytes())
            self.text.update("".join(chunk.to_pylist()).encode())

    def hex(self) -> str:
        """32 hex digits."""
        return hashlib.sha256(self.lengths.digest() + self.text.digest()).hexdigest()[:32]
