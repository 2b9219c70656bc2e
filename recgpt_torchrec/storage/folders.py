"""A folder that is committed whole or not at all: written under a temporary name, its manifest last."""

import fcntl
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

import pyarrow.fs

from recgpt_torchrec.errors import InputError
from recgpt_torchrec.storage.files import filesystem

MANIFEST = "manifest.json"
"""Says what is in a folder; it is written last, so a folder without one is not whole."""

RENAMING = ("local", "hdfs")
"""File systems where a folder is renamed in one step."""
INCOMPLETE = ".incomplete"
"""A file in a folder, as long as the folder is being written."""


@contextmanager
def stage_folder(path: str) -> Iterator[tuple[pyarrow.fs.FileSystem, str]]:
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


def check_free(path: str, name: str = "dataset") -> None:
    """Raise `InputError` unless `path` does not exist, is an empty folder, or one that a kill left half written.

    `name` is what would be welcome.
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
                f"--output {path} already holds something that is not a finished {name} ({', '.join(there[:3])}"
                f"{more}); nothing was touched. Name a folder that does not exist or is empty"
            )


def write_manifest(fs: pyarrow.fs.FileSystem, folder: str, manifest: str) -> None:
    """Write `manifest.json`, given as text; everything it promises must be there already."""
    with fs.open_output_stream(f"{folder}/{MANIFEST}", compression=None) as stream:
        stream.write(manifest.encode())
