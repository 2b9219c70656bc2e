"""Time and memory of the catalogue's exact search and rank counts, against plain operations on the dense matrix.

    OMP_NUM_THREADS=1 python -m tools.benchmarks.search --items 1000000 --queries 64
    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 -m tools.benchmarks.search --items 1000000

The plain way is `torch.topk` of `queries @ vectors.t()`, or comparisons with the targets' scores in it. With several
ranks each rank holds its id range and asks for its own queries, the plain way still has all vectors on every rank. The
ways take turns; prints medians, their ratio, and on one rank how far each way's peak memory rises above what the
process holds, in a process of its own.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from recgpt_torchrec.catalogue.catalogue import Catalogue
from recgpt_torchrec.data.candidates import id_range
from recgpt_torchrec.data.ragged import Ragged
from recgpt_torchrec.distributed.processes import print_result, process_group, rank, world_size

KS = (10, 50)
SEEN = 10
"""Items of each history, which do not compete."""

Way = Callable[[], object]


def main() -> None:
    """Measure, and print a line for each operation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--queries", type=int, default=64, help="queries per rank")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with process_group(device="cpu"):
        pairs = make_ways(options)
        print_result(
            f"{options.items:,} items x {options.dim}, {options.queries} queries per rank, {world_size()} ranks"
        )
        for name, (ours, plain) in pairs.items():
            seconds: tuple[list[float], list[float]] = ([], [])
            for turn in range(options.rounds):
                for way in (0, 1) if turn % 2 else (1, 0):
                    since = time.perf_counter()
                    (ours, plain)[way]()
                    seconds[way].append(time.perf_counter() - since)
            mine, theirs = (statistics.median(each) for each in seconds)
            ratio = statistics.median(a / b for a, b in zip(*seconds, strict=True))
            memory = ""
            if world_size() == 1:
                peaks = [peak_of(options, name, way) for way in (0, 1)]
                memory = f"; memory above the vectors {peaks[0] / 2**20:,.0f} and {peaks[1] / 2**20:,.0f} MiB"
            print_result(f"{name:<11} {1000 * mine:,.0f} ms, plain {1000 * theirs:,.0f} ms: ratio {ratio:.2f}{memory}")


def make_ways(options: argparse.Namespace) -> dict[str, tuple[Way, Way]]:
    """For each operation the catalogue's way and the plain one."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(options.items, options.dim, generator=generator)
    first, stop = id_range(options.items, rank(), world_size())
    catalogue = Catalogue.of_vectors(vectors[first:stop], options.items, first)
    generator.manual_seed(1 + rank())
    queries = torch.randn(options.queries, options.dim, generator=generator)
    targets = torch.randint(options.items, (options.queries,), generator=generator)
    seen = torch.randint(options.items, (options.queries, SEEN), generator=generator)
    history = Ragged(seen.flatten().numpy(), SEEN * np.arange(options.queries + 1))

    def plain_top_k(k: int) -> torch.Tensor:
        scores = queries @ vectors.t()
        scores.scatter_(1, seen, -torch.inf)
        return scores.topk(k, dim=1).indices

    def plain_ranks() -> torch.Tensor:
        scores = queries @ vectors.t()
        own = scores.gather(1, targets[:, None])
        return (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2

    ways: dict[str, tuple[Way, Way]] = {
        f"top_k, k={k}": (lambda k=k: catalogue.top_k(queries, k, history), lambda k=k: plain_top_k(k))  # type: ignore[misc]
        for k in KS
    }
    ways["ranks"] = (lambda: catalogue.ranks(queries, targets, history), plain_ranks)
    return ways


def peak_of(options: argparse.Namespace, name: str, way: int) -> int:
    """Bytes by which the peak of a new process rises while it runs one way of an operation."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure_peak, (options, name, way))


def _measure_peak(options: argparse.Namespace, name: str, way: int) -> int:
    torch.set_num_threads(1)
    function = make_ways(options)[name][way]
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten (Linux)
    before = _read_peak()
    function()
    return _read_peak() - before


def _read_peak() -> int:
    """Peak of this process's memory in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main()
