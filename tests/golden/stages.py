"""Run every stage on one small log, as the ranks of a process group, and write down what each computed.

FOLDER/figures.json holds losses, metrics and fingerprints, FOLDER/arrays.npz prompts, vectors and lists. Stages are run
by their command-line options alone, so that this file need not change when the code behind them does.
"""

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch.distributed as dist

from recgpt_torchrec.training.runlog import TIMINGS
from tests.support import read_epochs, stage, stay_in_group

USERS, ITEMS = 160, 50
SMALL = {
    "--model.dim": 8,
    "--model.max_len": 8,
    "--model.layers": 2,
    "--batch.tokens": 256,
    "--train.epochs": 10,
    "--train.validate_every": 5,
    "--optimizer.warmup_steps": 5,
    "--seed": 3,
    "--train.precision": "fp32",
}
PRETRAIN: dict[str, dict[str, Any]] = {
    "all": {"--loss.candidates": "all", "--batch.long_histories": "windows"},
    "sampled": {"--loss.candidates": "sampled", "--loss.negatives": 20},
    "log_uniform": {"--loss.candidates": "sampled", "--loss.negatives": 20, "--loss.negatives_by": "log_uniform"},
    "in_batch": {"--loss.candidates": "in_batch", "--tables.optimizer": "adagrad"},
    "bce": {
        "--loss.candidates": "bce",
        "--loss.negatives": 20,
        "--loss.bce_negatives": 2,
        "--tables.optimizer": "adam",
    },
}
"""Options of the pre-training runs, by name."""


def write_log(path: Path) -> None:
    """A log with clicks and impressions: each item is mostly followed by one of the next three on a ring."""
    rng = np.random.default_rng(7)
    with open(path, "w", newline="") as file:
        read_sorted_columns = csv.writer(file)
        read_sorted_columns.writerow(["user_id", "item_id", "timestamp", "clicked"])
        for user in range(USERS):
            at = int(rng.integers(ITEMS))
            for place in range(int(rng.integers(3, 15))):
                read_sorted_columns.writerow([f"u{user}", f"i{at}", 1000 * user + 10 * place, 1])
                if rng.random() < 0.3:
                    read_sorted_columns.writerow(
                        [f"u{user}", f"i{int(rng.integers(ITEMS))}", 1000 * user + 10 * place + 5, 0]
                    )
                at = (at + int(rng.integers(1, 4))) % ITEMS if rng.random() < 0.9 else int(rng.integers(ITEMS))


def run(name: str, **options: Any) -> None:
    """Run a stage, given the options of its command line."""
    status = stage(name, options)
    if status:
        raise SystemExit(f"{name} ended with status {status}")


def read_epochs_without_timings(folder: Path) -> list[dict[str, float]]:
    """Read the metrics of each epoch of a run, without timings."""
    lines = [line for line in read_epochs(folder) if line["epoch"]]  # no start was validated when they were recorded
    return [{k: v for k, v in epoch.items() if k not in TIMINGS} for epoch in lines]


def read_sorted_columns(folder: Path) -> dict[str, list[Any]]:
    """Read a folder of Parquet parts as columns, ordered by the first column."""
    table = pq.read_table(folder)
    return table.sort_by(table.schema.names[0]).to_pydict()


def all_stages(rank: int, world_size: int, folder: Path) -> None:
    """Run all stages in `folder`; the first rank writes the results down. For `run_ranks`."""
    # Every stage joins a process group and leaves it; here all of them share the one there is.
    stay_in_group()
    first = rank == 0
    log, data, prompts = folder / "log.csv", folder / "data", folder / "prompts"
    if first:
        write_log(log)
        ranks = os.environ.pop("WORLD_SIZE")  # it is started as one process
        run("prepare", **{"--input": log, "--output": data, "--min_count": 3, "--click_column": "clicked"})
        os.environ["WORLD_SIZE"] = ranks
    dist.barrier()
    for name, options in PRETRAIN.items():
        run("pretrain", **{"--data": data, "--output": folder / name, **SMALL, **options})
    trained = {"--data": data, "--checkpoint": folder / "all"}
    asked = {"--prompts.k": 2, "--prompts.source": "both", "--prompts.answers": 3, "--batch_users": 16}
    run("generate_prompts", **{**trained, "--output": prompts, **asked})
    tuning = {"--tuning.soft_targets": 0.3, "--tuning.predict_from": "last", "--loss.negatives": 20}
    small = {option: value for option, value in SMALL.items() if "model" not in option}
    both = {"--data": prompts, "--checkpoint": folder / "all", **small, **tuning}
    run("prompt_tune", **{**both, "--output": folder / "tuned"})
    run("prompt_tune", **{**both, "--output": folder / "control", "--tuning.prompts": "false"})
    for name in ("all", "tuned", "control"):
        where = {"--data": data if name == "all" else prompts, "--checkpoint": folder / name}
        run("evaluate", **{**where, "--output": folder / f"{name}.json", "--recall.interests": 3})
    vectors = {"--data": prompts, "--checkpoint": folder / "tuned", "--output": folder / "vectors"}
    run("export", **{**vectors, "--interests": 3, "--history": "test"})
    for merge in ("two_step", "quota", "score"):
        where = {"--export": folder / "vectors", "--data": prompts, "--output": folder / merge}
        run("retrieve", **{**where, "--k": 10, "--merge": merge})
    if not first:
        return
    figures: dict[str, Any] = {
        name: read_epochs_without_timings(folder / name) for name in (*PRETRAIN, "tuned", "control")
    }
    for name in ("all", "tuned", "control"):
        evaluated = json.loads((folder / f"{name}.json").read_text())
        figures[f"evaluate {name}"] = {part: evaluated[part] for part in ("users", "results", "recall")}
    figures["vocabulary"] = json.loads((data / "manifest.json").read_text())["vocabulary"]
    arrays: dict[str, Any] = {}
    for name, part in (("data", data / "sequences"), ("prompts", prompts / "sequences")):
        for column, lists in read_sorted_columns(part).items():
            arrays[f"{name} {column}"] = np.concatenate([np.atleast_1d(each) for each in lists])
    arrays["item vectors"] = np.array(read_sorted_columns(folder / "vectors" / "items")["vector"], np.float32)
    arrays["user vectors"] = np.array(read_sorted_columns(folder / "vectors" / "users")["vectors"], np.float32)
    for merge in ("two_step", "quota", "score"):
        merged = read_sorted_columns(folder / merge / "lists")
        for column in ("item_ids", "scores", "interests"):
            arrays[f"{merge} {column}"] = np.array(merged[column])
    (folder / "figures.json").write_text(json.dumps(figures, indent=1))
    np.savez_compressed(folder / "arrays.npz", **arrays)
