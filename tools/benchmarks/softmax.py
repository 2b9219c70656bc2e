"""Benchmarks the softmax loss over a whole catalogue, shared by ranks, against dense cross-entropy.

    OMP_NUM_THREADS=1 python -m tools.benchmarks.softmax --items 100000 1000000

Each way runs in processes of its own, one thread each. Peak memory is what a process holds at most during the loss and
its backward beyond what it held before: gradients, and what is held between. Time is the fastest of some rounds, in
which the ways take turns. Prints both, and their ratios to the dense loss.
"""

import argparse
import gc
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from recgpt_torchrec.catalogue.softmax import SharedSoftmax
from recgpt_torchrec.data.candidates import AllItems, Place
from recgpt_torchrec.model.losses.loss import softmax_loss
from tools.ranks import run_ranks

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From outputs [targets, dim], targets [targets], vectors of them, and vectors of this rank's items."""
WAYS = {"dense, 1 rank": (1, "dense"), "shared, 1 rank": (1, "shared"), "shared, 2 ranks": (2, "shared")}


def measure(rank: int, world_size: int, way: str, items: int, targets: int, dim: int, calls: int) -> tuple[float, int]:
    """Milliseconds of a step, the fastest, and the peak of memory in bytes beyond vectors and outputs.

    Args:
        rank, world_size: of this process.
        way: of computing the loss.
        items: of the catalogue.
        targets: of all ranks.
        dim: of vectors.
        calls: number of steps.
    """
    rng = np.random.default_rng(0)
    place = Place(rank, world_size)
    own_items = AllItems(items, place).candidates
    vectors = torch.from_numpy(rng.standard_normal((own_items.ids.size, dim), np.float32) * 0.1).requires_grad_()
    h = torch.from_numpy(rng.standard_normal((targets, dim), np.float32))[rank::world_size].clone().requires_grad_()
    wanted = torch.from_numpy(rng.integers(0, items, targets))[rank::world_size].clone()
    positive = torch.from_numpy(rng.standard_normal((len(wanted), dim), np.float32) * 0.1).requires_grad_()
    batch: Any = SimpleNamespace(
        target_item=wanted,
        candidate_item=torch.from_numpy(own_items.ids),
        candidate_log_q=torch.from_numpy(own_items.log_q),
        most_targets=-(-targets // world_size),
        target_weight=None,
    )
    shared = SharedSoftmax(each_once=False)

    def step() -> None:
        if way == "dense":
            loss = F.cross_entropy(h @ vectors.t(), wanted, reduction="sum")
        elif world_size == 1:
            loss = softmax_loss(h, positive, vectors, batch.candidate_log_q, wanted)
        else:
            loss = shared(h, positive, vectors, batch, torch.float32)
        loss.backward()
        h.grad = vectors.grad = positive.grad = None

    F.cross_entropy(h[:2] @ vectors[:2].t(), wanted[:2] % 2).backward()  # loads what the first step would load
    h.grad = vectors.grad = None
    gc.collect()
    before = peak_bytes(reset=True)
    fastest = float("inf")
    for _ in range(calls):
        dist.barrier()
        since = time.perf_counter()
        step()
        fastest = min(fastest, time.perf_counter() - since)
    return 1000 * fastest, peak_bytes() - before


def peak_bytes(reset: bool = False) -> int:
    """Largest resident memory of this process, in bytes; with `reset` what it holds now, and it counts anew."""
    if reset:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))


def main() -> None:
    """Measure all ways in turn, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[100_000, 1_000_000], help="sizes of catalogues")
    parser.add_argument("--targets", type=int, default=128, help="targets of a step, over all ranks")
    parser.add_argument("--dim", type=int, default=32, help="width of vectors")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each way")
    parser.add_argument("--calls", type=int, default=3, help="steps in a turn")
    options = parser.parse_args()
    print(f"{options.targets} targets x {options.dim}, over all ranks; peak per rank beyond vectors and outputs")
    for items in options.items:
        figures: dict[str, list[tuple[float, int]]] = {name: [] for name in WAYS}
        for _ in range(options.rounds):
            for name, (ranks, way) in WAYS.items():
                arguments = (way, items, options.targets, options.dim, options.calls)
                of_ranks = run_ranks(measure, ranks, *arguments, timeout=600)
                figures[name].append((max(ms for ms, _ in of_ranks), max(peak for _, peak in of_ranks)))
        fastest = {name: min(ms for ms, _ in turns) for name, turns in figures.items()}
        peaks = {name: min(peak for _, peak in turns) for name, turns in figures.items()}
        base = next(iter(WAYS))
        for name, (ranks, _) in WAYS.items():
            gradient = -(-items // ranks) * options.dim * 4
            print(
                f"{items:>10,} items  {name:<15} {fastest[name]:9.1f} ms ({fastest[name] / fastest[base]:.2f} of dense)"
                f"  peak {peaks[name] / 2**20:8.1f} MiB ({peaks[name] / peaks[base]:.2f}), of which gradient of the "
                f"items {gradient / 2**20:.1f}"
            )


if __name__ == "__main__":
    main()
