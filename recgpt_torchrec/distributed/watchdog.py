"""What each rank is doing, told to the others once a second; and an end to runs in which nothing moves any more.

Whoever does something says so: `with phase("reading data"): ...`. A thread of each rank's `Watchdog` writes that into
the job's store, where it is when this process is stopped or killed, and reads what the others wrote when there is no
progress, or when a connection broke: so a rank that is missing is named by those that miss it.
"""

import contextlib
import faulthandler
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch.distributed as dist

from recgpt_torchrec.distributed.processes import rank, world_size
from recgpt_torchrec.errors import LOST, STALLED

SHOWN = 16
"""Ranks listed in a report at most."""

_BROKEN = re.compile(r"gloo|NCCL|Connection (closed|reset)|Broken pipe|Timed out waiting|Socket", re.IGNORECASE)
"""What errors of collective operations say when another rank is gone."""


class Status(NamedTuple):
    """What a rank is doing."""

    phase: str
    step: int
    """Optimizer steps done."""
    since: float
    """Of `time.monotonic`."""


_status = Status("starting", 0, time.monotonic())


def current_status() -> Status:
    """What this rank is doing."""
    return _status


def report_phase(phase: str, step: int | None = None) -> None:
    """Say what this rank does from now on; every call counts as progress."""
    global _status
    _status = Status(phase, _status.step if step is None else step, time.monotonic())


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Say what this rank does within the `with`. After an error it goes on saying so: that is where it stands."""
    before = _status
    report_phase(name)
    yield
    report_phase(before.phase)


class Watchdog:
    """Ends this rank, and so the run, where there was no progress for some time; names ranks that are gone.

    Example: `with Watchdog("runs/mine", stall_seconds=600): ...` inside the process group
    """

    def __init__(self, output: str, stall_seconds: float, marker: str = "") -> None:
        """
        Args:
            output: the run's folder; stacks are written to stacks/rank-N.txt in it.
            stall_seconds: without progress, until it ends; 0: never.
            marker: name of a file in the folder that says it is this run's; without it no stacks are written there.
        """
        self.output, self.stall_seconds, self.marker = output, stall_seconds, marker
        self.interval = min(1.0, stall_seconds / 10) if stall_seconds else 1.0
        self.store: Any = _store_of_its_own() if world_size() > 1 else None
        self._beats = 0
        self._ended: str | None = None
        self._over = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> "Watchdog":
        report_phase("starting")
        if not faulthandler.is_enabled():
            # Ended by SIGABRT it shows where it was: this thread alone, the others may be running.
            faulthandler.enable(sys.__stderr__ or 2, all_threads=False)
        self._beat()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *trace: object) -> None:
        lost = isinstance(error, RuntimeError) and world_size() > 1 and _BROKEN.search(str(error)) is not None
        self._over.set()
        self._ended = None
        if error is not None:
            # The others see only that the connection is closed.
            self._ended = "for want of another rank" if lost else f"with {type(error).__name__}"
            with contextlib.suppress(Exception):
                self._beat()
        if lost:
            assert error is not None
            try:
                missing = self._missing() if self.store is not None else "the launcher"
            except Exception as unknown:  # the store may be gone as well
                missing = f"another rank ({type(unknown).__name__} where the ranks' whereabouts are kept)"
            what = " ".join(str(error).split())[:200]
            here = f"rank {rank()} was at: {_status.phase}, after step {_status.step}"
            print(f"lost {missing}; {here} ({what})", file=sys.stderr, flush=True)
            raise SystemExit(LOST) from None

    # ------------------------------------------------------------------------------------------------ the thread

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._over.wait(self.interval):
            now = time.monotonic()
            if now - last > 5 * self.interval + 1:
                report_phase(
                    _status.phase
                )  # this process was itself stopped for a while, perhaps all of them: count anew
            last = now
            called = False
            try:
                self._beat()
                called = self.store is not None and self.store.check(["stalled"])
            except Exception:  # the store is gone, and so is who had it: the launcher, or else rank 0
                if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                    return
                self._orphaned()
            if called:
                self._end("another rank found the run stalled")
            # What follows takes two intervals, and counts to the time that was given.
            if self.stall_seconds and now - _status.since >= self.stall_seconds - 3 * self.interval:
                self._stalled(_status)
                last = time.monotonic()

    def _orphaned(self) -> None:
        """Ask this rank to end, as the launcher would have: who starts the job again must not meet this one."""
        self.store = None
        if not self._over.wait(3 * self.interval):  # else this rank is ending, and so may be the launcher
            with contextlib.suppress(OSError):  # what the launcher read may be closed
                print(f"rank {rank()}: the launcher is gone; the run ends here", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGTERM)

    def _beat(self) -> None:
        if self.store is None:
            return
        with self._lock:
            self._beats += 1
            phase, step, since = _status
            beat = {"phase": phase, "step": step, "for": time.monotonic() - since, "time": time.time()}
            beat |= {"beats": self._beats, "ended": self._ended, "host": socket.gethostname(), "pid": os.getpid()}
            self.store.set(f"beat/{rank()}", json.dumps(beat | {"born": _born(os.getpid())}))

    def _others(self) -> dict[int, dict[str, Any]]:
        """What the other ranks wrote last; nothing of those that never came so far."""
        ranks = [other for other in range(world_size()) if other != rank() and self.store.check([f"beat/{other}"])]
        return {other: json.loads(self.store.get(f"beat/{other}")) for other in ranks} if ranks else {}

    def _stalled(self, before: Status) -> None:
        """Look at the others for two intervals, and end if there was no progress here in this time either."""
        earlier = self._others() if self.store is not None else {}
        time.sleep(2 * self.interval)
        if _status != before or self._over.is_set():
            return
        age = time.monotonic() - before.since
        lines = [f"rank {rank()}: {before.phase}, since {age:.0f} s, after step {before.step}"]
        silent = []
        if self.store is not None:
            if self.store.add("stalled", 1) > 1:
                self._end("another rank found the run stalled")
            now = self._others()
            silent = [other for other, beat in earlier.items() if beat["beats"] == now[other]["beats"]]
            places = Counter((beat["phase"], beat["step"]) for beat in now.values())
            rare = sorted(now, key=lambda o: (o not in silent, places[now[o]["phase"], now[o]["step"]], o))
            lines = [_said(other, now[other], other in silent) for other in rare[:SHOWN]] + lines
            for other in range(world_size()):
                if other != rank() and other not in now:
                    lines.insert(0, f"rank {other}: never gave a sign of life")
        text = "\n  ".join([f"no progress for {self.stall_seconds:g} s; the run ends here. Who stands where:", *lines])
        print(text, file=sys.stderr, flush=True)
        self._dump()
        for other in silent:  # a stopped process hears no SIGTERM, and the launcher would wait for it
            if _lives_here(now[other]):
                os.kill(now[other]["pid"], signal.SIGABRT)
                os.kill(now[other]["pid"], signal.SIGCONT)
        os._exit(STALLED)

    def _dump(self) -> None:
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        if not os.path.exists(os.path.join(self.output, self.marker)):
            return  # the folder is not this run's so far
        with contextlib.suppress(OSError):
            folder = os.path.join(self.output, "stacks")
            os.makedirs(folder, exist_ok=True)
            with open(os.path.join(folder, f"rank-{rank()}.txt"), "w") as file:
                file.write(f"{_status.phase}, after step {_status.step}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)

    def _end(self, why: str) -> None:
        here = f"rank {rank()}: {_status.phase}, after step {_status.step}"
        print(f"{why}; {here}", file=sys.stderr, flush=True)
        self._dump()
        os._exit(STALLED)

    # -------------------------------------------------------------------------------------------- who is missing

    def _missing(self) -> str:
        """The ranks that are gone, with the reason where one is known."""
        earlier = self._others()
        gone = {other: "its process ended" for other, beat in earlier.items() if _died_here(beat)}
        if not gone:
            time.sleep(3 * self.interval)
            now = self._others()
            gone = {other: "no sign of life" for other, beat in now.items() if beat["beats"] == earlier[other]["beats"]}
        for other, beat in self._others().items():
            if beat["ended"]:
                gone[other] = f"it ended {beat['ended']}"
        causes = {other: why for other, why in gone.items() if "want of" not in why} or gone
        if not causes:
            return "the connection to another rank"
        listed = [f"rank {other} ({why})" for other, why in sorted(causes.items())[:SHOWN]]
        return ", ".join(listed) + (f" and {len(causes) - SHOWN} more" if len(causes) > SHOWN else "")


def _store_of_its_own() -> Any:
    """A connection to the job's store that no other thread uses: one that waits there would hold this one up."""
    store: Any = dist.distributed_c10d._get_default_store()
    return store.clone()


def _said(other: int, beat: dict[str, Any], silent: bool) -> str:
    place = f"{beat['phase']}, after step {beat['step']}, on {beat['host']}, process {beat['pid']}"
    if beat["ended"]:
        return f"rank {other}: ended {beat['ended']}; it was at: {place}"
    if silent:
        return f"rank {other}: no sign of life since {time.time() - beat['time']:.0f} s; it was at: {place}"
    return f"rank {other}: {beat['phase']}, since {beat['for']:.0f} s, after step {beat['step']}, on {beat['host']}"


def _born(process: int) -> str | None:
    """When a process was started, by the system's clock; None: there is none, or it ended."""
    try:
        with open(f"/proc/{process}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _lives_here(beat: dict[str, Any]) -> bool:
    return beat["host"] == socket.gethostname() and beat["born"] is not None and _born(beat["pid"]) == beat["born"]


def _died_here(beat: dict[str, Any]) -> bool:
    return beat["host"] == socket.gethostname() and beat["born"] is not None and _born(beat["pid"]) != beat["born"]
