"""Heartbeats of all ranks: ends a run that makes no progress, and names ranks that are lost.

Code reports its phase: `with phase("reading data"): ...`. A thread of each rank's `Watchdog` writes the phase into the
job's store once a second, where it stays readable after the process is stopped or killed. When a rank makes no
progress, or loses a connection, it reads the others' heartbeats and reports which ranks are lost.
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
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch.distributed as dist

from recgpt_torchrec.distributed.processes import rank, world_size
from recgpt_torchrec.errors import LOST, STALLED
from recgpt_torchrec.progress import progress_bar, report_failure

MAX_LISTED = 16
"""Maximum number of ranks listed in a report."""
AFTER_LOSS = "because it lost another rank"
"""End reason of a rank that ended because another one was lost first."""

SHOWN_AFTER = 3.0
"""Seconds after which the progress of a long phase is shown on a terminal."""

_BROKEN = re.compile(r"gloo|NCCL|Connection (closed|reset)|Broken pipe|Timed out waiting|Socket", re.IGNORECASE)
"""Found in the errors of collective operations after another rank is lost."""


class Status(NamedTuple):
    """What a rank is doing, and since when."""

    phase: str
    step: int
    """Optimizer steps done."""
    since: float
    """Start of the phase by `time.monotonic`, in seconds."""


_status = Status("starting", 0, time.monotonic())


def current_status() -> Status:
    """What this rank is doing."""
    return _status


def report_phase(phase: str, step: int | None = None) -> None:
    """Report what this rank does from now on; every call counts as progress.

    Args:
        phase: in words, for reports.
        step: optimizer steps done; None: as before.
    """
    global _status
    _status = Status(phase, _status.step if step is None else step, time.monotonic())


def beat() -> None:
    """Report that this rank makes progress in its phase."""
    report_phase(_status.phase)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Report the phase `name` within the `with`; after an error it stays, so that reports say where the rank failed."""
    previous = _status
    report_phase(name)
    yield
    report_phase(previous.phase)


@contextlib.contextmanager
def tracked_phase(name: str, total: float | None, unit: str) -> Iterator[Callable[[float], None]]:
    """A phase that may be long: the `with` yields a function to call with the amount done since its last call.

    Every call counts as progress. Where the phase takes some seconds, rank 0 shows its own progress with rate and
    remaining time.

    Args:
        name: of the phase.
        total: amount of work on this rank, in `unit`; None: unknown.
        unit: what is counted, in the plural.

    Example: `with tracked_phase("reading footers", len(parts), "parts") as advance: advance(1)`
    """
    options: dict[str, Any] = {"desc": f"{name}: ", "delay": SHOWN_AFTER, "leave": False, "unit_scale": True}
    with phase(name), progress_bar(total, unit, active=rank() == 0, **options) as bar:

        def advance(amount: float) -> None:
            report_phase(name)
            bar.update(amount)

        yield advance


class Watchdog:
    """Ends this rank, and so the run, after some time without progress; names lost ranks.

    Example: `with process_group(), Watchdog("runs/mine", stall_seconds=600): ...`

    Raises:
        SystemExit: with status `LOST`, instead of a `RuntimeError` that the loss of another rank caused.
    """

    def __init__(self, output: str, stall_seconds: float, marker: str = "") -> None:
        """
        Args:
            output: the run's folder, to which a stalled rank writes its stacks (stacks/rank-N.txt).
            stall_seconds: seconds without progress until the run ends; 0: never.
            marker: name of a file that the folder must hold before stacks are written to it.
        """
        self.output, self.stall_seconds, self.marker = output, stall_seconds, marker
        self.interval = min(1.0, stall_seconds / 10) if stall_seconds else 1.0
        self.store: Any = _clone_store() if world_size() > 1 else None
        self._heartbeats = 0
        self._progress_elsewhere = 0.0
        self._end_reason: str | None = None
        self._finished = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> "Watchdog":
        report_phase("starting")
        if not faulthandler.is_enabled():
            # On SIGABRT it prints the stack of the current thread only: the others may be running.
            faulthandler.enable(sys.__stderr__ or 2, all_threads=False)
        self._write_heartbeat()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *trace: object) -> None:
        lost = isinstance(error, RuntimeError) and world_size() > 1 and _BROKEN.search(str(error)) is not None
        self._finished.set()
        self._end_reason = None
        if error is not None:
            # The other ranks see only that the connection is closed.
            self._end_reason = AFTER_LOSS if lost else f"with {type(error).__name__}"
            with contextlib.suppress(Exception):
                self._write_heartbeat()
        if lost:
            assert error is not None
            try:
                lost_ranks = self._describe_lost_ranks() if self.store is not None else "the launcher"
            except Exception as unknown:  # the store may be lost as well
                lost_ranks = f"another rank ({type(unknown).__name__} while reading heartbeats)"
            reason = " ".join(str(error).split())[:200]
            place = f"rank {rank()} was at: {_status.phase}, after step {_status.step}"
            report_failure(f"lost {lost_ranks}; {place} ({reason})")
            raise SystemExit(LOST) from None

    # ------------------------------------------------------------------------------------------------ the thread

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._finished.wait(self.interval):
            now = time.monotonic()
            if now - last > 5 * self.interval + 1:
                # This process was itself stopped for a while, perhaps with all others: start counting again.
                beat()
            last = now
            stalled_elsewhere = False
            try:
                self._write_heartbeat()
                stalled_elsewhere = self.store is not None and self.store.check(["stalled"])
            except Exception:  # the store is lost, and so is the process that served it: the launcher, or else rank 0
                if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                    return
                self._stop_without_launcher()
            if stalled_elsewhere:
                self._exit_stalled("another rank found the run stalled")
            # `_confirm_stall` takes two intervals, which count towards stall_seconds.
            since = max(_status.since, self._progress_elsewhere)
            if self.stall_seconds and now - since >= self.stall_seconds - 3 * self.interval:
                self._confirm_stall(_status)
                last = time.monotonic()

    def _stop_without_launcher(self) -> None:
        """Request a stop in the lost launcher's place: this rank must have ended before the job is started again."""
        self.store = None
        if not self._finished.wait(3 * self.interval):  # else this rank is ending, and perhaps the launcher with it
            with contextlib.suppress(OSError):  # the launcher may have held the other end of the pipe
                report_failure(f"rank {rank()}: the launcher is gone; stopping the run")
            os.kill(os.getpid(), signal.SIGTERM)

    def _write_heartbeat(self) -> None:
        if self.store is None:
            return
        with self._lock:
            self._heartbeats += 1
            phase, step, since = _status
            heartbeat = {
                "number": self._heartbeats,
                "time": time.time(),
                "phase": phase,
                "phase_seconds": time.monotonic() - since,
                "step": step,
                "end_reason": self._end_reason,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "process_start": _process_start(os.getpid()),
            }
            self.store.set(f"heartbeat/{rank()}", json.dumps(heartbeat))

    def _read_heartbeats(self) -> dict[int, dict[str, Any]]:
        """The last heartbeat of each other rank, by rank; without those that have not written any."""
        ranks = [other for other in range(world_size()) if other != rank() and self.store.check([f"heartbeat/{other}"])]
        return {other: json.loads(self.store.get(f"heartbeat/{other}")) for other in ranks} if ranks else {}

    def _confirm_stall(self, status: Status) -> None:
        """Watch all ranks for two intervals; if none makes progress, or has made any lately, report and end.

        A rank may wait long for another that restores, draws or writes a larger shard.
        """
        earlier = self._read_heartbeats() if self.store is not None else {}
        time.sleep(2 * self.interval)
        if _status != status or self._finished.is_set():
            return
        age = time.monotonic() - status.since
        lines = [f"rank {rank()}: {status.phase} for {age:.0f} s, after step {status.step}"]
        silent = []
        if self.store is not None:
            latest = self._read_heartbeats()
            silent = [other for other, beat in earlier.items() if beat["number"] == latest[other]["number"]]
            ages = [beat["phase_seconds"] for other, beat in latest.items() if other not in silent]
            if ages and min(ages) < self.stall_seconds - 3 * self.interval:
                self._progress_elsewhere = time.monotonic() - min(ages)
                return
            if self.store.add("stalled", 1) > 1:
                self._exit_stalled("another rank found the run stalled")
            counts = Counter((beat["phase"], beat["step"]) for beat in latest.values())
            # Silent ranks first, then those whose place is shared by the fewest.
            order = sorted(latest, key=lambda o: (o not in silent, counts[latest[o]["phase"], latest[o]["step"]], o))
            lines = [_describe_rank(other, latest[other], other in silent) for other in order[:MAX_LISTED]] + lines
            for other in range(world_size()):
                if other != rank() and other not in latest:
                    lines.insert(0, f"rank {other}: never sent a heartbeat")
        text = "\n  ".join([f"no progress for {self.stall_seconds:g} s; ending the run. Phase of each rank:", *lines])
        report_failure(text)
        self._dump_stacks()
        for other in silent:  # a stopped process does not handle SIGTERM, and the launcher would wait for it
            if _is_running_here(latest[other]):
                os.kill(latest[other]["pid"], signal.SIGABRT)
                os.kill(latest[other]["pid"], signal.SIGCONT)
        os._exit(STALLED)

    def _dump_stacks(self) -> None:
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        if not os.path.exists(os.path.join(self.output, self.marker)):
            return  # the folder is not this run's yet
        with contextlib.suppress(OSError):
            folder = os.path.join(self.output, "stacks")
            os.makedirs(folder, exist_ok=True)
            with open(os.path.join(folder, f"rank-{rank()}.txt"), "w") as file:
                file.write(f"{_status.phase}, after step {_status.step}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)

    def _exit_stalled(self, reason: str) -> None:
        place = f"rank {rank()}: {_status.phase}, after step {_status.step}"
        report_failure(f"{reason}; {place}")
        self._dump_stacks()
        os._exit(STALLED)

    # ---------------------------------------------------------------------------------------------- lost ranks

    def _describe_lost_ranks(self) -> str:
        """List the lost ranks in words, each with the reason if it is known."""
        earlier = self._read_heartbeats()
        reasons = {other: "its process ended" for other, beat in earlier.items() if _has_ended_here(beat)}
        if not reasons:
            time.sleep(3 * self.interval)
            latest = self._read_heartbeats()
            silent = [other for other, beat in latest.items() if beat["number"] == earlier[other]["number"]]
            reasons = dict.fromkeys(silent, "no heartbeat")
        for other, beat in self._read_heartbeats().items():
            if beat["end_reason"]:
                reasons[other] = f"it ended {beat['end_reason']}"
        causes = {other: reason for other, reason in reasons.items() if AFTER_LOSS not in reason} or reasons
        if not causes:
            return "the connection to another rank"
        listed = [f"rank {other} ({reason})" for other, reason in sorted(causes.items())[:MAX_LISTED]]
        return ", ".join(listed) + (f" and {len(causes) - MAX_LISTED} more" if len(causes) > MAX_LISTED else "")


def _clone_store() -> Any:
    """A separate connection to the job's store: on a shared one, a thread that waits would block this one."""
    store: Any = dist.distributed_c10d._get_default_store()
    return store.clone()


def _describe_rank(other: int, beat: dict[str, Any], silent: bool) -> str:
    place = f"{beat['phase']}, after step {beat['step']}, on {beat['host']}, process {beat['pid']}"
    if beat["end_reason"]:
        return f"rank {other}: ended {beat['end_reason']}; it was at: {place}"
    if silent:
        return f"rank {other}: no heartbeat for {time.time() - beat['time']:.0f} s; it was at: {place}"
    phase = f"{beat['phase']} for {beat['phase_seconds']:.0f} s"
    return f"rank {other}: {phase}, after step {beat['step']}, on {beat['host']}"


def _process_start(process: int) -> str | None:
    """When a process was started, in clock ticks since boot; None: it does not exist, or has ended."""
    try:
        with open(f"/proc/{process}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _is_running_here(beat: dict[str, Any]) -> bool:
    start = beat["process_start"]
    return beat["host"] == socket.gethostname() and start is not None and _process_start(beat["pid"]) == start


def _has_ended_here(beat: dict[str, Any]) -> bool:
    start = beat["process_start"]
    return beat["host"] == socket.gethostname() and start is not None and _process_start(beat["pid"]) != start
