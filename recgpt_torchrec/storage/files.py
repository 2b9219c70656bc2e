"""Files by path or URI: one interface to local disks, object stores and other file systems.

The project's own code uses `pyarrow.fs`: Parquet is read through it anyway, it speaks S3, Google Cloud Storage and HDFS
without a further package, and it wraps any file system that fsspec knows. Its S3 client obeys the usual environment
variables (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION), so MinIO and others work too.

An object store can neither rename a folder in one step nor append to a file. So small files are written whole there,
each in one step, and of many files the one that readers look for first is written last.
"""

import io
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.fs
from fsspec.implementations.arrow import ArrowFSWrapper

from recgpt_torchrec.errors import InputError
from recgpt_torchrec.storage.failing import raise_storage_failure
from recgpt_torchrec.storage.typed import JSON_BYTES, parse_object, seal

READ_AHEAD = 2**20
"""Bytes requested from a store at once: PyTorch's readers read a tensor's header a few bytes at a time."""


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
    """The same file system as fsspec's interface, for libraries that take no other (DuckDB).

    Raises:
        InputError: no file system for this URI.
    """
    fs, root = filesystem(path)
    if isinstance(fs, pyarrow.fs.PyFileSystem) and isinstance(fs.handler, pyarrow.fs.FSSpecHandler):
        return fs.handler.fs, root
    return ArrowFSWrapper(fs), root


def remote(path: str) -> bool:
    """Whether this is a URI, which `open` and `os` cannot handle."""
    return "://" in path


def scratch_beside(path: str) -> str:
    """A local folder for temporary files: the nearest one above `path` that exists; that of the machine for a URI."""
    fs, root = filesystem(path)
    if not isinstance(fs, pyarrow.fs.LocalFileSystem):
        return tempfile.gettempdir()
    folder = os.path.dirname(root)
    while not os.path.isdir(folder) and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
    return folder


def other_scratch(path: str) -> str:
    """What to do where the folder of `scratch_beside` cannot be used, in words."""
    return "name another folder in TMPDIR" if remote(path) else "give an --output in another folder"


def exists(path: str) -> bool:
    """Whether a file or a folder exists."""
    fs, root = filesystem(path)
    return fs.get_file_info(root).type != pyarrow.fs.FileType.NotFound


def is_folder(path: str) -> bool:
    """Whether a folder exists; on an object store: whether anything is below the path."""
    fs, root = filesystem(path)
    return fs.get_file_info(root).type == pyarrow.fs.FileType.Directory


def names(folder: str) -> list[str]:
    """Sorted names of the files and folders in a folder; none if it does not exist."""
    fs, root = filesystem(folder)
    selector = pyarrow.fs.FileSelector(root, allow_not_found=True)
    try:
        infos = fs.get_file_info(selector)
    except FileNotFoundError:  # another process made the folder just after Arrow had not found it
        infos = fs.get_file_info(selector)
    return sorted(info.base_name for info in infos)


def read(path: str, limit: int | None = None) -> bytes:
    """Read a small file.

    Raises:
        StorageError: the disk, the mount or the network failed.
        OSError: it does not exist, or the store does not answer.
        ValueError: it has more bytes than `limit`.
    """
    fs, root = filesystem(path)
    try:
        if limit is not None and (size := fs.get_file_info(root).size or 0) > limit:
            raise ValueError(f"it has {size:,} bytes, more than {limit:,}")
        with fs.open_input_stream(root, compression=None) as stream:
            return stream.read()
    except OSError as error:
        raise_storage_failure(error, path)
        raise


def write(path: str, data: bytes) -> None:
    """Write a small file in one step: readers see the old one or the new one, never a part.

    Raises:
        OSError: it cannot be written.
    """
    if remote(path):
        fs, root = filesystem(path)
        with fs.open_output_stream(root, compression=None) as stream:
            stream.write(data)
        return
    temporary = path + ".tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            os.remove(temporary)
        if error.errno is not None:
            error.filename = path  # a full disk does not say where
        raise


def write_json(path: str, value: dict[str, Any], sealed: bool = True) -> None:
    """Write a JSON file in one step: readers see the old one or the new one, never a part.

    Args:
        path: of the file.
        value: a JSON object.
        sealed: whether it gets a checksum, which `read_json` checks.
    """
    write(path, json.dumps(seal(value) if sealed else value, indent=1).encode())


def read_json(path: str) -> dict[str, Any] | None:
    """Read a JSON object; None if the file does not exist.

    Raises:
        InputError: it is damaged.
    """
    if not exists(path):
        return None
    try:
        return parse_object(read(path, JSON_BYTES))
    except ValueError as error:
        raise damaged(path, error) from None


def damaged(path: str, reason: object) -> InputError:
    """The error for a small file whose content cannot be used."""
    return InputError(
        f"{path} is damaged ({reason}); restore it, or remove what it belongs to, so that an older one is used"
    )


def append(path: str, text: str) -> None:
    """Append lines to a small file, which is rewritten on an object store; one process at a time may.

    Raises:
        OSError: it cannot be written.
    """
    if remote(path):
        return write(path, (read(path) if exists(path) else b"") + text.encode())
    with open(path, "a") as file:
        file.write(text)


def make_folder(path: str) -> None:
    """Create a folder and its parents, if they do not exist.

    Raises:
        OSError: it cannot be created.
    """
    fs, root = filesystem(path)
    fs.create_dir(root, recursive=True)


def remove(folder: str, first: str | None = None) -> None:
    """Delete a folder and everything in it, if it exists.

    Args:
        folder: path or URI.
        first: name of the file to delete before the others: the one that marks the folder as complete.

    Raises:
        OSError: it cannot be deleted.
    """
    fs, root = filesystem(folder)
    if first is not None and exists(f"{folder}/{first}"):
        fs.delete_file(f"{root}/{first}")
    if is_folder(folder):
        fs.delete_dir(root)


class Streams:
    """Implements torch.distributed.checkpoint's `FileSystemBase` on the file system of a URI."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.fs, self.root = filesystem(path)

    def _strip_uri(self, path: str | os.PathLike[str]) -> str:
        return self.root + os.fspath(path).removeprefix(self.path)

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        """Open a stream of bytes to read (`rb`) or to write (`wb`)."""
        if mode == "rb":
            with io.BufferedReader(self.fs.open_input_file(self._strip_uri(path)), READ_AHEAD) as stream:
                yield stream
        else:
            with self.fs.open_output_stream(self._strip_uri(path), compression=None) as stream:
                yield stream

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        """The path of a file in a folder."""
        return f"{os.fspath(path)}/{suffix}"

    def init_path(self, path: str | os.PathLike[str]) -> str:
        """The path as a string, which the other methods take."""
        return os.fspath(path)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Rename a file: on an object store it is copied, and the old one is deleted."""
        self.fs.move(self._strip_uri(path), self._strip_uri(new_path))

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """Create a folder."""
        self.fs.create_dir(self._strip_uri(path), recursive=True)

    def exists(self, path: str | os.PathLike[str]) -> bool:
        """Whether a file exists."""
        return self.fs.get_file_info(self._strip_uri(path)).type != pyarrow.fs.FileType.NotFound

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        """Delete a file."""
        self.fs.delete_file(self._strip_uri(path))

    def ls(self, path: str | os.PathLike[str]) -> list[str]:
        """Paths of the files in a folder."""
        return [self.concat_path(path, name) for name in names(os.fspath(path))]
