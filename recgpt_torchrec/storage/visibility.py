"""Waits until this node sees what another node has written.

A network file system may show a node an older state of a folder for up to a minute (NFS keeps attributes for 60 s).
What is still missing then is on another disk: it is not mounted on one of the nodes, or was lost.
"""

import socket
import time
from collections.abc import Callable, Iterable

import pyarrow.fs

from recgpt_torchrec.errors import InputError
from recgpt_torchrec.storage.parts import Part

WAIT_SECONDS = 60.0
"""How long another node's files are waited for."""
AGAIN_SECONDS = 0.5
"""Time between two looks."""


def await_sight(find_missing: Callable[[], str | None], folder: str, advance: Callable[[], None]) -> None:
    """Wait until nothing is missing.

    Args:
        find_missing: looks, and returns the name of something that is missing, or None.
        folder: where, for the message.
        advance: called at each look: waiting is progress.

    Raises:
        InputError: something is still missing after `WAIT_SECONDS`.
    """
    until = time.monotonic() + WAIT_SECONDS
    while (missing := find_missing()) is not None:
        if time.monotonic() >= until:
            raise InputError(
                f"{socket.gethostname()} does not see {missing} in {folder}, which another rank has written or read; "
                "make sure that the same disk is mounted there on every node, and give the same command again"
            )
        advance()
        time.sleep(AGAIN_SECONDS)


def await_files(
    fs: pyarrow.fs.FileSystem, folder: str, sizes: Iterable[tuple[str, int]], advance: Callable[[], None]
) -> None:
    """Wait until files are there with at least their sizes.

    Args:
        fs: file system of `folder`.
        folder: on `fs`.
        sizes: path relative to `folder`, and bytes of each file.
        advance: see `await_sight`.

    Raises:
        InputError: see `await_sight`.
    """
    expected = dict(sizes)

    def find_missing() -> str | None:
        infos = fs.get_file_info([f"{folder}/{path}" for path in expected])
        found = zip(expected.items(), infos, strict=True)
        return next((path for (path, size), info in found if not info.is_file or (info.size or 0) < size), None)

    await_sight(find_missing, folder, advance)


def await_parts(fs: pyarrow.fs.FileSystem, folder: str, parts: Iterable[Part], advance: Callable[[], None]) -> None:
    """Wait until the parts that a manifest is to promise are there, see `await_files`."""
    await_files(fs, folder, ((part.path, part.bytes) for part in parts), advance)
