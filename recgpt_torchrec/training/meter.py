"""Measures steps: targets and tokens per second, share of the device's peak, memory, and what a step's time goes into.

Counting costs some microseconds a step. The time is split on one step in `LOG_EVERY` alone: by the clock on CPU, and on
CUDA by events that are read when the next figures are asked for, so that the host never waits for the device.

A part's time runs from its mark to the next one. What runs beside another part counts as that part: the exchange of
gradients and the fused table optimizers are within `backward`.
"""

import functools
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from recgpt_torchrec.data.batch import SequenceBatch
from recgpt_torchrec.distributed.processes import rank, world_size
from recgpt_torchrec.model.flops import step_flops
from recgpt_torchrec.model.peaks import Precision, measured_peak, rated_peak
from recgpt_torchrec.model.tabled.base import unwrapped, unwrapped_dense
from recgpt_torchrec.training.execution import Execution

LOG_EVERY = 20
"""Steps between figures in the log; each costs one all-reduce of one number."""
DATA, LOOKUP, DECODER, LOSS = "data wait", "lookup", "decoder", "loss"
BACKWARD, OPTIMIZER, COMMUNICATION = "backward", "optimizer", "communication"
PARTS = (DATA, LOOKUP, DECODER, LOSS, BACKWARD, OPTIMIZER, COMMUNICATION)
"""Parts of a step. data wait: for this rank's own batches. lookup: rows of the tables, with their exchange. decoder,
loss: forward; both are `decoder` where it is compiled. communication: exchange of ids and counts, copies to the device,
waits for other ranks outside of the other parts."""
PIPELINE = {"_backward": BACKWARD, "_optimizer_step": OPTIMIZER}
"""Methods of the train pipeline that are parts."""
RECORDED = ("targets_per_s", "tokens_per_s", "share_of_peak", "memory_mib", "host_memory_mib", "split")
"""Names of `Speed` in history.jsonl."""
PEAK_SECONDS = 0.05
"""Time for measuring the peak of a device whose rating is not known."""


@dataclass(frozen=True)
class Speed:
    """What was measured over some steps; rank 0 measures, and rates are those of all ranks."""

    targets_per_s: float
    tokens_per_s: float
    """Tokens per second; of the other ranks as many per target as rank 0 had."""
    flops_per_s: float
    """Operations of matrix products per second on rank 0, see `model.flops`."""
    peak: float
    """Operations per second that rank 0's device can reach in the run's precision."""
    memory_mib: float
    """Peak memory in MiB: on CUDA what torch allocated on the device, else that of the process."""
    host_memory_mib: float
    """Peak memory of rank 0's process, in MiB."""
    split: dict[str, float] = field(default_factory=dict)
    """Share of each of `PARTS` in the steps that were split; empty if none was."""

    @property
    def share_of_peak(self) -> float:
        """Share of the device's peak that its matrix products reach."""
        return self.flops_per_s / self.peak if self.peak else 0.0

    def record(self) -> dict[str, Any]:
        """The values for a line of history.jsonl."""
        return {name: getattr(self, name) for name in RECORDED}

    def __str__(self) -> str:
        """One line for the log."""
        split = ", ".join(f"{part} {share:.0%}" for part, share in self.split.items())
        return (
            f"{self.targets_per_s:,.0f} targets/s, {self.tokens_per_s:,.0f} tokens/s, {self.share_of_peak:.1%} of peak "
            f"({self.flops_per_s / 1e9:,.1f} of {self.peak / 1e9:,.1f} GFLOP/s), {self.memory_mib:,.0f} MiB"
            + (f"; step: {split}" if split else "")
        )


@dataclass
class _Counts:
    """Sums since a moment."""

    since: float = field(default_factory=time.perf_counter)
    targets: float = 0.0
    """Over all ranks."""
    own_targets: float = 0.0
    own_tokens: float = 0.0
    flops: float = 0.0
    """On this rank."""
    parts: dict[str, float] = field(default_factory=dict)
    """Seconds of each part in the steps that were split."""


class StepMeter:
    """Measures the steps of a train pipeline on rank 0; does nothing on other ranks.

    Example: `meter.begin(step)`, a step, `meter.end(targets)`; every `LOG_EVERY` steps `meter.newest()`
    """

    def __init__(self, model: nn.Module, pipeline: Any, device: torch.device, execution: Execution) -> None:
        """
        Args:
            model: sharded; hooks are added to its parts.
            pipeline: that trains it; its methods of `PIPELINE` are watched.
            device: of this rank.
            execution: how steps are computed.
        """
        self.active, self.device = rank() == 0, device
        self.epoch_counts, self.newest_counts = _Counts(), _Counts()
        self._in_step = self._splitting = False
        self._marks: list[tuple[str, Any]] = []
        self._pending: list[list[tuple[str, Any]]] = []
        if not self.active:
            return
        self.peak = peak_of(device, execution)
        recgpt = unwrapped(model)
        dense = unwrapped_dense(recgpt)
        self.model, self.loss = dense.model, dense.loss
        recgpt.register_forward_pre_hook(lambda *_: self._mark(LOOKUP))
        recgpt.dense.register_forward_pre_hook(self._count)
        if not execution.compile:  # a hook within would break the compiled graph
            dense.decoder.register_forward_hook(lambda *_: self._mark(LOSS))
        recgpt.dense.register_forward_hook(lambda *_: self._mark(COMMUNICATION))
        for name, part in PIPELINE.items():
            setattr(pipeline, name, self._within(part, getattr(pipeline, name)))

    def start_epoch(self) -> None:
        """Count from here on."""
        self.epoch_counts, self.newest_counts = _Counts(), _Counts()

    def begin(self, step: int) -> None:
        """Begin a step; `step` are done before it."""
        if self.active:
            self._in_step, self._splitting = True, step % LOG_EVERY == LOG_EVERY // 2
            self._marks = []
            self._mark(COMMUNICATION)

    def end(self, targets: float) -> None:
        """End the step that has begun.

        Args:
            targets: of the step, summed over ranks.
        """
        if self.active:
            self._mark("")
            if self._splitting:
                self._pending.append(self._marks)
            self._in_step = self._splitting = False
            for counts in (self.epoch_counts, self.newest_counts):
                counts.targets += targets

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time within the `with` out; it comes between two steps."""
        self._in_step = self._splitting = False  # the pipeline was asked for one step too many, to empty it
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        for counts in (self.epoch_counts, self.newest_counts):
            counts.since += seconds

    def watch(self, batches: Iterator[SequenceBatch]) -> Iterator[SequenceBatch]:
        """The same batches; the time that each is waited for counts as `data wait`."""
        while True:
            with self._part(DATA):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def newest(self) -> Speed:
        """The figures since the last call or the epoch's start."""
        self._read_marks()
        counts, self.newest_counts = self.newest_counts, _Counts()
        return self._speed(counts)

    def epoch(self) -> Speed:
        """The figures since the epoch's start."""
        self._in_step = self._splitting = False  # the epoch's last call of the pipeline found no batch
        self._read_marks()
        return self._speed(self.epoch_counts)

    def _speed(self, counts: _Counts) -> Speed:
        seconds = max(time.perf_counter() - counts.since, 1e-9)
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        on_device = torch.cuda.max_memory_allocated(self.device) / 2**20 if self.device.type == "cuda" else host
        split = sum(counts.parts.values())
        return Speed(
            targets_per_s=counts.targets / seconds,
            tokens_per_s=counts.targets / seconds * counts.own_tokens / max(counts.own_targets, 1),
            flops_per_s=counts.flops / seconds,
            peak=self.peak if self.active else 0.0,
            memory_mib=on_device,
            host_memory_mib=host,
            split={part: counts.parts[part] / split for part in PARTS if part in counts.parts} if split else {},
        )

    def _count(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Count what the batch of the step holds; called before the dense part's forward."""
        if not self._in_step:
            return
        batch: SequenceBatch = inputs[3]  # see `Dense.forward`
        lengths = np.maximum(batch.histories.lengths - 1, 0)
        tokens = int(lengths.sum())
        shared = batch.candidate_item is not None  # then targets meet about as many of each other rank
        candidates = batch.candidate_bag.shape[0] * (world_size() if shared else 1)
        attended = float((lengths * (lengths + 1) // 2).sum())
        flops = step_flops(
            self.model, self.loss, tokens=tokens, targets=batch.targets, candidates=candidates, attended=attended
        )
        for counts in (self.epoch_counts, self.newest_counts):
            counts.own_targets += batch.targets
            counts.own_tokens += tokens
            counts.flops += flops.total
        self._mark(DECODER)

    def _within(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same function; its time counts as a part."""

        def timed(*args: Any, **more: Any) -> Any:
            with self._part(part):
                return call(*args, **more)

        return timed

    @contextmanager
    def _part(self, part: str) -> Iterator[None]:
        """Count the time within the `with` as a part, and what follows as the part before."""
        before = self._marks[-1][0] if self._marks else COMMUNICATION
        self._mark(part)
        try:
            yield
        finally:
            self._mark(before)

    def _mark(self, part: str) -> None:
        """Begin a part of the step that is split."""
        if not self._splitting:
            return
        if self.device.type != "cuda":
            self._marks.append((part, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.default_stream(self.device))  # the pipeline may be within another stream's context
        self._marks.append((part, event))

    def _read_marks(self) -> None:
        """Add the times of the steps that were split, as far as the device is done with them."""
        while self._pending:
            marks = self._pending[0]
            if self.device.type == "cuda" and not marks[-1][1].query():
                return
            del self._pending[0]
            for (part, begun), (_, ended) in zip(marks, marks[1:], strict=False):
                seconds = ended - begun if self.device.type != "cuda" else begun.elapsed_time(ended) / 1000
                for counts in (self.epoch_counts, self.newest_counts):
                    counts.parts[part] = counts.parts.get(part, 0.0) + seconds


def peak_of(device: torch.device, execution: Execution) -> float:
    """Operations per second that a device can reach in a run's precision: its maker's rating, or measured (50 ms)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return rated_peak(name, execution.precision) or _measure_once(device, execution.precision, torch.get_num_threads())


@functools.cache  # a process may train several runs
def _measure_once(device: torch.device, precision: Precision, threads: int) -> float:
    size = None if device.type == "cuda" else 512
    return measured_peak(device, precision, size=size, seconds=PEAK_SECONDS)
