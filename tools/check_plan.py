"""Holds the estimates of `plan` against runs on this machine: peak memory of every rank, and the time of a step.

    OMP_NUM_THREADS=1 python -m tools.check_plan --items 1e6 5e6 --ranks 1 2 --output plan.json

For each size it writes a dataset (`tools.write_dataset`), pre-trains some steps with a validation on a sample and a
checkpoint, and compares each rank's peak with the estimate. What a process takes before it builds a model, its *base*,
is measured apart (after all imports, with a process group) and left out on both sides. The status is 1 if the fullest
rank of a run is more than `--tolerance` off.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from recgpt_torchrec.config import Model, Plan, TrainingBatch
from recgpt_torchrec.distributed.memory import available_bytes
from recgpt_torchrec.distributed.processes import silence_libraries
from recgpt_torchrec.planning.report import Estimate
from tools.benchmarks.processes import Ended, base_bytes, run_stage_measured
from tools.write_dataset import whole

MIB = 2**20
TOLERANCE = 0.15
TIMEOUT = 900.0
"""Seconds for one run."""


def main(arguments: list[str] | None = None) -> int:
    """Measure every size and print a table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=whole, nargs="+", default=[10**6, 5 * 10**6], help="catalogue sizes")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks")
    parser.add_argument("--dim", type=int, default=32, help="width of the tables")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per batch and rank")
    parser.add_argument("--users", type=whole, default=8000, help="number of users")
    parser.add_argument("--steps", type=int, default=40, help="training steps")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="largest deviation of the memory")
    parser.add_argument("--output", help="JSON file for the figures")
    options = parser.parse_args(arguments)
    silence_libraries()
    base = base_bytes()
    print(f"base of a process: {base / MIB:,.0f} MiB; MiB beyond it, of the fullest rank:", flush=True)
    print(f"{'items':>12} {'ranks':>5} {'estimate':>9} {'measured':>9} {'ratio':>6}   ms per step: estimate, measured")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="check-plan-") as folder:
        for items in options.items:
            data = f"{folder}/data-{items}"
            words = ["--items", items, "--users", options.users, "--output", data]
            subprocess.run([sys.executable, "-m", "tools.write_dataset", *map(str, words)], check=True)
            for ranks in options.ranks:
                estimate = estimate_of(options, items, ranks)
                ended = train(options, data, f"{folder}/run-{items}-{ranks}", ranks)
                if ended.status:
                    print(f"{items:>12,} {ranks:>5} failed with status {ended.status}:\n{ended.last_lines}")
                    rows.append({"items": items, "ranks": ranks, "status": ended.status})
                    continue
                rows.append(compare(options, estimate, ended, base, f"{folder}/run-{items}-{ranks}"))
                print(row_text(rows[-1]), flush=True)
                if options.output:
                    Path(options.output).write_text(json.dumps({"base": base, "runs": rows}, indent=1))
    off = [row for row in rows if row.get("status") or abs(row["ratio"] - 1) > options.tolerance]
    print(f"{len(rows) - len(off)} of {len(rows)} within {options.tolerance:.0%}")
    return int(bool(off))


def estimate_of(options: argparse.Namespace, items: int, ranks: int) -> Estimate:
    """The estimate of one run, with the memory that this machine has left now."""
    import torch

    plan = Plan(
        items=items,
        users=options.users,
        gpu="cpu",
        gpus=ranks,
        memory=available_bytes(torch.device("cpu")) / 2**30,
        history=17.0,  # of 20 interactions two are held out, and the first is no target
        model=Model(dim=options.dim),
        batch=TrainingBatch(tokens=options.tokens),
    )
    return Estimate.of(plan)


def train(options: argparse.Namespace, data: str, output: str, ranks: int) -> Ended:
    """Pre-train with a validation and a checkpoint at the end."""
    given: dict[str, object] = {
        "--data": data,
        "--output": output,
        "--device": "cpu",
        "--model.dim": options.dim,
        "--batch.tokens": options.tokens,
        "--train.steps": options.steps,
        "--train.validate_users": 64,
        "--train.precision": "fp32",
        "--saving.keep": 1,
    }
    return run_stage_measured("pretrain", given, ranks, timeout=TIMEOUT)


def compare(options: argparse.Namespace, estimate: Estimate, ended: Ended, base: int, output: str) -> dict[str, Any]:
    """The figures of one run beside its estimate; memory without the process's base, bytes."""
    process = next(item.device for item in estimate.memory.items if item.name == "process")
    expected, measured = estimate.memory.total("device") - process, max(ended.peaks.values()) - base
    epochs = [json.loads(line) for line in Path(output, "history.jsonl").read_text().splitlines()]
    trained = [epoch for epoch in epochs if epoch.get("tokens_per_s")]
    ranks = len(ended.peaks)
    step = options.tokens * ranks / trained[-1]["tokens_per_s"] if trained else float("nan")
    return {
        "items": estimate.workload.items,
        "ranks": ranks,
        "estimate": expected,
        "measured": measured,
        "ratio": expected / measured,
        "peaks": ended.peaks,
        "step_estimate": estimate.time.seconds,
        "step": step,
        "parts": {item.name: item.device for item in estimate.memory.items},
    }


def row_text(row: dict[str, Any]) -> str:
    """One line of the table."""
    return (
        f"{row['items']:>12,} {row['ranks']:>5} {row['estimate'] / MIB:>9,.0f} {row['measured'] / MIB:>9,.0f} "
        f"{row['ratio']:>6.2f}   {row['step_estimate'] * 1e3:,.1f}, {row['step'] * 1e3:,.1f}"
    )


if __name__ == "__main__":
    sys.exit(main())
