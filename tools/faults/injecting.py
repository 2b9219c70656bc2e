"""The faults: what each does to a node, how it is mended, and how a job with it is launched."""

import contextlib
import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tools.faults import storage_errors
from tools.faults.nodes import NODES, Nodes, scratch_disk

DISK_MEBIBYTES = 64
"""Size of the disk for results."""
SLOW_SECONDS = 0.15
"""A slow node's processes are stopped for this long, and then run for a third of it."""


@dataclass
class Place:
    """Where a fault happens."""

    nodes: Nodes
    disk: Path
    """The disk for results, which both nodes mount."""
    stall_seconds: float
    """Of the stages."""
    ended: threading.Event = field(default_factory=threading.Event)
    """Set once the job has ended."""


@dataclass(frozen=True)
class Fault:
    """A fault of a node."""

    text: str
    node: int | None
    """The node that it happens to, which is to be named; None: the disk of both."""
    inject: Callable[[Place], None] = lambda place: None
    mend: Callable[[Place], None] = lambda place: None
    hours: float = 0.0
    """By which the clock of node 1 is ahead, from the start on."""
    goes_on: bool = False
    """Whether the job is to end as if nothing had happened."""
    names: tuple[str, ...] = ()
    """Parts of messages of either node, one of which has to say what failed; none: a living one has to name `node`."""
    needs_library: bool = False
    """Whether calls to the system fail, see `storage_errors`."""


def _unplug(place: Place, node: int, *, kill: bool) -> None:
    place.nodes.plug(node, "down")
    if kill:
        place.nodes.kill(node)


def _slow_down(place: Place, node: int) -> None:
    def alternate() -> None:
        while not place.ended.wait(SLOW_SECONDS / 3):
            place.nodes.send(node, signal.SIGSTOP)
            place.ended.wait(SLOW_SECONDS)
            place.nodes.send(node, signal.SIGCONT)

    threading.Thread(target=alternate, daemon=True).start()


def _fill(place: Place) -> None:
    with open(place.disk / "filling", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(2**16))


def _fill_at_once(place: Place) -> None:
    """Fill the disk, and keep it full while files on it are deleted."""
    _fill(place)

    def keep_full() -> None:
        while not place.ended.wait(0.05):
            with open(place.disk / "filling", "ab", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise

    threading.Thread(target=keep_full, daemon=True).start()


def _unmount_everywhere(place: Place) -> None:
    for node in range(NODES):
        place.nodes.unmount(node, place.disk)


def _storage_error(number: int, *, writes: bool) -> Fault:
    """Reads, or writes, of node 1 fail: of all files that the job reads or of all that it writes."""

    def inject(place: Place) -> None:
        folder = place.disk if writes else place.disk.parent
        storage_errors.let_fail(folder, place.nodes.host(1), number, writes=writes)

    return Fault(
        f"{'writes' if writes else 'reads'} of node 1 fail with {errno.errorcode[number]}: {os.strerror(number)}",
        1,
        inject,
        lambda place: storage_errors.mend(),
        names=(
            f"node1 cannot {'write' if writes else 'read'}",
            "node1 cannot keep",
            "rank 1 cannot read",
            "(rank 1): OSError",
        ),
        needs_library=True,
    )


FAULTS = {
    "node 1 killed": Fault(
        "all processes of node 1 end by SIGKILL; its connections are closed",
        1,
        lambda place: place.nodes.kill(1),
    ),
    "node 0 killed": Fault("the same of node 0, which serves the job's store", 0, lambda place: place.nodes.kill(0)),
    "node 1 unplugged": Fault(
        "node 1 is disconnected, then killed: no packet says so",
        1,
        lambda place: _unplug(place, 1, kill=True),
        lambda place: place.nodes.plug(1, "up"),
    ),
    "node 0 unplugged": Fault(
        "the same of node 0",
        0,
        lambda place: _unplug(place, 0, kill=True),
        lambda place: place.nodes.plug(0, "up"),
    ),
    "network cut": Fault(
        "the nodes are disconnected, and both live",
        1,
        lambda place: _unplug(place, 1, kill=False),
        lambda place: place.nodes.plug(1, "up"),
    ),
    "node 1 slow": Fault(
        "processes of node 1 run a quarter of the time", 1, lambda place: _slow_down(place, 1), goes_on=True
    ),
    "clock 30 h ahead": Fault("the clock of node 1 is 30 hours ahead", 1, hours=30, goes_on=True),
    "clock 30 h behind": Fault("the clock of node 1 is 30 hours behind", 1, hours=-30, goes_on=True),
    "disk full": Fault(
        "the disk for results is full, and stays so",
        None,
        _fill_at_once,
        lambda place: os.remove(place.disk / "filling"),
        names=("/disk",),
    ),
    "disk gone from node 1": Fault(
        "node 1 loses the mount of the disk for results; an empty folder is there instead",
        1,
        lambda place: place.nodes.unmount(1, place.disk),
        names=("/disk",),
    ),
    "disk gone": Fault(
        "both nodes lose it",
        None,
        _unmount_everywhere,
        names=("/disk",),
    ),
    "reads fail (EIO)": _storage_error(errno.EIO, writes=False),
    "reads fail (ESTALE)": _storage_error(errno.ESTALE, writes=False),
    "writes fail (EIO)": _storage_error(errno.EIO, writes=True),
    "writes fail (ESTALE)": _storage_error(errno.ESTALE, writes=True),
}


@contextlib.contextmanager
def place_of_faults(folder: Path, stall_seconds: float) -> Iterator[Place]:
    """Two nodes and a disk for results, within the `with`."""
    with scratch_disk(folder / "disk", DISK_MEBIBYTES) as disk, Nodes() as nodes:
        yield Place(nodes, disk, stall_seconds)
