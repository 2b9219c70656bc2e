"""Writes the Parquet parts of a folder with their checksums, holding a bounded number of rows in memory."""

import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs
import pyarrow.parquet as pq

from recgpt_torchrec.storage.failing import raise_storage_failure
from recgpt_torchrec.storage.typed import SHOWN, check_counts

PATH_LENGTH = 200
"""Maximum length of a part's path."""
ROWS_PER_BYTE = 16
"""Maximum number of rows per byte of a part. Each row has an id of its own: three million rows of nothing else, ids in
order, have 0.98 rows per byte; with keys, histories or vectors it is 0.2 to 0.6. So memory that is allocated by the
number of rows is bounded by the size of the files."""
FOOTER_READ = 2**16
"""Bytes read from the end of a part for its footer, in one request; Arrow's own number."""
VALUES_PER_BYTE = 1024
"""Maximum number of entries of lists per byte of a part. Random ids take 1 to 3 bytes each; only lists of one repeated
id come near it."""


@dataclass(kw_only=True)
class Part:
    """One Parquet file of a folder, as its manifest lists it."""

    path: str
    """Relative to the folder, for example `sequences/part-00000.parquet`."""
    rows: int
    items: int
    """Total length of its `item_ids` lists if it has that column, else the same as rows."""
    bytes: int
    checksum: str
    """crc32 of the file's bytes as eight hex digits."""
    footer: str | None = None
    """crc32 of a Parquet file's footer, its length and magic bytes, as eight hex digits; None: it was written by an
    earlier version, or is of another format. Not part of any fingerprint (`without_footers`)."""

    def check(self) -> None:
        """Check a part that a manifest promises, before its file is looked for.

        Raises:
            ValueError: its path does not stay below the folder, or a number is impossible.
        """
        shown = check_path(self.path)
        check_counts({f"{name} of {shown}": getattr(self, name) for name in ("rows", "items", "bytes")})
        for name, limit in {"rows": ROWS_PER_BYTE, "items": VALUES_PER_BYTE}.items():
            if getattr(self, name) > limit * self.bytes:
                raise ValueError(f"it promises {getattr(self, name):,} {name} in the {self.bytes:,} bytes of {shown}")


def without_footers(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A `dict_factory` of `asdict` for fingerprints: those of earlier versions, whose parts had no `footer`, hold."""
    return {name: value for name, value in pairs if name != "footer"}


def check_path(path: str) -> str:
    """Check that the path of a file that a manifest lists stays below the folder; returns it for messages.

    Raises:
        ValueError: it does not, or is too long.
    """
    steps = path.split("/")
    if "\\" in path or ":" in path or {"", ".", ".."} & {*steps} or len(path) > PATH_LENGTH:
        raise ValueError(f"it lists a part {path[:SHOWN]!r}, which is not a path below the folder")
    return path[:SHOWN]


def write_parts(
    fs: pyarrow.fs.FileSystem,
    root: str,
    folder: str,
    groups: Iterable[pa.Table],
    groups_per_part: int,
    prefix: str = "part",
    *,
    first: int = 0,
    options: Mapping[str, Any] | None = None,
    makes_folder: bool = True,
) -> list[Part]:
    """Write tables as the row groups of `folder`/part-00000.parquet, `folder`/part-00001.parquet, ...

    Args:
        root: the folder of the manifest, on `fs`.
        folder: folder below `root` for the files.
        groups: one table per row group; none may be empty.
        groups_per_part: row groups per file.
        prefix: prefix of the files' names; processes that write into one folder need different ones.
        first: number of the first file.
        options: of `ParquetWriter`, in place of those that suit histories and keys.
        makes_folder: False: `folder` has to exist.

    Returns:
        A `Part` per file.
    """
    if makes_folder:
        fs.create_dir(f"{root}/{folder}", recursive=True)
    parts: list[Part] = []
    writer: _PartWriter | None = None
    try:
        for group in groups:
            if writer is None:
                path = f"{folder}/{prefix}-{first + len(parts):05d}.parquet"
                writer = _PartWriter(fs, root, path, group.schema, options or {})
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
    """Writes one Parquet file and computes its checksum on the way."""

    def __init__(
        self, fs: pyarrow.fs.FileSystem, root: str, path: str, schema: pa.Schema, options: Mapping[str, Any]
    ) -> None:
        self.path = path
        self.rows = self.items = self.groups = 0
        self.sink = _ChecksummedFile(fs.open_output_stream(f"{root}/{path}", compression=None))
        # Ids are random, so a dictionary of them costs more than it saves.
        plain = [field.name for field in schema if field.type == pa.int64()]
        dictionaries = [field.name for field in schema if field.name not in plain and not pa.types.is_list(field.type)]
        self.writer = pq.ParquetWriter(
            pa.PythonFile(self.sink, mode="w"),
            schema,
            write_page_checksum=True,  # verified by `open_parquet`: a flipped bit is an error, not another number
            **{"compression": "zstd", "use_dictionary": dictionaries, **options},
        )

    def write(self, group: pa.Table) -> None:
        self.writer.write_table(group, row_group_size=group.num_rows)
        self.groups += 1
        self.rows += group.num_rows
        lists = group.column("item_ids") if "item_ids" in group.column_names else None
        self.items += group.num_rows if lists is None else pc.sum(pc.list_value_length(lists)).as_py()

    def close(self) -> Part:
        self.sink.tail = bytearray()
        self.writer.close()
        self.sink.close()
        return Part(
            path=self.path,
            rows=self.rows,
            items=self.items,
            bytes=self.sink.size,
            checksum=f"{self.sink.crc:08x}",
            footer=checksum_of_footer(self.sink.tail),
        )

    def abandon(self) -> None:
        """Close the file, which is about to be deleted, and ignore errors."""
        try:
            self.writer.close()
            self.sink.close()
        except (OSError, pa.ArrowException):
            pass


@contextmanager
def write_checksummed(fs: pyarrow.fs.FileSystem, root: str, path: str, part: Part) -> Iterator[pa.PythonFile]:
    """Write the file `root`/`path` within the `with`, and fill in the part's bytes and checksum after it.

    Args:
        fs: file system of `root`.
        root: the folder of the manifest.
        path: of the file, relative to `root`.
        part: to fill in.
    """
    sink = _ChecksummedFile(fs.open_output_stream(f"{root}/{path}", compression=None))
    yield pa.PythonFile(sink, mode="w")
    sink.close()
    part.bytes, part.checksum = sink.size, f"{sink.crc:08x}"


class _ChecksummedFile:
    """An output stream that counts its bytes and computes their crc32."""

    def __init__(self, stream: pa.NativeFile) -> None:
        self.stream = stream
        self.size = 0
        self.crc = 0
        self.tail: bytearray | None = None
        """What is written from now on, if it is set."""

    @property
    def closed(self) -> bool:
        return self.stream.closed

    def write(self, data: bytes) -> int:
        self.stream.write(data)
        self.crc = zlib.crc32(data, self.crc)
        if self.tail is not None:
            self.tail += data
        size = memoryview(data).nbytes
        self.size += size
        return size

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self.stream.flush()

    def close(self) -> None:
        self.stream.close()


def open_part(fs: pyarrow.fs.FileSystem, root: str, part: Part) -> pq.ParquetFile:
    """Open the Parquet file of a part; its footer is compared with the manifest before anything parses it.

    Arrow ends the whole process on some changed bytes of a footer: a histogram of another size is a C++ exception in a
    constructor that Python calls unguarded. Opening 2,000 parts of 31 KB on a local disk took 0.19 s of a core with the
    comparison and 0.14 s without; each is one request to a store, as before.

    Args:
        fs: file system of `root`.
        root: the folder of the manifest.
        part: as the manifest lists it.

    Raises:
        OSError, ArrowException: it does not exist, has another footer, or is no Parquet file.
    """
    return open_parquet(fs, f"{root}/{part.path}", part.footer)


def open_parquet(fs: pyarrow.fs.FileSystem, path: str, footer: str | None = None) -> pq.ParquetFile:
    """Open a Parquet file; the checksums of its pages, where it has any, are verified as they are read.

    Reading 39 MB of histories took 0.229 s without this and 0.233 s with it; an epoch of batches of 2.3 million entries
    0.44 and 0.45 s (least of six, two other processes beside).

    Args:
        fs: file system of `path`.
        path: of the file.
        footer: checksum of its footer, see `Part`; None: unknown.

    Raises:
        OSError, ArrowException: it does not exist, has another footer, or is no Parquet file.
    """
    source = fs.open_input_file(path)
    try:
        metadata = None if footer is None else _read_footer(source, footer)
        file = pq.ParquetFile(source, metadata=metadata, page_checksum_verification=True)
        str(file.schema_arrow)  # decodes all names
    except UnicodeDecodeError:
        raise OSError("a name in its footer is not UTF-8") from None
    return file


def _read_footer(source: pa.NativeFile, promised: str) -> pq.FileMetaData:
    """Read and parse the footer of a file, if its checksum is the promised one."""
    size = source.size()
    tail = source.read_at(min(size, FOOTER_READ), max(0, size - FOOTER_READ))
    missing = min(size, _length_of_footer(tail)) - len(tail)
    if missing > 0:
        tail = source.read_at(missing, size - len(tail) - missing) + tail
    if (checksum := checksum_of_footer(tail)) != promised:
        raise OSError(f"the checksum of its footer is {checksum}, the manifest promises {promised}")
    return pq.read_metadata(pa.BufferReader(tail))


def _length_of_footer(tail: bytes | bytearray) -> int:
    """Number of bytes of the footer at the end of a file, with its length and magic bytes."""
    return int.from_bytes(tail[-8:-4], "little") + 8


def checksum_of_footer(tail: bytes | bytearray) -> str:
    """crc32 of the footer of a Parquet file as eight hex digits, given the file or the end of it."""
    return f"{zlib.crc32(tail[-_length_of_footer(tail) :]):08x}"


def regroup(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.Table]:
    """Cut a stream of batches into tables of `rows` rows (the last may have fewer)."""
    pending: list[pa.RecordBatch] = []
    count = 0
    for batch in batches:
        pending.append(batch)
        count += batch.num_rows
        while count >= rows:
            table = pa.Table.from_batches(pending)
            yield table.slice(0, rows).combine_chunks()
            pending = table.slice(rows).to_batches()
            count -= rows
    if count:
        yield pa.Table.from_batches(pending).combine_chunks()


def checksum_of(fs: pyarrow.fs.FileSystem, path: str) -> str:
    """crc32 of a file's bytes as eight hex digits.

    Raises:
        OSError: it cannot be read.
    """
    crc = 0
    try:
        with fs.open_input_stream(path, compression=None) as stream:
            while block := stream.read(2**22):
                crc = zlib.crc32(block, crc)
    except OSError as error:
        raise_storage_failure(error, path)
        raise
    return f"{crc:08x}"
