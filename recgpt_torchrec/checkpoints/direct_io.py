"""Local files written past the page cache, for checkpoints: they are large, and read once if ever.

Through the page cache their bytes cost the kernel more than the disk does: pages are found, filled, written and thrown
away again, on the cores that train. Measured by tools/benchmark_step.py, 250 MiB from two ranks on two idle
cores: 0.05 s of each rank's core instead of 0.30, and training with a checkpoint every 2.9 s takes 1.06 of the time
without any instead of 1.19.
"""

import errno
import fcntl
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from mmap import mmap
from typing import Any

import numpy as np
from torch.distributed.checkpoint.filesystem import FileSystem

BLOCK = 2**22
"""Bytes of one write: a multiple of any disk's sector, which direct writes are made of."""


class DirectFile(io.RawIOBase):
    """A new local file that is written from its beginning to its end; it lasts through a loss of power once closed.

    Its last piece, which fills no sector, and all of it where the file system takes no direct writes, go through the
    page cache.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            self._handle = os.open(path, flags | os.O_DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._handle = os.open(path, flags, 0o666)
        self._block = np.frombuffer(mmap(-1, BLOCK), np.uint8)  # a disk reads from whole pages of memory only
        self._filled = self._written = 0

    def writable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Bytes taken so far."""
        return self._written + self._filled

    def write(self, data: Any) -> int:
        """Take all of some bytes.

        Raises:
            OSError: they cannot be written.
        """
        left = memoryview(data).cast("B")
        size = left.nbytes
        while left:
            piece = left[: BLOCK - self._filled]
            # numpy's copy lets other threads of Python run
            self._block[self._filled : self._filled + len(piece)] = np.frombuffer(piece, np.uint8)
            self._filled += len(piece)
            left = left[len(piece) :]
            if self._filled == BLOCK:
                self._put()
        return size

    def _put(self) -> None:
        done = 0
        while done < self._filled:
            try:
                done += os.write(self._handle, self._block[done : self._filled].data)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._through_the_cache():
                    raise
        self._written += self._filled
        self._filled = 0

    def _through_the_cache(self) -> bool:
        """Make no direct writes from here on; returns whether they were made so far."""
        flags = fcntl.fcntl(self._handle, fcntl.F_GETFL)
        fcntl.fcntl(self._handle, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        return bool(flags & os.O_DIRECT)

    def close(self) -> None:
        """Write what is left and wait until the disk has it."""
        if self.closed:
            return
        super().close()
        try:
            self._through_the_cache()
            self._put()
            os.fsync(self._handle)
        finally:
            os.close(self._handle)


class DirectFiles(FileSystem):
    """The local disk as torch.distributed.checkpoint wants it."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        """A stream of bytes to read (`rb`) or to write (`wb`)."""
        with DirectFile(path) if mode == "wb" else open(path, mode) as stream:
            yield stream
