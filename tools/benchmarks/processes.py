"""Runs a stage as a user would, on several ranks, and measures each rank's peak memory from outside.

Linux only: a rank's peak is VmHWM of /proc/PID/status, read until the process ends. Ranks are found among the
launcher's descendants by RANK in their environment; loader processes have it too, and count as a rank's only if larger.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

EVERY_SECONDS = 0.05
"""Time between two looks at the processes; what a rank allocates in its last moments may be missed."""
LAST_LINES = 6
"""Lines of the output that are kept for a message."""
BASE = """
from recgpt_torchrec.distributed.processes import process_group
import recgpt_torchrec.evaluation.validation, recgpt_torchrec.training.session, recgpt_torchrec.training.building
from torch.utils.tensorboard import SummaryWriter
with process_group():
    pass
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")))
"""
"""Program that prints the peak memory, in KiB, of a process that has imported what `pretrain` imports."""


@dataclass
class Ended:
    """How a stage ended."""

    status: int
    seconds: float
    peaks: dict[int, int] = field(default_factory=dict)
    """Peak resident memory of each rank, in bytes."""
    said: str = ""
    """What it said on both outputs."""

    @property
    def last_lines(self) -> str:
        """The end of what it said, for a message."""
        return "\n".join(self.said.strip().splitlines()[-LAST_LINES:])


def run_stage_measured(
    stage: str,
    options: dict[str, object],
    ranks: int,
    *,
    timeout: float,
    until: Callable[[str, float], bool] | None = None,
    environment: dict[str, str] | None = None,
) -> Ended:
    """Run a stage on `ranks` ranks of this machine, and wait until it ends.

    Args:
        stage: its name, `pretrain` or another.
        options: for example `{"--model.dim": 8}`.
        ranks: number of ranks; 1: without a launcher.
        timeout: seconds after which its process group is killed; the status is then -9.
        until: asked twice a second, given all that it said so far and the seconds since its start, whether to send it
            SIGTERM, once; None: never.
        environment: more variables.
    """
    words = [f"recgpt_torchrec.{stage}", *(str(word) for option in options.items() for word in option)]
    launcher = ["recgpt_torchrec.launch.node", "--standalone", "--nproc_per_node", str(ranks), "-m"]
    command = [sys.executable, "-m", *(launcher if ranks > 1 else []), *words]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    since, peaks = time.perf_counter(), dict[int, int]()
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=variables, start_new_session=True)

        def text() -> str:
            said.flush()
            return os.pread(said.fileno(), os.fstat(said.fileno()).st_size, 0).decode(errors="replace")

        try:
            asked = until is None
            looked_at = 0.0
            while process.poll() is None:
                for rank, peak in peaks_of(process.pid).items():
                    peaks[rank] = max(peaks.get(rank, 0), peak)
                now = time.perf_counter()
                if now - since > timeout:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    break
                if not asked and now - looked_at > 0.5:
                    looked_at = now
                    if until is not None and until(text(), now - since):
                        process.send_signal(signal.SIGTERM)
                        asked = True
                time.sleep(EVERY_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):  # loaders that outlived their rank
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return Ended(process.returncode, time.perf_counter() - since, peaks, text())


def base_bytes() -> int:
    """Peak memory of a process before it builds a model."""
    done = subprocess.run([sys.executable, "-c", BASE], capture_output=True, text=True, check=True)
    return 1024 * int(done.stdout.split()[-1])


def peaks_of(root: int) -> dict[int, int]:
    """Peak resident memory in bytes of each rank among the descendants of a process, itself included."""
    peaks: dict[int, int] = {}
    for process in descendants(root):
        try:
            environment = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
            rank = next((int(each[5:]) for each in environment if each.startswith(b"RANK=")), None)
            if rank is None:
                if process != root:
                    continue
                rank = 0  # without a launcher
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
            peak = next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
        except (OSError, StopIteration, ValueError):  # it has ended meanwhile
            continue
        peaks[rank] = max(peaks.get(rank, 0), peak)
    return peaks


def descendants(root: int) -> list[int]:
    """The process and all that it started, directly or through others."""
    found, waiting = [], [root]
    while waiting:
        process = waiting.pop()
        found.append(process)
        with contextlib.suppress(OSError, ValueError):
            for task in os.listdir(f"/proc/{process}/task"):
                children = Path(f"/proc/{process}/task/{task}/children").read_text()
                waiting += map(int, children.split())
    return found
