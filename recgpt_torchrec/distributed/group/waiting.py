"""How long each rank waits for the others, and which rank they wait for.

Every rank of a job takes as long as the slowest, so its speed says nothing of who that is; the slowest waits least.
Counted is the main thread's time in waits of collective operations, at 0.4 us of its own for each: on CPU these are all
waits but a part of DDP's, on CUDA those of the host alone, which show a rank that is slow at its data or on its host.
"""

import contextlib
import functools
import statistics
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist

from recgpt_torchrec.texts.words import count

WINDOW_SECONDS = 10.0
"""Minimum time over which waits are compared."""
NOTICEABLE = 0.2
"""Share of their time that other ranks have to wait more than the slowest until it is named."""

_waited, _since, _expected = 0.0, 0.0, 0


def count_waits() -> None:
    """Count the waits of this process's collective operations from now on."""
    original = dist.Work.wait
    if getattr(original, "is_counted", False):
        return

    @functools.wraps(original)
    def wait(self: dist.Work, *args: Any, **more: Any) -> bool:
        global _waited, _since
        if _expected or threading.current_thread() is not threading.main_thread():
            return original(self, *args, **more)
        _since = time.perf_counter()
        try:
            return original(self, *args, **more)
        finally:
            _waited, _since = _waited + time.perf_counter() - _since, 0.0

    wait.is_counted = True  # type: ignore[attr-defined]
    dist.Work.wait = wait  # type: ignore[method-assign]


@contextlib.contextmanager
def expected_wait() -> Iterator[None]:
    """Do not count the waits within the `with`: of ranks that have nothing to do while another works for all."""
    global _expected
    _expected += 1
    try:
        yield
    finally:
        _expected -= 1


def waited_seconds() -> float:
    """How long this process has waited, the wait that it is in included."""
    since = _since
    return _waited + (time.perf_counter() - since if since else 0.0)


class WaitWatch:
    """Compares how long ranks waited, from their heartbeats."""

    def __init__(self) -> None:
        self._earlier: Mapping[int, Mapping[str, Any]] = {}
        self._named: int | None = None
        self._periods = 0
        self._slow: dict[int, list[tuple[str, float, float]]] = {}

    def name_slowest(self, latest: Mapping[int, Mapping[str, Any]]) -> str | None:
        """Name the rank that the others wait for, once until it is another or none; None: nothing new.

        Args:
            latest: heartbeats of all ranks: `waited` and `clock` in seconds, `host`.
        """
        if not self._earlier.keys() >= latest.keys():
            self._earlier = latest
            return None
        earlier = self._earlier
        seconds = {each: beat["clock"] - earlier[each]["clock"] for each, beat in latest.items()}
        if len(latest) < 2 or min(seconds.values()) < WINDOW_SECONDS:
            return None
        self._earlier = latest
        shares = {each: (beat["waited"] - earlier[each]["waited"]) / seconds[each] for each, beat in latest.items()}
        slowest = min(shares, key=shares.__getitem__)
        others = statistics.median(share for each, share in shares.items() if each != slowest)
        self._periods += 1
        if others - shares[slowest] < NOTICEABLE:
            self._named = None
            return None
        self._slow.setdefault(slowest, []).append((latest[slowest]["host"], others, shares[slowest]))
        if slowest == self._named:
            return None
        self._named = slowest
        return (
            f"rank {slowest} ({latest[slowest]['host']}) is the slowest: the others waited {others:.0%} of the last "
            f"{seconds[slowest]:.0f} s for other ranks, it {shares[slowest]:.0%}"
        )

    def summarize(self) -> str | None:
        """The rank that was the slowest in at least half of what was compared, for the end of a stage; None: none was.

        Its shares are means over the periods in which it was.
        """
        slowest = max(self._slow, key=lambda each: len(self._slow[each]), default=None)
        if slowest is None or 2 * len(periods := self._slow[slowest]) < self._periods:
            return None
        hosts, others, own = zip(*periods, strict=True)
        waited, waits = statistics.fmean(others), statistics.fmean(own)
        return (
            f"rank {slowest} ({hosts[-1]}) was the slowest in {len(periods)} of {count(self._periods, 'period')} "
            f"compared: the others waited {waited:.0%} of the time for other ranks, it {waits:.0%}"
        )
