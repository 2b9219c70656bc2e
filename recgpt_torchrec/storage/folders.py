"""Commits a folder whole or not at all: it is written under a temporary name, its manifest last."""

import fcntl
import glob
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress

import pyarrow.fs

from recgpt_torchrec.errors import InputError
from recgpt_torchrec.storage.failing import raise_storage_failure
from recgpt_torchrec.storage.files import exists, filesystem, make_folder, remove, scratch_beside
from recgpt_torchrec.storage.typed import seal

MANIFEST = "manifest.json"
"""Lists what is in a folder; it is written last, so a folder without one is incomplete."""

RENAMING = ("local", "hdfs")
"""File systems where a folder is renamed in one step."""
INCOMPLETE = ".incomplete"
"""Name of a file that is in a folder while the folder is being written."""


@contextmanager
def stage_folder(path: str) -> Iterator[tuple[pyarrow.fs.FileSystem, str]]:
    """Create a folder to write into, which becomes `path` when the `with` block ends without an error.

    Until then it has a temporary name beside `path`. Where folders cannot be renamed (object stores) it is `path` from
    the start, and complete only with its manifest, which is written last; until then the file `INCOMPLETE` in it says
    that it may be overwritten. After an error the folder is deleted. What a killed process left on a local disk is
    deleted when `path` is written again.

    Yields:
        The file system, and the folder on it.
    """
    fs, final = filesystem(path)
    if fs.type_name == "local":
        final = os.path.realpath(final)  # a link may lead to another disk; its target is replaced
    parent, name = os.path.split(final)
    renames = fs.type_name in RENAMING
    folder = f"{parent}/.{name}.incomplete-{_own_ending()}" if renames else final
    try:
        fs.create_dir(folder, recursive=True)
        fs.delete_dir_contents(folder)  # nothing, or left by a killed process: `check_free` made sure
        with fs.open_output_stream(f"{folder}/{INCOMPLETE}", compression=None) as stream:
            stream.write(b"being written")
        with _hold_lock(parent, name, folder) if fs.type_name == "local" else nullcontext():
            yield fs, folder
            fs.delete_file(f"{folder}/{INCOMPLETE}")
            if renames:
                if fs.get_file_info(final).type == pyarrow.fs.FileType.Directory:
                    if fs.get_file_info(pyarrow.fs.FileSelector(final)):
                        raise InputError(f"another process wrote {path} during this run; give another --output")
                    fs.delete_dir(final)
                fs.move(folder, final)
    except BaseException as error:
        with suppress(OSError):  # the store does not answer: the first error is the one to report
            if fs.get_file_info(folder).type == pyarrow.fs.FileType.Directory:
                fs.delete_dir_contents(folder, missing_dir_ok=True)
                if renames:
                    fs.delete_dir(folder)
        raise_write_error(error, path)
        raise


def raise_write_error(error: BaseException, path: str) -> None:
    """Raise the error of a folder that cannot be written, where the system or storage has refused it.

    Raises:
        StorageError: the disk, the mount or the network failed.
        InputError: any other error of the system; the disk is full, for example.
    """
    raise_storage_failure(error, path, "write")
    if isinstance(error, OSError):
        raise InputError(f"cannot write {path}: {error}") from error


@contextmanager
def temporary_folder(path: str) -> Iterator[str]:
    """An empty folder beside the file `path` for what is gone when the `with` block ends; yields its path or URI.

    On a local disk each process has its own, and what killed ones left is deleted. On an object store there is one.

    Raises:
        OSError: it cannot be made, or not be removed at the end.
    """
    fs, root = filesystem(path)
    with ExitStack() as lock:
        if fs.type_name == "local":
            folder = _make_locked(*os.path.split(root), lock)
        else:
            folder = f"{path}.incomplete"
            remove(folder)
            make_folder(folder)
        try:
            yield folder
        except BaseException:
            with suppress(OSError):  # the first error is the one to report
                remove(folder)
            raise
    try:
        remove(folder)  # without its lock, since NFS keeps what is open
    except OSError:
        if exists(folder):  # else another process has deleted it meanwhile
            raise


def _make_locked(parent: str, name: str, lock: ExitStack) -> str:
    """A new folder in `parent` that is this process's own until `lock` is closed."""
    make_folder(parent)
    while True:
        folder = tempfile.mkdtemp(prefix=f".{name}.incomplete-", dir=parent)
        with suppress(FileNotFoundError):  # another process took it for left over before it was locked
            open(f"{folder}/{INCOMPLETE}", "wb").close()
            lock.enter_context(_hold_lock(parent, name, folder, fcntl.LOCK_EX))  # who has it deletes the folder
            if os.path.exists(f"{folder}/{INCOMPLETE}"):
                return folder
        lock.close()


def _own_ending() -> str:
    """What tells this process from others that write to the same disk, whose numbers may be equal."""
    return f"{socket.gethostname()}-{os.getpid()}"


@contextmanager
def _hold_lock(parent: str, name: str, folder: str, how: int = fcntl.LOCK_EX | fcntl.LOCK_NB) -> Iterator[None]:
    """Hold the lock of `folder`, which is to become `parent`/`name`; delete other such folders that nobody holds."""
    for other in glob.glob(f"{glob.escape(parent)}/.{glob.escape(name)}.incomplete-*"):
        with suppress(OSError), open(f"{other}/{INCOMPLETE}", "rb+") as file:
            if other != folder:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(other)
    with open(f"{folder}/{INCOMPLETE}", "rb+") as file:
        with suppress(OSError):  # a file system without locks: nothing is deleted
            fcntl.flock(file, how)
        yield


def check_free(path: str, name: str, in_place: bool = False) -> None:
    """Check that a folder can be made: it is missing, empty, or left incomplete by a killed process.

    Args:
        path: of the folder.
        name: the kind of folder to be written there, for the message.
        in_place: whether it is written under its own name, not under a temporary one beside it.

    Raises:
        InputError: it cannot.
    """
    fs, root = filesystem(path)
    if fs.type_name == "local" and os.path.ismount(os.path.realpath(root)):
        raise InputError(f"--output {path} is a mount point, which cannot be replaced; name a folder in it")
    if fs.type_name == "local" and not in_place:
        real = os.path.realpath(root)  # a link may lead to another disk
        if not os.access(above := scratch_beside(real), os.W_OK | os.X_OK):
            inside = f"; name a folder in {path}" if os.access(real, os.W_OK | os.X_OK) else ""
            raise InputError(
                f"--output {path} is first written under a temporary name in {above}, which cannot be written{inside}"
            )
    info = fs.get_file_info(root)
    if info.type == pyarrow.fs.FileType.File:
        raise InputError(f"--output {path} is a file; name a folder that does not exist or is empty")
    if info.type == pyarrow.fs.FileType.Directory:
        entries = sorted(entry.base_name for entry in fs.get_file_info(pyarrow.fs.FileSelector(root)))
        if entries and INCOMPLETE not in entries:
            more = f" and {len(entries) - 3} more" if len(entries) > 3 else ""
            raise InputError(
                f"--output {path} already holds something that is not a finished {name} ({', '.join(entries[:3])}"
                f"{more}); nothing was touched. Name a folder that does not exist or is empty"
            )


def write_manifest(fs: pyarrow.fs.FileSystem, folder: str, manifest: str) -> None:
    """Write `manifest.json`, given as text, with a checksum; all files that it promises must be written already.

    Raises:
        InputError: it cannot be written.
    """
    try:
        with fs.open_output_stream(f"{folder}/{MANIFEST}", compression=None) as stream:
            stream.write(json.dumps(seal(json.loads(manifest)), indent=1).encode())
    except OSError as error:
        raise_storage_failure(error, f"{folder}/{MANIFEST}", "write")
        raise InputError(f"cannot write {folder}/{MANIFEST}: {error}") from error
