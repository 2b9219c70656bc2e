"""Heartbeats in the job's store, where each rank's last one stays readable after it was stopped or killed."""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from recgpt_torchrec.distributed.group.waiting import count_waits, waited_seconds

T = TypeVar("T")
Heartbeat = dict[str, Any]
ANSWER_SECONDS = 10.0
"""How long a question to the store is waited for. A store behind a network that is cut neither answers nor fails."""


def ask_within(seconds: float, question: Callable[[], T]) -> T:
    """Ask the job's store in a thread of its own, and wait for the answer.

    Raises:
        TimeoutError: it has not answered within `seconds`.
    """
    answers: list[tuple[T | None, Exception | None]] = []

    def ask() -> None:
        try:
            answers.append((question(), None))
        except Exception as error:
            answers.append((None, error))

    thread = threading.Thread(target=ask, daemon=True, name="store")
    thread.start()
    thread.join(seconds)
    if not answers:
        raise TimeoutError(f"the job's store has not answered for {seconds:g} s")
    answer, failure = answers[0]
    if failure is not None:
        raise failure
    return answer  # type: ignore[return-value]


class Heartbeats:
    """Writes this rank's heartbeats, in a thread of its own, and reads those of the others (made collectively)."""

    def __init__(self, interval: float, describe: Callable[[], Heartbeat]) -> None:
        """
        Args:
            interval: seconds between two heartbeats.
            describe: what this rank is doing.
        """
        self.interval, self.describe = interval, describe
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.answered = time.monotonic()
        """When the store last answered."""
        self.is_lost = False
        """Whether the store has failed, and so has the process that served it."""
        self.is_stalled = False
        """Whether a rank has found the run stalled."""
        # A connection of its own: on a shared one, a thread that waits would block this one. Without the name that
        # rank 0 draws, a run that torchrun has restarted would read the heartbeats of the processes before.
        name = [secrets.token_hex(4)]
        dist.broadcast_object_list(name, src=0)
        self.hosts = [""] * self.world_size
        """Of each rank."""
        dist.all_gather_object(self.hosts, socket.gethostname())
        self._started = time.monotonic()
        count_waits()
        connection: Any = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore(f"heartbeats-{name[0]}", connection.clone())
        self._number, self._has_ended = 0, False
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self, finished: threading.Event) -> None:
        """Write the first heartbeat, then one in each interval until `finished`."""
        self.write()
        self._thread = threading.Thread(target=self._run, args=(finished,), daemon=True, name="heartbeats")
        self._thread.start()

    def join(self, seconds: float) -> None:
        """Wait, at most so long, until the thread has ended; it does soon after `finished`, if the store answers."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self, finished: threading.Event) -> None:
        while not finished.wait(self.interval):
            try:
                self.write()
                self.is_stalled = self._store.check(["stalled"])
            except Exception:
                self.is_lost = True
                return
            self.answered = time.monotonic()

    def write(self, **more: Any) -> None:
        """Write a heartbeat; with `more`, how this rank ends, it is the last."""
        with self._lock:
            if self._has_ended:
                return
            self._number, self._has_ended = self._number + 1, bool(more)
            heartbeat = {"number": self._number, **self.own(), **more}
            self._store.set(f"rank-{self.rank}", json.dumps(heartbeat))

    def own(self) -> Heartbeat:
        """What this rank's heartbeat says now."""
        process = {"host": socket.gethostname(), "pid": os.getpid(), "process_start": _process_start(os.getpid())}
        return {**process, "clock": self.clock(), "waited": waited_seconds(), **self.describe()}

    def clock(self) -> float:
        """Seconds since the ranks met, on every node the same: clocks that tell the time of day may differ by hours."""
        return time.monotonic() - self._started

    def write_last(self, **more: Any) -> None:
        """Write the heartbeat of a rank that ends, if the store answers."""
        with contextlib.suppress(Exception):
            ask_within(ANSWER_SECONDS, lambda: self.write(**more))

    def read(self, ranks: list[int] | None = None) -> dict[int, Heartbeat]:
        """The last heartbeat of each other rank, by rank; without those that have not written any.

        Args:
            ranks: to read; None: all.

        Raises:
            Exception: the store is lost, or does not answer.
        """
        wanted = [each for each in (range(self.world_size) if ranks is None else ranks) if each != self.rank]

        def read() -> dict[int, Heartbeat]:
            keys = {each: f"rank-{each}" for each in wanted}
            return {each: json.loads(self._store.get(key)) for each, key in keys.items() if self._store.check([key])}

        return ask_within(ANSWER_SECONDS, read)

    def report_stall(self) -> bool:
        """Tell all ranks that the run has stalled; returns whether this rank is the first to say so."""
        return ask_within(ANSWER_SECONDS, lambda: self._store.add("stalled", 1)) == 1


class Listener:
    """Follows the heartbeats of other ranks: when was something new heard of each?

    Rank 0 follows all others, and each of them rank 0.
    """

    def __init__(self, heartbeats: Heartbeats) -> None:
        self.heartbeats = heartbeats
        self._followed = [0] if heartbeats.rank else list(range(1, heartbeats.world_size))
        self._heard: dict[int, tuple[int, float]] = {}

    def listen(self) -> dict[int, Heartbeat]:
        """Read the heartbeats; returns those of the ranks that this one follows.

        Raises:
            Exception: the store is lost, or does not answer.
        """
        latest, now = self.heartbeats.read(self._followed), time.monotonic()
        for each in self._followed:
            beat = latest.get(each, {"number": 0})
            number = -1 if beat.get("finished") else beat["number"]
            if self._heard.get(each, (None, 0.0))[0] != number:
                self._heard[each] = number, now
        return latest

    def silent(self, seconds: float) -> list[int]:
        """Ranks of which nothing was heard for that long, without those that have finished."""
        now = time.monotonic()
        return [each for each, (number, heard) in self._heard.items() if number >= 0 and now - heard >= seconds]

    def forget(self) -> None:
        """Start counting again."""
        self._heard = {}


def _process_start(process: int) -> str | None:
    """When a process was started, in clock ticks since boot; None: it does not exist, or has ended."""
    try:
        with open(f"/proc/{process}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def is_running_here(beat: Heartbeat) -> bool:
    """Whether the process of a heartbeat is on this machine and has not ended."""
    start = beat["process_start"]
    return beat["host"] == socket.gethostname() and start is not None and _process_start(beat["pid"]) == start


def has_ended_here(beat: Heartbeat) -> bool:
    """Whether the process of a heartbeat was on this machine and has ended."""
    start = beat["process_start"]
    return beat["host"] == socket.gethostname() and start is not None and _process_start(beat["pid"]) != start


def describe_rank(other: int, beat: Heartbeat, silent_seconds: float | None) -> str:
    """What another rank is doing, or was when it was last heard of, in words.

    Args:
        other: the rank.
        beat: its last heartbeat.
        silent_seconds: how old that is; None: the rank lives.
    """
    place = f"{beat['phase']}, after step {beat['step']}, on {beat['host']}, process {beat['pid']}"
    if beat.get("end_reason"):
        return f"rank {other}: ended {beat['end_reason']}; it was at: {place}"
    if silent_seconds is not None:
        return f"rank {other}: no heartbeat for {silent_seconds:.0f} s; it was at: {place}"
    phase = f"{beat['phase']} for {beat['phase_seconds']:.0f} s"
    return f"rank {other}: {phase}, after step {beat['step']}, on {beat['host']}"
