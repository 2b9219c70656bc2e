"""Two ranks against one, beside what two processes that know nothing of each other reach: the machine's own limit."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from recgpt_torchrec.distributed.processes import process_group, silence_libraries
from tools.benchmarks.measuring import Figures, Kind, Ratio
from tools.benchmarks.settings import Settings
from tools.benchmarks.training import Training
from tools.ranks import run_ranks

STEPS = 25
"""Steps of a turn."""
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


def ranks(settings: Settings) -> Kind:
    """Two ranks (gloo, one thread each) over one: at 4,096 tokens per rank, and at 1,536 tokens in all."""
    large, small = settings.pick(4096, 256), settings.pick(1536, 128)

    def on(world_size: int, tokens: int, alone: bool = False) -> Callable[[], Figures]:
        return lambda: _turn(settings, world_size, tokens, alone)

    ways = {
        f"1 rank, {large:,} tokens": on(1, large),
        f"2 ranks, {large:,} tokens each": on(2, large),
        f"2 processes apart, {large:,} tokens each": on(2, large, alone=True),
        f"1 rank, {small:,} tokens": on(1, small),
        f"2 ranks, {small:,} tokens in all": on(2, small // 2),
        f"2 processes apart, {small // 2:,} tokens each": on(2, small // 2, alone=True),
    }
    one, two, apart, one_small, two_small, apart_small = ways
    rate = "targets_s"
    ratios = {
        f"2 ranks over 1, {large:,} tokens per rank": Ratio((two, rate), (one, rate), 1.8),
        f"ceiling: 2 processes apart over 1, {large:,} tokens each": Ratio((apart, rate), (one, rate)),
        f"2 ranks over 1, {small:,} tokens in all": Ratio((two_small, rate), (one_small, rate), 1.5),
        f"ceiling: 2 processes apart over 1, {small:,} tokens in all": Ratio((apart_small, rate), (one_small, rate)),
    }
    return Kind(ways, ratios)


def _turn(settings: Settings, world_size: int, tokens: int, alone: bool) -> Figures:
    steps, warm_up = settings.pick(STEPS, 2), settings.pick(5, 1)
    with tempfile.TemporaryDirectory(prefix="ranks-", dir=settings.folder) as folder:
        function = _train_alone if alone else _train
        arguments = (str(Path(settings.data).absolute()), tokens, steps, warm_up, folder)
        of_ranks: list[Figures] = run_ranks(function, world_size, *arguments, timeout=300.0)
    if alone:
        total = {name: sum(figures[name] for figures in of_ranks) for name in ("targets_s", "cores")}
        return {**of_ranks[0], **total}
    return {**of_ranks[0], "cores": sum(figures["cores"] for figures in of_ranks)}


def _train(rank: int, world_size: int, data: str, tokens: int, steps: int, warm_up: int, folder: str) -> Figures:
    """One rank's figures of a turn, in the process group of the ranks."""
    silence_libraries()
    options: dict[str, Any] = {"batch.tokens": tokens}
    training = Training(data, options, steps, warm_up)
    dist.barrier()
    return training.turn()


def _train_alone(rank: int, world_size: int, data: str, tokens: int, steps: int, warm_up: int, folder: str) -> Figures:
    """The figures of a turn in a process group of this process alone, at the same time as the other processes."""
    dist.barrier()  # no rank leaves before all have joined
    dist.destroy_process_group()
    for name in LAUNCHER:
        del os.environ[name]
    ready = dist.FileStore(os.path.join(folder, "ready"), world_size)
    with process_group():
        training = Training(data, {"batch.tokens": tokens}, steps, warm_up)
        _meet(ready, "built", world_size)
        figures = training.turn()
        _meet(ready, "trained", world_size)
    return figures


def _meet(store: dist.FileStore, name: str, world_size: int) -> None:
    """Wait until all processes are here."""
    if store.add(name, 1) == world_size:
        store.set(f"all {name}", "")
    store.wait([f"all {name}"])
