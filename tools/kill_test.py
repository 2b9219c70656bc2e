"""Kills ranks of small training runs with SIGKILL at random moments, and compares the results with an unkilled run.

    OMP_NUM_THREADS=1 python -m tools.kill_test --kills 50

Each run is started once, on two ranks through the launcher, which restarts both after each kill. Kills are aimed at
rare phases (restoring, writing a checkpoint, validating) as often as at training steps, or at any time after the start
of the stage; the table shows what they interrupted. A run must end with the same losses, validation metrics, tables,
moments and decoder as the unkilled one, bit for bit.

Measured on two idle cores in 7 minutes: 50 kills in 7 runs (at training steps 22, reading 3, restoring 8, starting 10,
validating 7; 20 of them while a checkpoint was written), no difference.
"""

import argparse
import glob
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tools.small_run import SMALL

AIMS = {
    "starting": ("starting", 1, 0.5),
    "restoring": ("restoring", 1, 0.05),
    "reading data": ("reading data", 12, 0.002),
    "training": ("a training step", 25, 0.05),
    "saving": ("saving", 4, 0.01),
    "writing a checkpoint": ("writing", 4, 0.1),
    "validating": ("validating", 1, 0.5),
    "any time": ("any", 1, 6.0),
}
"""By name of an aim: the phase, the maximum number of its occurrence, and the maximum number of seconds into it."""
PATIENCE_SECONDS = 6.0
"""Maximum wait for the phase after the first step; then the rank is killed in any phase."""
TRAINING = {**SMALL, "--tables.sharding": "row_wise", "--train.patience": 0, "--saving.every_steps": 4}
# `auto` would measure which precision is faster, and may choose another one for each run on a busy machine.
TRAINING |= {"--train.precision": "fp32"}
RANKS = 2


def kill_at_aim(plan: dict[str, Any], output: str) -> None:
    """Kill this process at the aim drawn for this start, if this rank is the victim; runs in a thread of each rank."""
    from recgpt_torchrec.distributed import watchdog

    start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    rng = random.Random(f"{plan['seed']} {plan['run']} {start}")
    victim, aim = rng.randrange(RANKS), rng.choice(list(AIMS))
    wanted_phase, max_occurrence, max_seconds = AIMS[aim]
    occurrence, delay = rng.randint(1, max_occurrence), rng.uniform(0, max_seconds)
    if start >= plan["kills"] or victim != int(os.environ["RANK"]):
        return
    writing = os.path.join(output, "checkpoints", "step-*.tmp")
    first_step, previous, occurrences = None, None, 0
    while True:
        status = watchdog.current_status()
        phase = "writing" if wanted_phase == "writing" and glob.glob(writing) else status.phase
        if first_step is None and status.phase == "a training step":
            first_step = time.monotonic()
        current = (phase, status.since if phase != "writing" else 0.0)
        occurrences += current != previous and wanted_phase in (phase, "any")
        previous = current
        if occurrences >= occurrence or (first_step is not None and time.monotonic() - first_step > PATIENCE_SECONDS):
            break
        time.sleep(0.0003)
    time.sleep(delay)
    status = watchdog.current_status()
    hit = {"aim": aim, "phase": status.phase, "step": status.step, "writing": bool(glob.glob(writing)), "rank": victim}
    with open(plan["log"], "a") as file:
        file.write(json.dumps({"run": plan["run"], "start": start, **hit}) + "\n")
    os.kill(os.getpid(), signal.SIGKILL)


def rank_main() -> None:
    """Run the stage `pretrain` as one rank, with the thread that may kill it."""
    plan, output = json.loads(sys.argv[2]), sys.argv[sys.argv.index("--output") + 1]
    threading.Thread(target=kill_at_aim, args=(plan, output), daemon=True).start()
    from recgpt_torchrec import cli, pretrain
    from recgpt_torchrec.config import Pretrain

    sys.argv = [sys.argv[0], *sys.argv[3:]]
    cli.run(Pretrain, pretrain.main, "recgpt_torchrec.pretrain")


def launch(data: Path, output: Path, epochs: int, plan: dict[str, Any]) -> None:
    """Train to the end through the launcher; exit with a message if that fails."""
    options = {"--data": data, "--output": output, "--train.epochs": epochs, **TRAINING}
    words = [str(word) for option in options.items() for word in option]
    launcher = ["--nnodes", "1", "--nproc_per_node", str(RANKS), "--rdzv_backend", "c10d"]
    launcher += ["--rdzv_endpoint", "localhost:0", "--max_restarts", str(plan["kills"])]
    command = [sys.executable, "-m", "recgpt_torchrec.launch.node", *launcher, "-m", "tools.kill_test", "rank"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(f"{output}.log", "w") as log:
        finished = subprocess.run([*command, json.dumps(plan), *words], env=environment, stdout=log, stderr=log)
    if finished.returncode:
        raise SystemExit(f"{output.name} ended with status {finished.returncode}; see {output}.log")


def read_epochs(output: Path) -> list[dict[str, Any]]:
    """Read the metrics of each epoch, without timings."""
    from recgpt_torchrec.training.runlog import TIMINGS

    lines = [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def read_tensors(output: Path) -> dict[str, Any]:
    """Read every tensor of the newest checkpoint."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    newest = sorted((output / "checkpoints").glob("step-*[0-9]"))[-1]
    metadata = dcp.FileSystemReader(newest).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, checkpoint_id=newest, no_dist=True)
    return tensors


def find_differences(output: Path, unkilled: Path) -> list[str]:
    """Compare the results of a run with those of the unkilled one; returns one line per difference."""
    import torch

    epochs, expected = read_epochs(output), read_epochs(unkilled)
    lines = [f"epoch {a['epoch']}: {a}, unkilled {b}" for a, b in zip(epochs, expected, strict=False) if a != b]
    if len(epochs) != len(expected):
        lines.append(f"{len(epochs)} epochs, unkilled {len(expected)}")
    tensors, others = read_tensors(output), read_tensors(unkilled)
    if tensors.keys() != others.keys():
        lines.append("the names of the tensors differ")
    return lines + [name for name, value in tensors.items() if name in others and not torch.equal(value, others[name])]


def run_kill_test(
    folder: Path, kills: int, per_run: int, epochs: int, seed: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """Train runs until `kills` kills have happened.

    Returns:
        hits: phase, step and rank of each kill.
        differences: from the unkilled run, one line each.
    """
    from tools.small_run import walks, write_dataset

    data, unkilled, log = folder / "data", folder / "alone", folder / "kills.jsonl"
    write_dataset(data, walks(200, 60, shortest=3, longest=14), items=60, rows_per_group=8, groups_per_part=4)
    plan = {"seed": seed, "run": 0, "kills": 0, "log": str(log)}
    launch(data, unkilled, epochs, plan)
    hits: list[dict[str, Any]] = []
    differences: list[str] = []
    for run in range(1, kills + 1):
        output = folder / f"run{run}"
        launch(data, output, epochs, {**plan, "run": run, "kills": min(per_run, kills - len(hits))})
        hits = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        lines = [f"run {run}: {line}" for line in find_differences(output, unkilled)]
        differences += lines
        count = sum(hit["run"] == run for hit in hits)
        print(f"run {run}: {count} kills, {'DIFFERS' if lines else 'identical'}; {len(hits)} of {kills}", flush=True)
        if len(hits) >= kills:
            break
    return hits, differences


def main() -> int:
    """Run the test, print the phases that were killed and the differences, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="total number of kills")
    parser.add_argument("--per_run", type=int, default=10, help="maximum number of kills per run")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="folder that keeps runs and logs; must not exist")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        hits, differences = run_kill_test(folder, options.kills, options.per_run, options.epochs, options.seed)
    hit_counts = Counter((hit["phase"], hit["writing"], hit["rank"]) for hit in hits)
    print(f"\n{'killed while':22}{'rank 0':>8}{'rank 1':>8}{'of them while a checkpoint was written':>46}")
    for phase in sorted({hit["phase"] for hit in hits}):
        by_rank = [sum(hit_counts[phase, writing, rank] for writing in (False, True)) for rank in range(RANKS)]
        writing = sum(hit_counts[phase, True, rank] for rank in range(RANKS))
        print(f"{phase:22}{by_rank[0]:8}{by_rank[1]:8}{writing:46}")
    print(f"{len(hits)} kills in {len({hit['run'] for hit in hits})} runs, {len(differences)} differences")
    print("\n".join(differences))
    return bool(differences) or len(hits) < options.kills


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        rank_main()
    else:
        sys.exit(main())
