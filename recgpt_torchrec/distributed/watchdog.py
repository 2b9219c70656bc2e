"""Ends a run in which a rank is lost or nothing progresses, and names the rank.

Code reports its phase: `with phase("reading data"): ...`. Each rank's `Watchdog` writes it into the job's store once a
second (see `group.heartbeats`). A rank that hears nothing of another for too long, that sees no progress on any rank,
or that loses a connection, reads the others' heartbeats and reports which ranks are lost.
"""

import contextlib
import faulthandler
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from recgpt_torchrec.config.device import Device
from recgpt_torchrec.distributed import processes
from recgpt_torchrec.distributed.group.heartbeats import (
    Heartbeat,
    Heartbeats,
    Listener,
    describe_rank,
    has_ended_here,
    is_running_here,
)
from recgpt_torchrec.distributed.group.waiting import WaitWatch
from recgpt_torchrec.distributed.processes import LONG_WORK_S, rank, world_size
from recgpt_torchrec.errors import LOST, STALLED
from recgpt_torchrec.progress import LOGGER, progress_bar, report_failure

MAX_LISTED = 16
"""Maximum number of ranks listed in a report."""
AFTER_LOSS = "because it lost another rank"
"""End reason of a rank that ended because another one was lost first."""
COMPUTING_SHARE = 0.05
"""Share of one core that a process has to use to make progress where CPU time counts."""
JOIN_SECONDS = 10.0
"""How long a rank that is done waits for its threads to end; after an error a tenth of it, as the store may be lost."""
SHOWN_AFTER = 3.0
"""Seconds after which the progress of a long phase is shown on a terminal."""

_BROKEN = re.compile(
    r"gloo|NCCL|Connection (closed|reset)|Broken pipe|Timed out waiting|pair closure|Socket", re.IGNORECASE
)
"""Found in the errors of collective operations after another rank is lost."""


class Status(NamedTuple):
    """What a rank is doing, and since when."""

    phase: str
    step: int
    """Optimizer steps done."""
    since: float
    """Start of the phase by `time.monotonic`, in seconds."""
    computes: bool = False
    """Whether CPU time that the process uses counts as progress."""


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
    global _status
    _status = _status._replace(since=time.monotonic())


@contextlib.contextmanager
def phase(name: str, *, computes: bool = False) -> Iterator[None]:
    """Report the phase `name` within the `with`; after an error it stays, so that reports say where the rank failed.

    Args:
        name: of the phase.
        computes: whether CPU time that this process uses counts as progress: of work without steps to report, which
            waits for no other rank.
    """
    global _status
    previous = _status
    report_phase(name)
    _status = _status._replace(computes=computes)
    yield
    _status = Status(previous.phase, _status.step, time.monotonic(), previous.computes)


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
    """Ends this rank, and so the run, after some time without progress or without a sign of another rank; names it.

    Example: `with process_group(), Watchdog("runs/mine", stall_seconds=600): ...`

    Raises:
        SystemExit: with status `LOST`, instead of a `RuntimeError` that the loss of another rank caused.
    """

    def __init__(
        self, output: str | None, stall_seconds: float, marker: str = "", *, counts_cpu_time: bool = False
    ) -> None:
        """
        Args:
            output: the run's folder, to which a stalled rank writes its stacks (stacks/rank-N.txt); None: nowhere.
            stall_seconds: seconds without progress until the run ends; 0: never.
            marker: name of a file that the folder must hold before stacks are written to it.
            counts_cpu_time: whether CPU time that a process uses counts as progress in every phase. Not on CUDA, where
                a process that waits for others uses a core.
        """
        self.output, self.stall_seconds, self.marker = output, stall_seconds, marker
        self.counts_cpu_time = counts_cpu_time
        self.interval = min(1.0, stall_seconds / 10) if stall_seconds else 1.0
        self.heartbeats = Heartbeats(self.interval, self._describe) if world_size() > 1 else None
        self._computed = 0.0
        self._progress_elsewhere = 0.0
        self._finished = threading.Event()
        self._waits = WaitWatch() if rank() == 0 else None
        self._parent = os.getppid()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self) -> "Watchdog":
        report_phase("starting")
        if not faulthandler.is_enabled():
            # On SIGABRT it prints the stack of the current thread only: the others may be running.
            faulthandler.enable(sys.__stderr__ or 2, all_threads=False)
        if self.heartbeats is not None:
            self.heartbeats.start(self._finished)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *trace: object) -> None:
        self._finished.set()
        try:
            self._report_end(error)
        finally:
            # Python ends a daemon thread that comes back from the store while the interpreter is taken down by
            # unwinding its stack, and C++ then aborts the process: "terminate called without an active exception".
            seconds = JOIN_SECONDS if error is None else JOIN_SECONDS / 10
            self._thread.join(seconds)
            if self.heartbeats is not None:
                self.heartbeats.join(seconds)

    def _report_end(self, error: BaseException | None) -> None:
        """Tell the other ranks how this one ends, and the user if it has lost one."""
        if self.heartbeats is None:
            return
        if error is None:
            if self._waits is not None and (text := self._waits.summarize()):
                LOGGER.info(text)
            self.heartbeats.write_last(finished=True)
            return
        lost = isinstance(error, RuntimeError) and _BROKEN.search(str(error)) is not None
        # The other ranks see only that the connection is closed.
        self.heartbeats.write_last(end_reason=AFTER_LOSS if lost else f"with {type(error).__name__}")
        if lost:
            try:
                lost_ranks = None if self.heartbeats.is_lost else self._describe_lost_ranks(self.heartbeats)
            except Exception:  # the store is lost as well
                lost_ranks = None
            lost_ranks = lost_ranks or f"{self.heartbeats.hosts[0]}, whose launcher served the job's store"
            reason = " ".join(str(error).split())[:200]
            place = f"rank {rank()} was at: {_status.phase}, after step {_status.step}"
            report_failure(f"lost {lost_ranks}; {place} ({reason})")
            raise SystemExit(LOST) from None

    def _describe(self) -> Heartbeat:
        """What this rank is doing, for its heartbeat."""
        phase, step, since, _ = _status
        now = time.monotonic()
        return {"phase": phase, "step": step, "phase_seconds": now - since, "idle_seconds": now - self._progressed()}

    def _progressed(self) -> float:
        """When this rank last made progress, by `time.monotonic`."""
        return max(_status.since, self._computed)

    # ------------------------------------------------------------------------------------------------ the thread

    def _watch(self) -> None:
        last, used = time.monotonic(), time.process_time()
        listener = None if self.heartbeats is None else Listener(self.heartbeats)
        period, listened, is_stopping = max(self.interval, self.stall_seconds / 10), last, False
        while not self._finished.wait(self.interval):
            now, use = time.monotonic(), time.process_time()
            if now - last > 5 * self.interval + 1:
                # This process was itself stopped for a while, perhaps with all others: start counting again.
                beat()
                if listener is not None:
                    listener.forget()
            if (self.counts_cpu_time or _status.computes) and use - used > COMPUTING_SHARE * (now - last):
                self._computed = now
            if not is_stopping and self._is_launcher_gone():
                is_stopping = True
                self._stop_without_launcher()
            if self.heartbeats is not None and self.heartbeats.is_stalled:
                self._exit_stalled("another rank found the run stalled")
            if listener is not None and self.stall_seconds and now - listened >= period:
                listened = now
                with contextlib.suppress(Exception):  # a lost store shows when nothing progresses
                    self._compare_waits(listener.listen())
                if silent := listener.silent(self.stall_seconds - period):
                    self._end_stalled(f"no heartbeat of another rank for {self.stall_seconds:g} s", silent)
            # `_confirm_stall` takes two intervals, which count towards stall_seconds.
            since = max(self._progressed(), self._progress_elsewhere)
            if self.stall_seconds and now - since >= self.stall_seconds - 3 * self.interval:
                self._confirm_stall(_status)
            last, used = time.monotonic(), time.process_time()

    def _compare_waits(self, latest: dict[int, Heartbeat]) -> None:
        """Log, on rank 0, which rank the others wait for."""
        if self._waits is not None and self.heartbeats is not None:
            if text := self._waits.name_slowest({rank(): self.heartbeats.own(), **latest}):
                LOGGER.info(text)

    def _is_launcher_gone(self) -> bool:
        """Whether this rank's launcher has ended, or the one that serves the store; without a launcher, False."""
        by_launcher = "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self._parent
        serves_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return by_launcher or (serves_store and self.heartbeats is not None and self.heartbeats.is_lost)

    def _stop_without_launcher(self) -> None:
        """Request a stop in the lost launcher's place: this rank must have ended before the job is started again."""
        if not self._finished.wait(3 * self.interval):  # else this rank is ending, and perhaps the launcher with it
            with contextlib.suppress(OSError):  # the launcher may have held the other end of the pipe
                report_failure(f"rank {rank()}: the launcher is gone; stopping the run")
            os.kill(os.getpid(), signal.SIGTERM)

    def _confirm_stall(self, status: Status) -> None:
        """Watch all ranks for two intervals; if none makes progress, or has made any lately, report and end.

        A rank may wait long for another that restores, draws or writes a larger shard.
        """
        reason = f"no progress for {self.stall_seconds:g} s"
        try:
            earlier = {} if self.heartbeats is None else self.heartbeats.read()
            time.sleep(2 * self.interval)
            latest = {} if self.heartbeats is None else self.heartbeats.read()
        except Exception as error:
            if _status == status and not self._finished.is_set():
                store = (
                    "the job's store" if self.heartbeats is None else f"the job's store on {self.heartbeats.hosts[0]}"
                )
                self._exit_stalled(f"{reason}, and {store} cannot be read: the node or the network is lost ({error})")
            return
        if _status != status or self._finished.is_set():
            return
        silent = [other for other, beat in earlier.items() if beat["number"] == latest[other]["number"]]
        ages = [beat["idle_seconds"] for other, beat in latest.items() if other not in silent]
        if ages and min(ages) < self.stall_seconds - 3 * self.interval:
            self._progress_elsewhere = time.monotonic() - min(ages)
            return
        self._end_stalled(reason, silent)

    def _end_stalled(self, reason: str, silent: list[int]) -> None:
        """Report the phase of each rank, the silent ones first, and end this rank, and the silent ones of this node."""
        latest: dict[int, Heartbeat] = {}
        status = _status
        lines = [f"rank {rank()}: {status.phase} for {time.monotonic() - status.since:.0f} s, after step {status.step}"]
        if self.heartbeats is not None:
            with contextlib.suppress(Exception):
                if not self.heartbeats.report_stall():
                    self._exit_stalled("another rank found the run stalled")
            with contextlib.suppress(Exception):
                latest = self.heartbeats.read()
            counts = Counter((beat["phase"], beat["step"]) for beat in latest.values())
            # Silent ranks first, then those whose place is shared by the fewest.
            order = sorted(latest, key=lambda o: (o not in silent, counts[latest[o]["phase"], latest[o]["step"]], o))
            now = self.heartbeats.clock()
            ages = {other: now - latest[other]["clock"] if other in silent else None for other in order}
            lines = [describe_rank(other, latest[other], ages[other]) for other in order[:MAX_LISTED]] + lines
            for other in range(world_size()):
                if other != rank() and other not in latest:
                    lines.insert(0, f"rank {other}: never sent a heartbeat")
        report_failure("\n  ".join([f"{reason}; ending the run. Phase of each rank:", *lines]))
        self._dump_stacks()
        for other in silent:  # a stopped process does not handle SIGTERM, and the launcher would wait for it
            if other in latest and is_running_here(latest[other]):
                os.kill(latest[other]["pid"], signal.SIGABRT)
                os.kill(latest[other]["pid"], signal.SIGCONT)
        os._exit(STALLED)

    def _dump_stacks(self) -> None:
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        if self.output is None or not os.path.exists(os.path.join(self.output, self.marker)):
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

    def _describe_lost_ranks(self, heartbeats: Heartbeats) -> str:
        """List the lost ranks in words, each with the reason if it is known."""
        earlier = heartbeats.read()
        reasons = {other: "its process ended" for other, beat in earlier.items() if has_ended_here(beat)}
        if not reasons:
            time.sleep(3 * self.interval)
            latest = heartbeats.read()
            silent = [other for other, beat in latest.items() if beat["number"] == earlier[other]["number"]]
            reasons = {other: "no heartbeat" for other in silent if not latest[other].get("finished")}
        for other, beat in heartbeats.read().items():
            if beat.get("end_reason"):
                reasons[other] = f"it ended {beat['end_reason']}"
        causes = {other: reason for other, reason in reasons.items() if AFTER_LOSS not in reason} or reasons
        if not causes:
            return "the connection to another rank"
        hosts = {other: beat["host"] for other, beat in heartbeats.read().items()}
        listed = [
            f"rank {other} ({reason}; on {hosts[other]})" for other, reason in sorted(causes.items())[:MAX_LISTED]
        ]
        return ", ".join(listed) + (f" and {len(causes) - MAX_LISTED} more" if len(causes) > MAX_LISTED else "")


@contextlib.contextmanager
def watched_group(stall_seconds: float, device: Device = "cpu") -> Iterator[torch.device]:
    """Join the job's process group within the `with`, watched, for a stage that does not train; yields the device.

    A rank may work for hours while the others wait for it, so that a collective operation has no time limit of its own:
    the watchdog ends a run in which a rank is lost or nothing progresses.

    Args:
        stall_seconds: see `Watchdog`.
        device: to compute on, see `choose_device`.

    Raises:
        InputError, SystemExit: as for `process_group` and `Watchdog`.
    """
    with (
        processes.process_group(LONG_WORK_S, device) as chosen,
        Watchdog(None, stall_seconds, counts_cpu_time=chosen.type == "cpu"),
    ):
        yield chosen
