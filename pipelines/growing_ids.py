"""Ids that never stop growing: a vocabulary against tables of a fixed size, on days that each bring new items.

    python pipelines/growing_ids.py --output runs/growing_ids

Every day adds a tenth of the items that users still look at, and as many are forgotten. Each arm prepares every day
with `--vocabulary` of the day before, trains on it from the checkpoint of the day before, and predicts each user's
first interaction of the next day with an item that was seen before:

    vocabulary        a row per item and user that ever was
    managed           --ids managed: tables of --item_rows and --user_rows
    hash              --ids hash: a table of --item_rows for the items, users have a vocabulary
    restarted         as managed, but killed while it trains in the middle, and started again

A target that an arm cannot name is a miss: without a row (managed), or not the key that names its row (hash). Writes
OUTPUT/report.md and report.json; the same command resumes an interrupted pipeline.
"""

import argparse
import csv
import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402

from pipelines.experiment import from_root  # noqa: E402
from pipelines.steps import ROOT, RecordedSteps, environment, pipeline  # noqa: E402

DAY = 86_400
ALIVE = 10
"""Number of days that an item is looked at: each day brings a tenth of the items of these."""
HISTORY_DAYS = 10
"""Days of the log that histories are made of."""
ARMS = ("vocabulary", "managed", "hash", "restarted")


@dataclass(kw_only=True)
class Options:
    """Options of this pipeline."""

    output: str
    days: int
    users: int
    new_items: int
    """Items that come every day."""
    item_rows: int
    user_rows: int
    events: int
    """Interactions per user and day."""
    epochs: int
    measure_every: int
    """Days between two measurements."""
    dim: int
    seed: int

    def planned(self) -> list[str]:
        """The kind of every step, see `RecordedSteps`."""
        return [f"arm {arm}" for arm in ARMS]

    @property
    def measured_days(self) -> list[int]:
        """The days whose next day is predicted; the last one is among them."""
        return [day for day in range(self.days) if (self.days - 1 - day) % self.measure_every == 0 and day > 0]

    @property
    def words(self) -> list[str]:
        """The options as words of a command line."""
        return [word for name, value in asdict(self).items() for word in (f"--{name}", str(value))]


def main(arguments: list[str] | None = None) -> None:
    """Run every unfinished arm, and write the report."""
    options, arm = parse(arguments)
    if arm is not None:
        return run_arm(options, arm)
    with pipeline("growing_ids", options.output, options.planned()) as steps:
        for name in ARMS:
            run_step(options, name, steps)
        write_report(options, steps)
    return None


def parse(arguments: list[str] | None = None) -> tuple[Options, str | None]:
    """Parse the command line; paths become relative to the project, where commands run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/growing_ids", help="output folder (default: runs/growing_ids)")
    parser.add_argument("--days", type=int, default=30, help="days to train on (default: 30)")
    parser.add_argument(
        "--users", type=int, default=300, help="users at a time; 2%% of them change daily (default: 300)"
    )
    parser.add_argument(
        "--new_items", type=int, default=20, help="new items per day, a tenth of those alive (default: 20)"
    )
    parser.add_argument("--item_rows", type=int, default=260, help="rows of the items' table (default: 260)")
    parser.add_argument("--user_rows", type=int, default=340, help="rows of the users' table (default: 340)")
    parser.add_argument("--events", type=int, default=6, help="interactions per user and day (default: 6)")
    parser.add_argument("--epochs", type=int, default=4, help="epochs per day (default: 4)")
    parser.add_argument("--measure_every", type=int, default=5, help="days between two measurements (default: 5)")
    parser.add_argument("--dim", type=int, default=32, help="model.dim (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="of the log and of training (default: 0)")
    parser.add_argument("--arm", choices=ARMS, help="run one arm in this process, as the pipeline does")
    given = vars(parser.parse_args(arguments))
    arm = given.pop("arm")
    if min(value for name, value in given.items() if name not in ("output", "seed")) < 1 or given["days"] < 3:
        parser.error("sizes must be at least 1, and --days at least 3")
    return Options(**{**given, "output": from_root(given["output"])}), arm


# ------------------------------------------------------------------------------------------------------ the log


def make_days(options: Options) -> list[list[tuple[str, str, int]]]:
    """The interactions (user, item, time) of each day, and of one more to predict.

    The items of a day form a cycle. A user's next item is with probability 0.8 the next of the cycle of their last one,
    if it is still looked at; else any item alive, newer ones more often.
    """
    rng = np.random.default_rng(options.seed)
    size, users = options.new_items, [f"user_{number:05d}" for number in range(options.users)]
    last: dict[str, tuple[int, int]] = {}
    days, created = [], options.users
    for day in range(options.days + 1):
        if day:
            for place in rng.choice(options.users, max(1, options.users // 50), replace=False):
                users[place], created = f"user_{created:05d}", created + 1
        series = np.arange(day - ALIVE + 1, day + 1)
        weights = np.exp((series - day) / 4)
        rows = []
        for user in users:
            times = np.sort(rng.choice(DAY, options.events, replace=False))
            for second in times.tolist():
                own, place = last.get(user, (-ALIVE, 0))
                if own >= series[0] and rng.random() < 0.8:
                    place = (place + 1) % size
                else:
                    own, place = int(rng.choice(series, p=weights / weights.sum())), int(rng.integers(size))
                last[user] = own, place
                rows.append((user, f"item_{own + ALIVE:04d}_{place:03d}", day * DAY + second))
        days.append(rows)
    return days


def write_log(path: Path, rows: list[tuple[str, str, int]]) -> str:
    """Write rows as CSV, unless the file is there: a log that was written again would be another input."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        with open(temporary, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("user_id", "item_id", "timestamp"))
            writer.writerows(rows)
        temporary.replace(path)
    return str(path)


# ------------------------------------------------------------------------------------------------------- an arm


def run_step(options: Options, arm: str, steps: RecordedSteps) -> None:
    """Run an arm as a step; the one that is restarted is killed once before."""
    command = ["python", "pipelines/growing_ids.py", *options.words, "--arm", arm]
    result = f"{options.output}/{arm}/result.json"
    if arm == "restarted" and not (ROOT / options.output / arm / "killed.json").exists():
        kill_once(options, command)
    steps.run(arm, command, kind=f"arm {arm}", proof=result, settings=asdict(options))


def kill_once(options: Options, command: list[str]) -> None:
    """Start an arm, and kill it once it has saved a checkpoint in the middle of the day in the middle."""
    folder = ROOT / options.output / "restarted"
    run = folder / f"run{options.days // 2:02d}"
    process = subprocess.Popen([sys.executable, *command[1:]], cwd=ROOT, env=environment())
    try:
        while process.poll() is None and not checkpoints_of(run):
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    saved = [path.name for path in checkpoints_of(run)]
    (folder / "killed.json").write_text(json.dumps({"day": options.days // 2, "checkpoints": saved}))


def checkpoints_of(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in run.glob("checkpoints/step-*") if path.suffix != ".tmp")


def run_arm(options: Options, arm: str) -> None:
    """Prepare and train day by day, and measure; what is there already is left as it is."""
    from recgpt_torchrec import pretrain
    from recgpt_torchrec.config import Loss, Model, Pretrain, Saving, Train, TrainingBatch
    from recgpt_torchrec.preparation.pipeline import prepare

    folder = ROOT / options.output / arm
    days = make_days(options)
    ids = ids_of(options, arm)
    results: list[dict[str, Any]] = []
    for day in range(options.days):
        data, run = folder / f"data{day:02d}", folder / f"run{day:02d}"
        rows = [row for some in days[max(0, day - HISTORY_DAYS + 1) : day + 1] for row in some]
        log = write_log(folder.parent / f"logs/{day:02d}.csv", rows)
        before = {"vocabulary": str(folder / f"data{day - 1:02d}")} if day else {}
        manifest = prepare(prepare_options(log, data, hold_out="none", **before, **ids)).manifest
        pretrain.main(
            Pretrain(
                data=str(data),
                output=str(run),
                model=Model(dim=options.dim, layers=1, heads=2, max_len=30),
                loss=Loss(candidates="all"),
                batch=TrainingBatch(tokens=512),
                train=Train(epochs=options.epochs),
                saving=Saving(every_steps=5, keep=1),
                seed=options.seed,
                initial=str(folder / f"run{day - 1:02d}") if day else None,
                targets="new" if day else "all",
            )
        )
        figures = {} if day not in options.measured_days else measure(options, arm, day, days)
        kept = manifest.preparation.get("ids", {"tables": [], "left_out": 0})
        results.append(
            {
                "day": day,
                "items": manifest.items,
                "users": manifest.users,
                "left_out": kept["left_out"] / max(1, kept["left_out"] + manifest.interactions),
                "evicted": {each["entity"]: each["evicted"] for each in kept["tables"]},
                "shared": sum(each["shared"] for each in kept["tables"]),
                "bytes": (manifest.items + manifest.users) * (options.dim + 1) * 4,
                **figures,
            }
        )
        print(f"{arm}: day {day + 1} of {options.days}", json.dumps(results[-1]), flush=True)
    temporary = folder / "result.tmp"
    temporary.write_text(json.dumps({"arm": arm, "days": results}, indent=1))
    temporary.replace(folder / "result.json")


def ids_of(options: Options, arm: str) -> dict[str, Any]:
    """The options of `prepare` that make the arm."""
    if arm == "vocabulary":
        return {}
    if arm == "hash":
        return {"ids": "hash", "item_rows": options.item_rows}
    return {"ids": "managed", "item_rows": options.item_rows, "user_rows": options.user_rows}


def prepare_options(log: str, output: Path, **more: Any) -> Any:
    """Options of `prepare` that all datasets of the pipeline share."""
    from recgpt_torchrec.config import Prepare

    return Prepare(input=[log], output=str(output), min_count=1, rows_per_group=64, **more)


def measure(options: Options, arm: str, day: int, days: list[list[tuple[str, str, int]]]) -> dict[str, Any]:
    """HR@10 and NDCG@10 of the first interaction of each user on the next day, over all users with one.

    Targets are the same for all arms: of users and items that the log had before. Lists may hold seen items again.
    """
    from recgpt_torchrec import evaluate
    from recgpt_torchrec.config import Evaluate
    from recgpt_torchrec.preparation.pipeline import prepare

    folder = ROOT / options.output / arm
    history = [row for some in days[max(0, day - HISTORY_DAYS + 1) : day + 1] for row in some]
    seen_users, seen_items = ({row[column] for row in history} for column in (0, 1))
    first: dict[str, tuple[str, str, int]] = {}
    for row in sorted(days[day + 1], key=lambda row: row[2]):
        if row[0] in seen_users and row[1] in seen_items:
            first.setdefault(row[0], row)
    named = read_keys(folder / f"data{day:02d}", "items")
    log = write_log(folder / f"next{day:02d}.csv", history + [row for row in first.values() if row[1] in named])
    data = folder / f"next{day:02d}"
    new_keys = {} if arm == "hash" else {"new_keys": "leave_out"}
    vocabulary = str(folder / f"data{day:02d}")
    split = {"hold_out": "time", "test_from": str((day + 1) * DAY)}
    ids = ids_of(options, arm)
    manifest = prepare(prepare_options(log, data, vocabulary=vocabulary, **split, **new_keys, **ids)).manifest
    output = folder / f"next{day:02d}.json"
    run = str(folder / f"run{day:02d}")
    evaluate.main(Evaluate(data=str(data), checkpoint=run, output=str(output), split="test", baselines=False))
    result = json.loads(output.read_text())
    (path,) = [name for name in result["results"] if name == "pretrain"]
    share = manifest.preparation["split"]["test_users"] / len(first)
    figures = {name: result["results"][path]["unmasked"][name] * share for name in ("HR@10", "NDCG@10")}
    return {**figures, "targets": len(first), "named": share}


def read_keys(data: Path, name: str) -> set[str]:
    """The keys that name the rows of a dataset."""
    import pyarrow.parquet as pq

    return {*pq.read_table(data / name, columns=["key"])["key"].to_pylist()}


# ------------------------------------------------------------------------------------------------------- report


def write_report(options: Options, steps: RecordedSteps) -> None:
    """Write report.json and report.md."""
    output = ROOT / options.output
    results = {arm: json.loads((output / arm / "result.json").read_text())["days"] for arm in ARMS}
    report = {
        "made": time.strftime("%Y-%m-%d %H:%M:%S"),
        "options": asdict(options),
        "results": results,
        "restart": compare_restart(options),
        "steps": steps.records(),
    }
    (output / "report.json").write_text(json.dumps(report, indent=1))
    (output / "report.md").write_text(markdown(options, report))


def compare_restart(options: Options) -> dict[str, Any]:
    """Whether the arm that was killed has the slots and the tensors of the one that was not."""
    import pyarrow.parquet as pq
    import torch
    import torch.distributed.checkpoint as dcp

    from recgpt_torchrec.checkpoints.folder import read_tensor_metadata

    folders = [ROOT / options.output / arm for arm in ("managed", "restarted")]
    same_slots = all(
        pq.read_table(folders[0] / f"data{day:02d}" / name).equals(pq.read_table(folders[1] / f"data{day:02d}" / name))
        for day in range(options.days)
        for name in ("items", "users", "sequences")
    )
    tensors = []
    for folder in folders:
        newest = checkpoints_of(folder / f"run{options.days - 1:02d}")[-1]
        stored = {
            name: torch.empty(value.size, dtype=value.properties.dtype)
            for name, value in read_tensor_metadata(str(newest)).items()
        }
        dcp.load(stored, storage_reader=dcp.FileSystemReader(str(newest)), no_dist=True)
        tensors.append(stored)
    largest = max((tensors[0][name].float() - tensors[1][name].float()).abs().max().item() for name in tensors[0])
    killed = json.loads((folders[1] / "killed.json").read_text())
    return {"killed": killed, "same_slots": same_slots, "largest_difference": largest}


def markdown(options: Options, report: dict[str, Any]) -> str:
    """The report in Markdown."""
    results, days = report["results"], options.measured_days
    last = {arm: results[arm][-1] for arm in ARMS}
    lines = [
        "# Ids that never stop growing",
        "",
        f"{options.days} days, {options.users} users at a time, {options.new_items} new items a day, each looked at "
        f"for {ALIVE} days; {options.item_rows} rows for items, {options.user_rows} for users. The next day's first "
        "interaction, ranked over all rows; a target that an arm cannot name is a miss.",
    ]
    for metric in ("NDCG@10", "HR@10"):
        lines += [
            "",
            f"## {metric} on the next day",
            "",
            "| arm | " + " | ".join(f"day {day + 1}" for day in days) + " |",
        ]
        lines.append("|---|" + "---|" * len(days))
        for arm in ARMS:
            lines.append(f"| {arm} | " + " | ".join(f"{results[arm][day][metric]:.4f}" for day in days) + " |")
    lines += [
        "",
        "## Tables",
        "",
        "| arm | items | users | KiB of tables and moments | targets with a name |",
        "|---|---|---|---|---|",
    ]
    for arm in ARMS:
        each = last[arm]
        lines.append(
            f"| {arm} | {each['items']:,} | {each['users']:,} | {each['bytes'] / 1024:.0f} | {each['named']:.1%} |"
        )
    managed = results["managed"]
    for entity in ("item", "user"):
        lines += ["", f"Evicted {entity}s per day: " + ", ".join(str(each["evicted"][entity]) for each in managed)]
    left_out = ", ".join(f"{each['left_out']:.1%}" for each in managed)
    restart = report["restart"]
    lines += [
        "",
        f"Interactions without a row, per day (managed): {left_out}",
        "",
        f"Restarted: killed on day {restart['killed']['day'] + 1} at {', '.join(restart['killed']['checkpoints'])}; "
        f"slots {'equal' if restart['same_slots'] else 'DIFFER'} on all days, largest difference of a number in the "
        f"last checkpoint {restart['largest_difference']:.1e}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
