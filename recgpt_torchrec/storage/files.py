"""Where files lie: a local path, or a URI of an object store or another file system, turned into one abstraction.

The project's own code uses `pyarrow.fs`: Parquet is read through it anyway, it speaks S3, Google Cloud Storage and HDFS
without a further package, and it wraps whatever else fsspec knows. Its S3 client obeys the usual environment variables
(AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION), so that MinIO and others work for all alike.

An object store has no folders to rename in one step and no files to append to. So small files are written whole there,
each in one step, and of many files one is written last: whoever reads looks for it first.
"""

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.fs
from fsspec.implementations.arrow import ArrowFSWrapper

from recgpt_torchrec.errors import InputError

READ_AHEAD = 2**20
"""Bytes asked of a store at once: PyTorch's readers take a tensor's head in pieces of some bytes."""


def filesystem(path: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The pyarrow file system of a path or URI, and the path on it.

    URIs are pyarrow's own (s3://, gs://, hdfs://, file://), and beyond those any that fsspec knows.

    Raises:
        InputError: no file system for this URI.
    """
    if not remote(path):
        return pyarrow.fs.LocalFileSystem(), os.path.abspath(path)
    try:
        return pyarrow.fs.FileSystem.from_uri(path)
    except pa.ArrowInvalid as error:
        try:
            fs, root = fsspec.core.url_to_fs(path)
        except (ValueError, ImportError):
            raise InputError(f"{path}: no file system for this URI: {error}") from None
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)), root


def fsspec_filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The same as fsspec's interface, for libraries that take no other (DuckDB).

    Raises:
        InputError: no file system for this URI.
    """
    fs, root = filesystem(path)
    if isinstance(fs, pyarrow.fs.PyFileSystem) and isinstance(fs.handler, pyarrow.fs.FSSpecHandler):
        return fs.handler.fs, root
    return ArrowFSWrapper(fs), root


def remote(path: str) -> bool:
    """Whether this is a URI, and so nothing for `open` and `os`."""
    return "://" in path


def exists(path: str) -> bool:
    """Whether there is a file or a folder."""
    fs, root = filesystem(path)
    return fs.get_file_info(root).type != pyarrow.fs.FileType.NotFound


def is_folder(path: str) -> bool:
    """Whether there is a folder; on an object store: anything below."""
    fs, root = filesystem(path)
    return fs.get_file_info(root).type == pyarrow.fs.FileType.Directory


def names(folder: str) -> list[str]:
    """Names of what is in a folder, sorted; none where there is no folder."""
    fs, root = filesystem(folder)
    selector = pyarrow.fs.FileSelector(root, allow_not_found=True)
    return sorted(info.base_name for info in fs.get_file_info(selector))


def read(path: str) -> bytes:
    """All of a small file.

    Raises:
        OSError: it is not there, or the store does not answer.
    """
    fs, root = filesystem(path)
    with fs.open_input_stream(root, compression=None) as stream:
        return stream.read()


def write(path: str, data: bytes) -> None:
    """Write a small file so that readers see the old one or the new one, never a part.

    Raises:
        OSError: it cannot be written.
    """
    if remote(path):
        fs, root = filesystem(path)
        with fs.open_output_stream(root, compression=None) as stream:
            stream.write(data)
        return
    with open(path + ".tmp", "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)


def write_json(path: str, value: Any) -> None:
    """Write a JSON file so that readers see the old one or the new one, never a part."""
    write(path, json.dumps(value, indent=1).encode())


def read_json(path: str) -> Any:
    """Read a JSON object; None where there is no file.

    Raises:
        InputError: it is damaged.
    """
    if not exists(path):
        return None
    try:
        value = json.loads(read(path))
    except ValueError as error:
        value, reason = None, str(error)
    else:
        reason = "not an object"
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged ({reason}); restore it, or remove what it belongs to: an older one counts")
    return value


def append(path: str, text: str) -> None:
    """Add lines to a small file, which on a store is written anew; one process at a time may.

    Raises:
        OSError: it cannot be written.
    """
    if remote(path):
        return write(path, (read(path) if exists(path) else b"") + text.encode())
    with open(path, "a") as file:
        file.write(text)


def make_folder(path: str) -> None:
    """Make a folder and those above it, where there is none.

    Raises:
        OSError: it cannot be made.
    """
    fs, root = filesystem(path)
    fs.create_dir(root, recursive=True)


def remove(folder: str, first: str | None = None) -> None:
    """Delete a folder and all in it, if there is one.

    Args:
        folder: path or URI.
        first: name of the file in it to be deleted before the others: what says that the folder is whole.

    Raises:
        OSError: it cannot be deleted.
    """
    fs, root = filesystem(folder)
    if first is not None and exists(f"{folder}/{first}"):
        fs.delete_file(f"{root}/{first}")
    if is_folder(folder):
        fs.delete_dir(root)


class Streams:
    """What torch.distributed.checkpoint needs of a file system, over the one of a URI (its `FileSystemBase`)."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.fs, self.root = filesystem(path)

    def _on(self, path: str | os.PathLike[str]) -> str:
        return self.root + os.fspath(path).removeprefix(self.path)

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        """A stream of bytes to read (`rb`) or to write (`wb`)."""
        if mode == "rb":
            with io.BufferedReader(self.fs.open_input_file(self._on(path)), READ_AHEAD) as stream:
                yield stream
        else:
            with self.fs.open_output_stream(self._on(path), compression=None) as stream:
                yield stream

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        """A file in a folder."""
        return f"{os.fspath(path)}/{suffix}"

    def init_path(self, path: str | os.PathLike[str]) -> str:
        """The path as it is used from then on."""
        return os.fspath(path)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Give a file another name: on an object store a copy, and the old one deleted."""
        self.fs.move(self._on(path), self._on(new_path))

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """Make a folder."""
        self.fs.create_dir(self._on(path), recursive=True)

    def exists(self, path: str | os.PathLike[str]) -> bool:
        """Whether there is a file."""
        return self.fs.get_file_info(self._on(path)).type != pyarrow.fs.FileType.NotFound

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        """Delete a file."""
        self.fs.delete_file(self._on(path))

    def ls(self, path: str | os.PathLike[str]) -> list[str]:
        """Paths of the files in a folder."""
        return [self.concat_path(path, name) for name in names(os.fspath(path))]
