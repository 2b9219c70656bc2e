"""Detects steps whose loss or gradients are not finite before any table is updated, and skips them on all ranks.

Tables with fused optimizers are updated in the backward. So the check runs within it, after the decoder's part and
before the tables': the loss and the gradients of the decoder and of all looked-up rows are known, and no table is
changed yet. The ranks agree by one all-reduce of three numbers. If any rank found a non-finite value, every table gets
a zero gradient, which changes nothing (except the moments of a fused Adam, and weight decay of tables), and no other
optimizer steps.

On CUDA nothing of this stops the host: flags stay on the device, and are read where the loss is logged. On CPU they are
read at once, which costs nothing there.

It costs the step 2 to 3% on two ranks and two idle cores (tools.benchmarks.safety, steps of 100 ms, d = 64): checking
the values takes 0.3 ms, the rest is one more synchronisation of the ranks.
"""

import json
import math
import os
from collections import deque
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
from recgpt_torchrec.model.waiting import waits
from recgpt_torchrec.training.optimizers import torch_optimizers

DECODER = "a gradient of the decoder"
"""Reported only if no rank found anything else: it may already be a sum over ranks, so any of them can be the cause."""
SKIPPED = "skipped.jsonl"
"""File in a run's folder with one line per step and rank whose loss or gradients were not finite."""
SMALL = 2**18
"""Number of elements below which tensors are joined to be checked on CPU."""
PARTS = ("the loss", "a gradient of the tables' rows", DECODER)


class FiniteGuard:
    """Checks the loss and all gradients in each backward, by hooks on the dense part of the model.

    Example: `guard = FiniteGuard(unwrapped(model).dense, device)`; after each step `guard.bad` is its flag, and
    `guard.read()` returns the parts of the steps since the last call that were not finite
    """

    def __init__(self, dense: nn.Module, device: torch.device, hold: bool = False) -> None:
        """
        Args:
            dense: called with looked-up rows, tensors [bags, dim], among its arguments; returns the loss first.
            device: of this rank.
            hold: whether all steps after one that is not finite change nothing either, until the flags are read.
        """
        self.dense, self.hold = dense, hold
        self.on_host = not waits(device)
        """Whether flags are read in the backward."""
        self.group = dist.new_group()  # its own, so that it does not queue behind gradients
        self.bad = torch.zeros((), dtype=torch.bool, device=device)
        """[] bool: whether any rank found a non-finite value in the newest step, or (with `hold`) in one before."""
        self._unread: deque[Tensor] = deque()
        self._loss: Tensor | None = None
        dense.register_forward_pre_hook(self._guard_rows)
        dense.register_forward_hook(self._keep_loss)

    def _guard_rows(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not (module.training and torch.is_grad_enabled()):
            return None
        rows = {id(value): value for value in inputs if isinstance(value, Tensor)}  # tied tables are passed twice
        guarded = dict(zip(rows, _Guard.apply(self, *rows.values()), strict=True))
        return tuple(guarded.get(id(value), value) for value in inputs)

    def _keep_loss(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if module.training and torch.is_grad_enabled():
            self._loss = output[0].detach()

    def check(self, rows: tuple[Tensor | None, ...]) -> None:
        """Check the loss, the decoder's gradients and those of rows; agree with the other ranks (collective).

        Args:
            rows: gradients of looked-up rows, each [bags, dim] or None.
        """
        assert self._loss is not None
        decoder = [p.grad for p in self.dense.parameters()]
        kinds = [[self._loss], [g for g in rows if g is not None], [g for g in decoder if g is not None]]
        local = torch.stack([_any_not_finite([value for value in some if value.numel()], self.bad) for some in kinds])
        agreed = local.float()
        if dist.get_world_size() > 1:
            dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=self.group)
        newest = agreed.any()
        self.bad = newest | self.bad if self.hold else newest
        self._unread.append(torch.cat([local, newest[None]]))

    def zero(self, gradient: Tensor | None) -> Tensor | None:
        """A gradient of rows, or zeros if the step is bad."""
        if gradient is None:
            return None
        if self.on_host:
            return torch.zeros_like(gradient) if self.bad else gradient
        return torch.where(self.bad, 0.0, gradient)

    def read(self) -> list[list[str] | None]:
        """Read the flags of the steps since the last call, and let steps change something again; waits for the device.

        Returns:
            For each step None if it was finite on all ranks, else those of `PARTS` that were not on this rank.
        """
        if not self._unread:
            return []
        flags = torch.stack(list(self._unread)).tolist()
        self._unread.clear()
        self.bad = torch.zeros_like(self.bad)
        return [
            [part for part, flag in zip(PARTS, local, strict=True) if flag] if newest else None
            for *local, newest in flags
        ]


def _any_not_finite(values: list[Tensor], like: Tensor) -> Tensor:
    """[] bool, on the device of `like` [] bool: whether any value of some tensors is infinite or NaN."""
    if not values:
        return torch.zeros_like(like)
    if values[0].device.type == "cuda":  # one kernel for all
        return ~torch.stack(torch._foreach_norm(values, ord=math.inf)).isfinite().all()
    if sum(value.numel() for value in values) < SMALL:  # one pass over a copy instead of one for each of 30 tensors
        values = [torch.cat([value.flatten() for value in values])]
    # A NaN is both minimum and maximum; on CPU infinity norms take twenty times as long.
    return ~torch.stack([extreme for value in values for extreme in value.aminmax()]).isfinite().all()


class _Guard(torch.autograd.Function):
    """Identity on rows; its backward runs the check, and returns zero gradients if it finds a non-finite value."""

    @staticmethod
    def forward(ctx: Any, guard: FiniteGuard, *rows: Tensor) -> tuple[Tensor, ...]:
        ctx.guard = guard
        return tuple(value.view_as(value) for value in rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.guard.check(gradients)
        return (None, *(ctx.guard.zero(value) for value in gradients))


class GuardedPipeline(TrainPipelineSparseDist):
    """The train pipeline, without the optimizer step if the guard found a non-finite value."""

    def __init__(self, model: nn.Module, optimizer: Any, device: torch.device, guard: FiniteGuard) -> None:
        super().__init__(model, optimizer, device)
        self.guard = guard
        self.fused = [each for each in torch_optimizers(optimizer) if each.defaults.get("fused")]
        """Optimizers that leave out a step by a flag on the device."""

    def _optimizer_step(self) -> None:
        if self.guard.on_host:
            if not self.guard.bad:
                super()._optimizer_step()
            return
        found = self.guard.bad.float()
        for optimizer in self.fused:
            optimizer.found_inf = found  # type: ignore[attr-defined]
        super()._optimizer_step()  # the other optimizers get zero gradients


@dataclass(frozen=True)
class Place:
    """Rows of one row group that are in a batch."""

    file: str
    row_group: int
    rows: tuple[int, ...]

    def __str__(self) -> str:
        listed = ", ".join(map(str, self.rows[:5])) + (f" and {len(self.rows) - 5} more" if self.rows[5:] else "")
        return f"{self.file}, row group {self.row_group}, row{'s' * (len(self.rows) > 1)} {listed}"


def find_rows(dataset: Dataset, groups: list[RowGroup], users: np.ndarray) -> list[Place]:
    """Find the rows of a batch's users in the row groups that it was read from.

    Args:
        dataset: that the batch was read from.
        groups: row groups that the batch was read from.
        users: [sequences] int64 user ids.

    Returns:
        One place per row group that holds any of the users.
    """
    places = []
    for group in groups:
        part = dataset.manifest.sequences[group.part]
        with dataset.open_part(part) as file:
            user_ids = file.read_row_group(group.group, columns=["user_id"])["user_id"].to_numpy()
        rows = np.flatnonzero(np.isin(user_ids, users))
        if rows.size:
            places.append(Place(part.path, group.group, tuple(rows.tolist())))
    return places


def describe_step(folder: str, step: int, epoch: int, parts: list[str], loss: float, places: list[Place]) -> str:
    """Describe what was not finite in a step, by rank and rows, and add it to `SKIPPED` (collective).

    Args:
        folder: the run's.
        step, epoch: counted from 1.
        parts: those of `PARTS` that were not finite on this rank.
        loss: this rank's, in nats.
        places: the rows of this rank's batch.

    Returns:
        The description, the same on all ranks.

    Raises:
        OSError: the file cannot be written (on rank 0).
    """
    by_rank = gather_objects((parts, None if math.isfinite(loss) else str(loss), places))
    if any(set(parts) - {DECODER} for parts, _, _ in by_rank):  # then the decoder's gradients are a consequence
        by_rank = [(parts if set(parts) - {DECODER} else [], value, places) for parts, value, places in by_rank]
    descriptions, lines = [], ""
    for rank, (parts, value, places) in enumerate(by_rank):
        if parts:
            rows = "; ".join(map(str, places[:3])) + (f" and {len(places) - 3} more row groups" if places[3:] else "")
            descriptions.append(f"{', '.join(parts)} on rank {rank}, whose batch held {rows or 'no rows'}")
            line = {"step": step, "epoch": epoch, "rank": rank, "not_finite": parts, "loss": value}
            lines += json.dumps({**line, "rows": [asdict(place) for place in places]}) + "\n"
    path = os.path.join(folder, SKIPPED)
    if dist.get_rank() == 0:
        storage.append(path, lines)
    return f"step {step}: not finite: {'; '.join(descriptions)} (all rows in {path})"
