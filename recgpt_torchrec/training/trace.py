"""Traces some steps of a run with torch.profiler, on rank 0 (`--train.profile`)."""

import os
import tempfile
from typing import Any

import torch

from recgpt_torchrec import storage
from recgpt_torchrec.distributed.processes import log_message, rank

FOLDER = "profile"
"""Folder of the traces in a run's folder."""
FIRST = 10
"""Number of steps before the first that is traced: caches are warm and memory is allocated by then."""
LARGEST = 15
"""Number of operations in the summary."""


class StepTrace:
    """Traces `steps` steps of the run, or of its part since it was resumed; does nothing on other ranks than 0.

    Example: `with StepTrace(output, 5, device) as trace: trace.begin(step)` before each step
    """

    def __init__(self, output: str, steps: int, device: torch.device) -> None:
        """
        Args:
            output: the run's folder.
            steps: number of steps to trace; 0: none.
            device: of this rank.
        """
        self.folder, self.wanted, self.device = os.path.join(output, FOLDER), steps if rank() == 0 else 0, device
        self._started: int | None = None
        self._step = self._first = 0
        self._profiler: Any = None

    def __enter__(self) -> "StepTrace":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._profiler is not None:  # an error or a signal within the traced steps
            self._profiler.stop()
        elif kind is None and self.wanted:
            log_message(f"No step was traced: --train.profile begins after {FIRST} steps of a run")

    def begin(self, step: int) -> None:
        """Begin a step, after the one before it.

        Args:
            step: number of the step in the run, from 1; again the same if the epoch had no batch left for it.

        Raises:
            OSError: the trace cannot be written.
        """
        if not self.wanted:
            return
        self._step = step
        self._started = step if self._started is None else self._started
        if self._profiler is not None and step - self._first >= self.wanted:
            self._stop()
        elif self._profiler is None and step - self._started >= FIRST:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it prints its own steps on standard error
            self._profiler, self._first = torch.profiler.profile(activities=activities), step
            self._profiler.start()

    def end_epoch(self) -> None:
        """End the trace, if one has begun, before validation: the epoch had no batch for the step begun last.

        Raises:
            OSError: the trace cannot be written.
        """
        if self._profiler is not None:
            self._stop()

    def _stop(self) -> None:
        """Stop tracing before the step begun last, and write the trace and the summary."""
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        last = self._step - 1
        if last < self._first:  # the next epoch has steps
            return
        self.wanted = 0
        name = f"steps-{self._first}-{last}.json"
        with tempfile.TemporaryDirectory(prefix="profile-") as scratch:
            local = os.path.join(scratch, name)
            profiler.export_chrome_trace(local)
            with open(local, "rb") as file:
                trace = file.read()
        by = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        summary = profiler.key_averages().table(sort_by=by, row_limit=LARGEST)
        storage.make_folder(self.folder)
        storage.write(os.path.join(self.folder, name), trace)
        storage.write(os.path.join(self.folder, "summary.txt"), summary.encode())
        log_message(
            f"Traced steps {self._first} to {last}: open {os.path.join(self.folder, name)} at ui.perfetto.dev or "
            f"chrome://tracing; the {LARGEST} largest operations are in {os.path.join(self.folder, 'summary.txt')}"
        )
