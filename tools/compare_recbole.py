"""The paper's baselines from RecBole, each trained for some minutes, beside ours: same split, our metrics, with time.

    make recbole
    python tools/compare_recbole.py --data DATASET --output runs/recbole --models BPR SASRec --minutes 30 \\
        --ours runs/paper/beauty/seed0/pretrain_test.json

DATASET is one that prepare made with --hold_out last. RecBole trains on all but each user's last two items, chooses its
best epoch on the second last, and scores all items for the history before the last one; ranks and metrics of these
scores are this project's, masked and unmasked. Each model's result is kept as OUTPUT/MODEL.json, so that a stopped
comparison goes on; OUTPUT/report.md and report.json have all of them, and the evaluations of --ours. S3-Rec is left out
since it needs attributes, and ComiRec is not in RecBole.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from recgpt_torchrec.catalogue.ranks import both_ranks  # noqa: E402
from recgpt_torchrec.data.dataset import Dataset  # noqa: E402
from recgpt_torchrec.data.histories import Histories  # noqa: E402
from recgpt_torchrec.data.reading.histories import HistoryReader  # noqa: E402
from recgpt_torchrec.data.split import SplitName  # noqa: E402
from recgpt_torchrec.data.windows import row_groups  # noqa: E402
from recgpt_torchrec.evaluation.metrics import RankingMetrics  # noqa: E402
from tools.recbole_model import MODELS  # noqa: E402

KS = (5, 10, 20, 50, 100)
ENVIRONMENT = ".venv-recbole/bin/python"
USERS = 512
"""Ranked at once."""


def main(arguments: list[str] | None = None) -> None:
    """Train every model that has no result yet, and write the report."""
    options = parse(arguments)
    dataset = Dataset.open(options.data)
    if dataset.manifest.hold_out != "last":
        raise SystemExit(f"--data {options.data} is not prepared with --hold_out last, which RecBole's split is")
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    settings = {"minutes": options.minutes, "seed": options.seed, "threads": options.threads}
    settings |= {"vocabulary": dataset.manifest.vocabulary}
    for name in options.models:
        path = output / f"{name}.json"
        earlier = json.loads(path.read_text()) if path.exists() else None
        if earlier is not None and earlier["settings"] != settings:
            raise SystemExit(f"{path} has other minutes, seed, threads or data; give another --output, or remove it")
        if earlier is None:
            write_log(dataset, output / "log")
            print(f"{name}: training for up to {options.minutes:g} minutes", flush=True)
            result = {**train(name, dataset, output, options), "settings": settings}
            path.write_text(json.dumps(result, indent=1))
    write_report(options, output)
    print(f"report        {output}/report.md, report.json")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="dataset, prepared with --hold_out last")
    parser.add_argument("--output", default="runs/recbole", help="output folder (default: runs/recbole)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all of them")
    parser.add_argument("--minutes", type=float, default=30, help="of training per model (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    parser.add_argument("--ours", nargs="*", default=[], metavar="FILE", help="evaluations of this project to show too")
    parser.add_argument("--python", default=str(ROOT / ENVIRONMENT), help=f"RecBole's (default: {ENVIRONMENT})")
    options = parser.parse_args(arguments)
    if options.minutes <= 0 or options.threads < 1:
        parser.error("--minutes must be more than 0, and --threads at least 1")
    if not Path(options.python).exists():
        parser.error(f"there is no {options.python}; run make recbole, or name an interpreter with --python")
    return options


def read(dataset: Dataset, split: SplitName) -> Histories:
    """The whole histories of a split, with what it holds out."""
    return HistoryReader(dataset=dataset, split=split, max_len=1).read(row_groups(dataset))


def write_log(dataset: Dataset, folder: Path) -> None:
    """Write all interactions as RecBole reads them, with their places in the history as times."""
    file = folder / f"{folder.name}.inter"
    if file.exists():
        return
    folder.mkdir(exist_ok=True)
    histories = read(dataset, "all")
    assert histories.seen is not None
    temporary = file.with_suffix(".tmp")
    with open(temporary, "w") as out:
        out.write("user_id:token\titem_id:token\ttimestamp:float\n")
        for row, user in enumerate(histories.users.tolist()):
            items = histories.seen.values[histories.seen.offsets[row] : histories.seen.offsets[row + 1]].tolist()
            out.writelines(f"{user}\t{item}\t{place}\n" for place, item in enumerate(items))
    temporary.replace(file)


def train(name: str, dataset: Dataset, output: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train a model in RecBole's environment and rank its scores; returns its result."""
    scores, result, job = (output / f"{name}.{ending}" for ending in ("scores.npy", "result.json", "job.json"))
    values = {"model": name, "log": str((output / "log").resolve()), "minutes": options.minutes, "seed": options.seed}
    values |= {"users": dataset.manifest.users, "items": dataset.manifest.items, "threads": options.threads}
    job.write_text(json.dumps(values | {"scores": str(scores.resolve()), "result": str(result.resolve())}))
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "PYTHONPATH": ""}
    command = [options.python, "-W", "ignore", str(ROOT / "tools/recbole_model.py"), str(job.resolve())]
    try:
        done = subprocess.run(command, env=environment, cwd=output)
        if done.returncode:
            raise SystemExit(f"{name}: RecBole ended with status {done.returncode}")
        return {**json.loads(result.read_text()), **rank(dataset, np.load(scores, mmap_mode="r"))}
    finally:
        for file in (scores, result, job):
            file.unlink(missing_ok=True)


def rank(dataset: Dataset, scores: np.ndarray) -> dict[str, Any]:
    """HR and NDCG of scores [users, items] for the histories before each user's test item, and the number of users."""
    histories = read(dataset, "test")
    seen, held_out = histories.seen, histories.held_out
    assert seen is not None and held_out is not None
    metrics = {how: RankingMetrics(KS) for how in ("masked", "unmasked")}
    for start in range(0, histories.users.size, USERS):
        rows = np.arange(start, min(start + USERS, histories.users.size))
        of_users = torch.from_numpy(scores[histories.users[rows]])
        ranks = both_ranks(of_users, torch.from_numpy(held_out[rows].astype(np.int64)), seen.take(rows))
        for each, values in zip(metrics.values(), ranks, strict=True):
            each.update(values)
    return {"users": int(histories.users.size), **{how: each.result() for how, each in metrics.items()}}


def write_report(options: argparse.Namespace, output: Path) -> None:
    """Write the table of every model that has a result, and of our evaluations."""
    found = {name: output / f"{name}.json" for name in MODELS}
    models = {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}
    ours = {file: json.loads(Path(file).read_text())["results"] for file in options.ours}
    about = (
        "Test, leave-one-out, the whole catalogue is ranked. Minutes of training, with its validations: up to the best"
    )
    lines = ["# RecBole's models beside ours", "", f"{about} epoch, and in all.", ""]
    for how in ("masked", "unmasked"):
        columns = [f"{metric}@{k}" for k in KS for metric in ("HR", "NDCG")]
        lines += [f"## {how}", "", "| | " + " | ".join(columns) + " | best at | minutes |"]
        lines.append("|---|" + "---|" * (len(columns) + 2))
        for name, result in models.items():
            cells = [f"{result[how][column]:.4f}" for column in columns]
            best = max(result["curve"], key=lambda point: point["NDCG@10"])
            minutes = [f"{seconds / 60:.1f}" for seconds in (best["seconds"], result["train_s"])]
            lines.append(f"| {name} | " + " | ".join([*cells, *minutes]) + " |")
        for file, results in ours.items():
            for path, figures in results.items():
                cells = [f"{figures[how][c]:.4f}" if c in figures[how] else "–" for c in columns]
                lines.append(f"| {path} ({file}) | " + " | ".join([*cells, "", ""]) + " |")
        lines.append("")
    (output / "report.md").write_text("\n".join(lines))
    (output / "report.json").write_text(json.dumps({"models": models, "ours": ours}, indent=1))


if __name__ == "__main__":
    main()
