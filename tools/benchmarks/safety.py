"""Benchmarks the overhead of safety per step: the check for non-finite gradients, and checkpoints on top of it.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 -m tools.benchmarks.safety --items 1000000

A turn is --steps steps of one kind of training; with checkpoints it starts with one. A round is one turn of each kind,
in an order that changes from round to round. Prints the ratio of each kind's time to that of the kind it builds on,
with its standard error over rounds.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from recgpt_torchrec.checkpoints.folder import Checkpoints
from recgpt_torchrec.checkpoints.saving import Saver
from recgpt_torchrec.checkpoints.state import state_of
from recgpt_torchrec.config import Loss, Model, Pretrain, Saving, Tables
from recgpt_torchrec.data.batch import SequenceBatch, make_batch
from recgpt_torchrec.data.candidates import Candidates
from recgpt_torchrec.data.dataset import Dataset, Manifest
from recgpt_torchrec.data.histories import Histories
from recgpt_torchrec.data.packed import Capacity
from recgpt_torchrec.distributed.processes import print_result, process_group, rank, world_size
from recgpt_torchrec.model.tabled.base import unwrapped
from recgpt_torchrec.training.building import build
from recgpt_torchrec.training.finite import FiniteGuard, GuardedPipeline

USERS = 1000


class SwitchableGuard(FiniteGuard):
    """A `FiniteGuard` that can be turned off."""

    on = True

    def _guard_rows(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return super()._guard_rows(module, inputs) if self.on else None


def capacity_of(options: argparse.Namespace) -> Capacity:
    """Room for the ids of a batch."""
    return Capacity.of(options.tokens // 32, options.tokens + options.negatives)


def draw_always(candidates: Candidates) -> Callable[[np.ndarray], Candidates]:
    """A function that draws the same candidates for any targets."""
    return lambda targets: candidates


def cycle_batches(options: argparse.Namespace) -> Iterator[SequenceBatch]:
    """Yield eight batches of random histories of 32 items, in an endless cycle."""
    rng = np.random.default_rng(rank())
    users = options.tokens // 32
    ready = []
    for _ in range(8):
        histories = Histories(
            users=rng.choice(USERS, users, replace=False),
            items=rng.integers(0, options.items, users * 32),
            offsets=np.arange(users + 1) * 32,
        )
        negatives = Candidates(rng.choice(options.items, options.negatives, replace=False), np.zeros(options.negatives))
        batch = make_batch(
            histories,
            row_length=64,
            capacity=capacity_of(options),
            predict=True,
            draw=draw_always(negatives),
        )
        batch.global_targets = torch.tensor(float(batch.target_slot.numel()))
        ready.append(batch)
    while True:
        yield from ready


def main() -> None:
    """Build a model, measure its steps and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per step and rank")
    parser.add_argument("--negatives", type=int, default=2000)
    parser.add_argument("--sharding", default="row_wise")
    parser.add_argument("--optimizer", default="rowwise_adagrad")
    parser.add_argument("--steps", type=int, default=100, help="steps per turn, and between two checkpoints")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", help="folder for the temporary checkpoints; default: the system's")
    options = parser.parse_args()
    with process_group() as device, tempfile.TemporaryDirectory(dir=options.folder) as folder:
        shared: list[Any] = [folder]
        dist.broadcast_object_list(shared, src=0)
        config = Pretrain(
            data="",
            output="",
            model=Model(dim=options.dim),
            loss=Loss(candidates="sampled"),
            tables=Tables(sharding=options.sharding, optimizer=options.optimizer),
        )
        dataset = Dataset(path="", manifest=Manifest(users=USERS, items=options.items))
        model, optimizer = build(config, config.model, dataset, capacity=capacity_of(options), device=device)
        measure(model, optimizer, device, cycle_batches(options), shared[0], options)


def measure(
    model: Any, optimizer: Any, device: torch.device, stream: Iterator[SequenceBatch], folder: str, options: Any
) -> None:
    """Run the turns, and print the results on rank 0."""
    guard = SwitchableGuard(unwrapped(model).dense, device)
    pipeline = GuardedPipeline(model, optimizer, device, guard)
    model.train()
    savers = {
        "bare": None,
        "checked": None,
        "asynchronous": Saver(Checkpoints(f"{folder}/asynchronous", keep=1), Saving(asynchronous=True)),
        "synchronous": Saver(Checkpoints(f"{folder}/synchronous", keep=1), Saving(asynchronous=False)),
    }
    for _ in range(10):
        pipeline.progress(stream)
    times: dict[str, list[float]] = {kind: [] for kind in savers}
    stalls: dict[str, list[float]] = {kind: [] for kind in savers}
    written: list[float] = []
    size = 0
    for number in range(options.rounds + 1):  # the first does not count: it allocates the memory of the copy
        first = number % len(savers)
        order = list(savers)[first:] + list(savers)[:first]
        for kind in order:
            saver, guard.on = savers[kind], kind != "bare"
            dist.barrier()
            since, stalled = time.perf_counter(), 0.0
            if saver is not None:
                saver.save(number, state_of(model, optimizer), {})
                stalled = time.perf_counter() - since
            written_after = 0.0
            for _ in range(options.steps):
                pipeline.progress(stream)
                if kind == "asynchronous" and not written_after and saver is not None and not saver.is_writing:
                    written_after = time.perf_counter() - since
            if device.type == "cuda":
                torch.cuda.synchronize()
            dist.barrier()
            seconds = time.perf_counter() - since
            if saver is not None:
                saver.finish()
                latest = saver.checkpoints.latest() or ""
                size = sum(entry.stat().st_size for entry in os.scandir(latest))
            if number:
                times[kind].append(seconds)
                if saver is not None:
                    stalls[kind].append(stalled)
                written += [written_after or float("inf")] if kind == "asynchronous" else []
    print_result(
        f"{options.items:,} items x {options.dim}, {options.sharding}, {options.optimizer}, {world_size()} ranks: "
        f"{size / 2**20:,.0f} MiB per checkpoint, one every {options.steps} steps of "
        f"{np.median(times['checked']) / options.steps * 1e3:.0f} ms; {options.rounds} rounds"
    )
    for kind, base in (("checked", "bare"), ("asynchronous", "checked"), ("synchronous", "checked")):
        ratio = sum(times[kind]) / sum(times[base])
        residuals = np.subtract(times[kind], ratio * np.array(times[base]))
        error = residuals.std(ddof=1) / np.sqrt(options.rounds) / np.mean(times[base])
        stall = f"; the step waits {np.median(stalls[kind]) * 1e3:.0f} ms" if stalls[kind] else ""
        late = f", written after {np.median(written):.1f} s" if kind == "asynchronous" else ""
        print_result(f"{kind:12} {ratio:.3f} of the time of {base} (standard error {error:.3f}){stall}{late}")


if __name__ == "__main__":
    main()
