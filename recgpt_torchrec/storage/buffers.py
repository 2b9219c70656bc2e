"""Bytes that processes only read: small ones in memory, large ones in a file that the system maps into it."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.reduction import DupFd
from typing import IO, Any

import numpy as np
import numpy.typing as npt

IN_MEMORY = 64 * 2**20
"""Size up to which a buffer is worth a copy in the memory of each process, in bytes."""
PREFIX = ".recgpt-"
"""Of the names of files that are mapped."""
Fill = Callable[[npt.NDArray[np.uint8], Callable[[float], None]], None]
"""Fills [size] uint8 in place, and calls the function with the amount of work done since its last call."""


def map_file(file: IO[bytes], size: int, mode: str = "r") -> npt.NDArray[np.uint8]:
    """Map a file's first `size` bytes into memory, [size] uint8; with mode `r+` it gets that size, filled with zeros.

    Raises:
        OSError: the disk is full.
    """
    if mode == "r+":
        os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, not a fault at a page
    mapped = np.memmap(file, np.uint8, mode, shape=(size,))  # type: ignore[call-overload]
    return np.asarray(mapped)  # of numpy's plain class, whose slices cost less


class Buffer:
    """Bytes in memory, or in a file that was removed once it was open: nothing is left of it after a kill.

    A pickled one travels to another process by its file's descriptor.
    """

    def __init__(self, content: npt.NDArray[np.uint8], file: IO[bytes] | None = None) -> None:
        """`content` [size] uint8 is that of `file`, if it is mapped."""
        self.bytes, self._file = content, file

    def __getstate__(self) -> tuple[Any, int]:
        return (self.bytes, -1) if self._file is None else (DupFd(self._file.fileno()), self.bytes.size)

    def __setstate__(self, state: tuple[Any, int]) -> None:
        content, size = state
        self._file = None if size < 0 else os.fdopen(content.detach(), "rb")
        self.bytes = content if self._file is None else map_file(self._file, size)


def fill_in_memory(_name: str, size: int, fill: Fill, _total: float = 0, _unit: str = "") -> Buffer:
    """A buffer of `size` bytes in this process's memory, filled."""
    buffer = Buffer(np.zeros(size, np.uint8))
    fill(buffer.bytes, lambda _: None)
    return buffer


@contextmanager
def named_buffer(size: int, folder: str | None = None) -> Iterator[tuple[str, Buffer]]:
    """Make a file of zeros to fill within the `with`, where other processes open it by its path; then it is removed.

    Args:
        size: in bytes.
        folder: on a local disk; None: the machine's temporary one.

    Raises:
        OSError: there is no space for it.
    """
    with tempfile.NamedTemporaryFile(prefix=PREFIX, dir=folder, buffering=0) as named:
        file = os.fdopen(os.dup(named.fileno()), "rb")
        yield named.name, Buffer(map_file(named, size, "r+"), file)


def open_buffer(path: str, size: int) -> Buffer:
    """Map a file that another process makes by `named_buffer`.

    Raises:
        OSError: it cannot be opened, or has another size.
    """
    file = open(path, "rb")
    if os.fstat(file.fileno()).st_size != size:
        file.close()
        raise OSError(f"{path} has another size than the {size:,} bytes that were written")
    return Buffer(map_file(file, size), file)
