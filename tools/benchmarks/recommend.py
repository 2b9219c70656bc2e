"""Milliseconds of one request, warm, on one core: p50 and p99 of `Recommender`, and where they go.

    OMP_NUM_THREADS=1 python -m tools.benchmarks.recommend --checkpoint runs/mine --data data/mine
    OMP_NUM_THREADS=1 python -m tools.benchmarks.recommend --items 100000 --profile

Without a checkpoint one is made of `--items` random items, trained for one step. Histories are drawn from all items.
"""

import argparse
import cProfile
import pstats
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recgpt_torchrec.serving.recommender import Recommender
from tools.small_run import write_dataset

USERS = 200


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    """Measure, print a line for each kind of request, and return its figures (see `measure`) by its name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="output folder of a run; without it one is made")
    parser.add_argument("--data", help="its dataset")
    parser.add_argument("--items", type=int, default=12_000, help="of the model that is made")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--length", type=int, default=10, help="items of a history")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--profile", action="store_true", help="also print the functions that take the most time")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if options.checkpoint is None:
            options.checkpoint, options.data = make_run(Path(folder), options)
        since = time.perf_counter()
        recommender = Recommender.load(options.checkpoint, options.data)
        keys, vectors = recommender.vectors()
        print(f"loaded {len(keys):,} items x {vectors.shape[1]} in {time.perf_counter() - since:.2f} s")
        rng = np.random.default_rng(0)
        histories = [keys.take(rng.integers(0, len(keys), options.length)).to_pylist() for _ in range(options.requests)]
        ways: dict[str, Callable[[list[str]], object]] = {
            "encode": recommender.encode,
            "recommend": lambda history: recommender.recommend(history, 10),
            "recommend, 6 interests": lambda history: recommender.recommend(history, 10, interests=6),
        }
        found = {}
        for name, way in ways.items():
            for history in histories[:20]:
                way(history)
            found[name] = measure(way, histories)
            by_clock = "p50 {:6.2f}, p99 {:6.2f}".format(*found[name])
            print(f"{name:<24} ms: {by_clock}; of core time p50 {found[name][2]:6.2f}", flush=True)
        if options.profile:
            profile = cProfile.Profile()
            profile.runcall(lambda: [recommender.recommend(history, 10) for history in histories])
            pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    return found


def measure(way: Callable[[list[str]], object], histories: list[list[str]]) -> list[float]:
    """Milliseconds of `way`, one history at a time: p50 and p99 by the clock, and p50 of core time.

    Where other work takes turns on the core, only its core time says what a request costs.
    """
    by_clock, of_core = [], []
    for history in histories:
        since, since_core = time.perf_counter(), time.thread_time()
        way(history)
        of_core.append(1000 * (time.thread_time() - since_core))
        by_clock.append(1000 * (time.perf_counter() - since))
    return [float(np.percentile(values, share)) for values, share in ((by_clock, 50), (by_clock, 99), (of_core, 50))]


def make_run(folder: Path, options: argparse.Namespace) -> tuple[str, str]:
    """Write a dataset of random histories and train for a step; the folders of the run and of the dataset."""
    from recgpt_torchrec import cli, pretrain
    from recgpt_torchrec.config import Pretrain

    rng = np.random.default_rng(1)
    histories = [rng.integers(0, options.items, 12).tolist() for _ in range(USERS)]
    write_dataset(folder / "data", histories, items=options.items, rows_per_group=USERS)
    values: dict[str, Any] = {
        "data": str(folder / "data"),
        "output": str(folder / "run"),
        "train.steps": 1,
        "model.max_len": 50,
    }
    values |= {"model.dim": options.dim, "model.layers": options.layers, "loss.candidates": "sampled"}
    pretrain.main(cli.make_config(Pretrain, "pretrain", values))
    return values["output"], values["data"]


if __name__ == "__main__":
    main()
