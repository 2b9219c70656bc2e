"""A ladder of faster and faster ways to compute the dense part of a step, each checked against the first. Torch alone.

Part of the step: forward, loss, backward to the rows of the tables, and AdamW of the decoder. The tables' own lookup
and update are not in it.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from recgpt_torchrec.config import Train
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.model.dense import Dense
from recgpt_torchrec.model.peaks import measured_peak, rated_peak
from recgpt_torchrec.training.execution import Execution
from tools.gpu.presets import Inputs, Preset, make_inputs

LADDER: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32", "attention": "dense", "fused_loss": False, "compile": False},
    "tf32": {"precision": "tf32"},
    "bf16": {"precision": "bf16"},
    "varlen": {"attention": "varlen"},
    "fused loss": {"fused_loss": True},
    "compile": {"compile": True},
}
"""What each rung changes of the one before, as options of the group `train`."""
TOLERANCE = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 5e-2}
"""Largest relative error of the loss and of each gradient against fp32, by precision: ||a - b|| / ||b||."""
PARITY_TOKENS = 1024
BATCHES = 4
"""Different batches that a rung meets in turn."""
PARTS = 5
"""Timed parts of a rung; their median counts."""


@dataclass(frozen=True)
class Rung:
    """A way to compute the step, or why the device cannot."""

    name: str
    execution: Execution | None
    reason: str = ""


def ladder(preset: Preset, device: torch.device) -> list[Rung]:
    """The rungs for a preset on a device; one that is refused changes nothing for those after it."""
    rungs = []
    options: dict[str, Any] = {}
    for name, change in LADDER.items():
        try:
            execution = Execution.choose(Train(**(options | change)), preset.model, preset.loss, device)
        except InputError as error:
            rungs.append(Rung(name, None, str(error)))
            continue
        options |= change
        rungs.append(Rung(name, execution))
    return rungs


def make_dense(preset: Preset, execution: Execution, device: torch.device) -> Dense:
    """The dense part with the same initial values for every rung, in training mode. The only place that sets a rung."""
    torch.manual_seed(0)
    dense = Dense(preset.model, preset.loss).to(device).train()
    dense.set_compute(execution.compute)
    return dense


def forward(dense: Dense, inputs: Inputs) -> Tensor:
    """The loss of a batch, []."""
    loss, _ = dense(inputs.users, inputs.items, inputs.items, inputs.batch)
    assert isinstance(loss, Tensor)
    return loss


def climb(preset: Preset, device: torch.device, *, skip: int = 0, seconds: float = 1.5) -> Iterator[dict[str, Any]]:
    """Measure rung after rung; yields a JSON object when a rung begins, `{"rung", "begins"}`, and one when it is done.

    Args:
        preset: to measure.
        device: to measure on.
        skip: number of rungs that are measured already.
        seconds: to time a rung for.
    """
    for rung in ladder(preset, device)[skip:]:
        place = {"preset": preset.name, "rung": rung.name}
        yield {**place, "begins": True}
        if rung.execution is None:
            yield {**place, "reason": rung.reason}
            continue
        try:
            yield {**place, **measure(preset, rung.execution, device, seconds)}
        except torch.OutOfMemoryError as error:
            yield {**place, "reason": f"out of memory: {str(error).splitlines()[0]}"}
        except Exception as error:  # what a kernel or a compiler raises must not end the rungs after it
            yield {**place, "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}", "failed": True}
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measure(preset: Preset, execution: Execution, device: torch.device, seconds: float) -> dict[str, Any]:
    """The figures of one rung as JSON values."""
    parity = compare(preset.small(PARITY_TOKENS), execution, device)
    cuda = device.type == "cuda"
    batches = [make_inputs(preset, execution, device)]
    if not execution.compile or batches[0].batch.target_weight is not None:  # else each batch has its own shapes
        batches += [make_inputs(preset, execution, device, seed) for seed in range(1, BATCHES)]
    dense = make_dense(preset, execution, device)
    optimizer = torch.optim.AdamW(dense.parameters(), lr=1e-3, fused=cuda)
    rows = [(inputs.users.requires_grad_(), inputs.items.requires_grad_()) for inputs in batches]

    def wait() -> float:
        if cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def run(steps: int) -> float:
        since = wait()
        for step in range(steps):
            inputs = batches[step % len(batches)]
            forward(dense, inputs).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            for row in rows[step % len(batches)]:
                row.grad = None
        return wait() - since

    with execution.applied():
        first = run(1)
        run(len(batches))
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        steps = max(1, min(100, int(seconds / PARTS / (run(len(batches)) / len(batches)))))
        steps = -(-steps // len(batches)) * BATCHES
        times = [run(steps) / steps for _ in range(PARTS)]
    flops = sum(inputs.flops.total for inputs in batches) / len(batches)
    targets = sum(inputs.batch.targets for inputs in batches) / len(batches)
    step_s = statistics.median(times)
    name = torch.cuda.get_device_name(device) if cuda else "CPU"
    rated = rated_peak(name, execution.precision)
    reached = measured_peak(device, execution.precision, size=None if seconds > 0.5 else 128, seconds=seconds / 5)
    return {
        "execution": str(execution),
        "targets_s": targets / step_s,
        "step_ms": 1e3 * step_s,
        "step_ms_spread": [1e3 * min(times), 1e3 * max(times)],
        "first_step_s": first,
        "flops": flops,
        "tflops_s": flops / step_s / 1e12,
        "rated_tflops_s": None if rated is None else rated / 1e12,
        "share_of_rated": None if rated is None else flops / step_s / rated,
        "measured_tflops_s": reached / 1e12,
        "share_of_measured": flops / step_s / reached,
        "memory_gib": torch.cuda.max_memory_allocated(device) / 2**30 if cuda else None,
        "parity": parity,
    }


def compare(preset: Preset, execution: Execution, device: torch.device) -> dict[str, Any]:
    """Relative errors of the loss and of all gradients against the first rung, on one batch without dropout."""
    first = replace(execution, precision="fp32", attention="dense", fused_loss=False, compile=False)
    expected, found = (_gradients(preset, each, device) for each in (first, execution))
    errors = {
        name: float((found[name] - value).norm() / value.norm().clamp(min=1e-12)) for name, value in expected.items()
    }
    loss, worst = errors.pop("loss"), max(errors, key=lambda name: errors[name])
    tolerance = TOLERANCE[execution.precision]
    return {
        "loss_error": loss,
        "gradient_error": errors[worst],
        "worst": worst,
        "tolerance": tolerance,
        "ok": bool(loss <= tolerance and errors[worst] <= tolerance),
    }


def _gradients(preset: Preset, execution: Execution, device: torch.device) -> dict[str, Tensor]:
    """The loss and all gradients of one batch, by name, float64."""
    inputs = make_inputs(preset, execution, device)
    dense = make_dense(preset, execution, device)
    rows = {"users": inputs.users.requires_grad_(), "items": inputs.items.requires_grad_()}
    with execution.applied():
        loss = forward(dense, inputs)
        loss.backward()
    gradients = {name: value.grad for name, value in dense.named_parameters()}
    gradients |= {name: value.grad for name, value in rows.items()}
    return {"loss": loss.detach().double()} | {
        name: value.double() for name, value in gradients.items() if value is not None
    }
