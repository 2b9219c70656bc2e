"""Steps whose loss or gradients are not finite: found before any table is updated, and left out on all ranks.

Tables with fused optimizers are updated in the backward. So the check stands within it, between the decoder's part and
the tables': there the loss, the gradients of all looked-up vectors and those of the decoder are known, and no table was
touched. The ranks agree, by one all-reduce of three numbers; if any of them found something, every table gets a
gradient of zeros, which changes nothing (but the moments of a fused Adam, and decay where tables have weight decay),
and no other optimizer steps.

It costs the step 2 to 3% on two ranks and two idle cores (tools/benchmark_step.py, steps of 100 ms, d = 64): the look
at the values 0.3 ms, the rest is the ranks' waiting for each other once more.
"""

import json
import math
import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from recgpt_torchrec import storage
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.windows import RowGroup
from recgpt_torchrec.distributed.processes import gather_objects

DECODER = "a gradient of the decoder"
"""Found where no rank found anything else, or as a sum that is over the ranks already."""
SKIPPED = "skipped.jsonl"
"""In a run's folder: a line for each step and rank whose loss or gradients were not finite."""
PARTS = ("the loss", "a gradient of the tables' rows", DECODER)


class FiniteGuard:
    """Watches the part of the model between table rows and loss.

    Example: `guard = FiniteGuard(unwrapped(model).dense)`, then after each step `guard.found`
    """

    def __init__(self, dense: nn.Module) -> None:
        """
        Args:
            dense: called with looked-up rows first, [bags, dim], any number of them; returns the loss first.
        """
        self.dense = dense
        self.group = dist.new_group(backend="gloo")  # its own: not behind the gradients that are under way
        self.found = False
        """Whether anything in the newest step was not finite, on any rank."""
        self.here: list[str] = []
        """What it was on this rank."""
        self._loss: Tensor | None = None
        dense.register_forward_pre_hook(self._before)
        dense.register_forward_hook(self._after)

    def _before(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not (module.training and torch.is_grad_enabled()):
            return None
        rows = {id(value): value for value in inputs if isinstance(value, Tensor)}  # tied tables come twice
        guarded = dict(zip(rows, _Guard.apply(self, *rows.values()), strict=True))
        return tuple(guarded.get(id(value), value) for value in inputs)

    def _after(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if module.training and torch.is_grad_enabled():
            self._loss = output[0].detach()

    def check(self, rows: tuple[Tensor | None, ...]) -> None:
        """Look at the loss, the rows' gradients and the decoder's; agree with the other ranks (collective)."""
        assert self._loss is not None
        decoder = [p.grad for p in self.dense.parameters()]
        kinds = [[self._loss], [g for g in rows if g is not None], [g for g in decoder if g is not None]]
        values = [(kind, value) for kind, some in enumerate(kinds) for value in some if value.numel()]
        # One wait for the device. A NaN is both; of the infinity norms this is a twentieth of the time.
        extremes = torch.stack([torch.stack(value.aminmax()) for _, value in values])
        bad = torch.zeros(len(PARTS))
        for (kind, _), finite in zip(values, torch.isfinite(extremes).all(1).tolist(), strict=True):
            bad[kind] = max(float(bad[kind]), not finite)
        self.here = [part for part, flag in zip(PARTS, bad.tolist(), strict=True) if flag]
        dist.all_reduce(bad, op=dist.ReduceOp.MAX, group=self.group)
        self.found = bool(bad.any())


class _Guard(torch.autograd.Function):
    """Rows on their way to the decoder as they are; gradients on their way back as they are, or zeros."""

    @staticmethod
    def forward(ctx: Any, guard: FiniteGuard, *rows: Tensor) -> tuple[Tensor, ...]:
        ctx.guard = guard
        return tuple(value.view_as(value) for value in rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.guard.check(gradients)
        if not ctx.guard.found:
            return (None, *gradients)
        return (None, *(torch.zeros_like(value) for value in gradients))


class GuardedPipeline(TrainPipelineSparseDist):
    """The train pipeline, with no step of an optimizer where the guard found something."""

    def __init__(self, model: nn.Module, optimizer: Any, device: torch.device, guard: FiniteGuard) -> None:
        super().__init__(model, optimizer, device)
        self.guard = guard

    def _optimizer_step(self) -> None:
        if not self.guard.found:
            super()._optimizer_step()


@dataclass(frozen=True)
class Place:
    """Rows of one row group that a batch was made of."""

    file: str
    row_group: int
    rows: tuple[int, ...]

    def __str__(self) -> str:
        listed = ", ".join(map(str, self.rows[:5])) + (f" and {len(self.rows) - 5} more" if self.rows[5:] else "")
        return f"{self.file}, row group {self.row_group}, row{'s' * (len(self.rows) > 1)} {listed}"


def find_rows(dataset: Dataset, groups: list[RowGroup], users: np.ndarray) -> list[Place]:
    """Where the histories of `users` [sequences] int64 stand, within the row groups that a batch was read from."""
    found = []
    for group in groups:
        part = dataset.manifest.sequences[group.part]
        with dataset.open_part(part) as file:
            there = file.read_row_group(group.group, columns=["user_id"])["user_id"].to_numpy()
        rows = np.flatnonzero(np.isin(there, users))
        if rows.size:
            found.append(Place(part.path, group.group, tuple(rows.tolist())))
    return found


def describe_step(folder: str, step: int, epoch: int, here: list[str], loss: float, there: list[Place]) -> str:
    """What was not finite in a step, on which rank, from which rows; lists it in the run's folder (collective).

    Args:
        folder: the run's.
        step, epoch: counted from 1.
        here: what it was on this rank.
        loss: this rank's.
        there: the rows of this rank's batch.
    """
    found = gather_objects((here, None if math.isfinite(loss) else str(loss), there))
    if any(set(parts) - {DECODER} for parts, _, _ in found):  # then the decoder's gradients have it from there
        found = [(parts if set(parts) - {DECODER} else [], value, rows) for parts, value, rows in found]
    said, lines = [], ""
    for rank, (parts, value, rows) in enumerate(found):
        if parts:
            where = "; ".join(map(str, rows[:3])) + (f" and {len(rows) - 3} row groups more" if rows[3:] else "")
            said.append(f"{', '.join(parts)} on rank {rank}, whose batch held {where or 'no rows'}")
            line = {"step": step, "epoch": epoch, "rank": rank, "not_finite": parts, "loss": value}
            lines += json.dumps({**line, "rows": [asdict(place) for place in rows]}) + "\n"
    path = os.path.join(folder, SKIPPED)
    if dist.get_rank() == 0:
        storage.append(path, lines)
    return f"step {step}: not finite: {'; '.join(said)} (all in {path})"
