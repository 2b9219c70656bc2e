"""Appended days: is every target trained exactly once, however often the job is stopped, and what does a day cost?

    python pipelines/appended_days.py --output runs/appended_days

Cuts a synthetic log (`tools/synthetic_log.py`) into days, and appends and trains them one after the other, twice: left
alone, and stopped at random moments with SIGTERM or SIGKILL, by turns in `prepare --append` and in `pretrain`, until
each command has ended. Every target of every step that is in the model is written down (`tools/observed_pretrain.py`)
and counted against a plain loop over the log; and both runs must end with the same tables, moments and decoder.

Then a larger log is appended day by day, and prepared anew each day (`prepare --vocabulary YESTERDAY`): seconds as the
stage reports them, and bytes that it wrote. Writes OUTPUT/report.json and report.md; exit status 1 if a target was not
trained just once per epoch, or the runs differ.
"""

import argparse
import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.kill_test import read_tensors  # noqa: E402
from tools.observed_pretrain import read_targets  # noqa: E402
from tools.synthetic_log import Habits, World, generate_tables  # noqa: E402

EPOCHS = 2
TRAINING = {
    "--model.dim": 16,
    "--model.max_len": 20,
    "--model.layers": 1,
    "--batch.tokens": 256,
    "--train.epochs": EPOCHS,
    "--saving.every_steps": 3,
}
LIMIT = 600.0
"""Seconds after which a command that is not stopped counts as failed."""
Row = tuple[str, str, int]


def make_log(users: int, items: int, seed: int) -> list[Row]:
    """The rows of a synthetic log in the order of time."""
    world = World.make(items, max(items // 50, 1), 0.8, np.random.default_rng([seed, 0]))
    tables = generate_tables(world, Habits(), users, items, seed)
    rows = [row for table in tables for row in zip(*(column.to_pylist() for column in table.columns), strict=True)]
    return sorted(rows, key=lambda row: row[2])


def cut_log(rows: list[Row], days: int, folder: Path) -> list[Path]:
    """Write files of about equal numbers of rows, cut where the time changes; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    ends = [0]
    for day in range(1, days + 1):
        end = max(len(rows) * day // days, ends[-1] + 1)
        while end < len(rows) and rows[end][2] == rows[end - 1][2]:
            end += 1
        ends.append(end)
    paths = []
    for day, (first, last) in enumerate(zip(ends, ends[1:], strict=False), 1):
        paths.append(folder / f"day{day:02d}.csv")
        with paths[-1].open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["user_id", "item_id", "timestamp"])
            writer.writerows(rows[first:last])
    return paths


def run_command(module: str, options: dict[str, Any], log: Path, stops: "Stops | None" = None) -> str:
    """Run `python -m module` to its end, again and again where it is stopped; returns the output of the last time."""
    words = [str(word) for option in options.items() for word in option if word is not None]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    while True:
        began = log.stat().st_size if log.exists() else 0
        with log.open("a") as output:
            command = [sys.executable, "-m", *module.split(), *words]
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
            stopped = stops.stop(process, module) if stops is not None else False
            status = process.wait(LIMIT)
        if status == 0:
            return log.read_bytes()[began:].decode()
        if not stopped:
            raise SystemExit(f"{' '.join(command)} ended with status {status}; see {log}")


class Stops:
    """Stops processes at random moments, for a limited number of times per command."""

    def __init__(self, seed: int, per_command: int) -> None:
        self.random, self.per_command = random.Random(seed), per_command
        self.left, self.seconds = per_command, 8.0
        self.counts: Counter[str] = Counter()

    def begin(self, seconds: float) -> None:
        """Begin a command that takes about `seconds` when it is left alone."""
        self.left, self.seconds = self.random.randint(0, self.per_command), seconds

    def stop(self, process: "subprocess.Popen[bytes]", module: str) -> bool:
        """Wait for a random moment and stop the process, if it is still running and has stops left."""
        if self.left == 0:
            return False
        moment = time.monotonic() + self.random.uniform(0.2, 1.1) * self.seconds
        while time.monotonic() < moment:
            if process.poll() is not None:
                return False
            time.sleep(0.02)
        number = self.random.choice([signal.SIGTERM, signal.SIGKILL])
        process.send_signal(number)
        self.left -= 1
        self.counts[f"{module.split()[0].rpartition('.')[2]} {number.name}"] += 1
        return True


def train_days(files: list[Path], folder: Path, stops: Stops | None, usual: dict[str, list[float]]) -> None:
    """Append and train the days of a log, one after the other."""
    folder.mkdir(parents=True)
    for number, file in enumerate(files):
        appending = {"--append": "true", "--input": file, "--output": folder / "data", "--hold_out": "none"}
        training = {"--data": folder / "data", "--output": folder / "run", **TRAINING}
        observed = f"tools.observed_pretrain {folder / 'trained.jsonl'}"
        for name, module, options in (
            ("prepare", "recgpt_torchrec.prepare", appending),
            ("pretrain", observed, training),
        ):
            began = time.monotonic()
            if stops is not None:
                stops.begin(usual[name][number])
            run_command(module, options, folder / f"{name}.log", stops)
            if stops is None:
                usual.setdefault(name, []).append(time.monotonic() - began)


def expected_targets(rows: list[Row]) -> Counter[tuple[str, str, str]]:
    """(user, item before, item) of every interaction but the first of its user, times the epochs: a plain loop."""
    newest: dict[str, str] = {}
    counted: Counter[tuple[str, str, str]] = Counter()
    for user, item, _ in rows:
        if user in newest:
            counted[user, newest[user], item] += EPOCHS
        newest[user] = item
    return counted


def trained_targets(folder: Path) -> Counter[tuple[str, str, str]]:
    """The same of what is in the model of a run."""
    import pyarrow.parquet as pq

    from recgpt_torchrec.data.dataset import Dataset

    manifest = Dataset.open(str(folder / "data")).manifest

    def keys(parts: Any) -> list[str]:
        return [key for part in parts for key in pq.read_table(folder / "data" / part.path)["key"].to_pylist()]

    users, items = keys(manifest.user_parts), keys(manifest.item_parts)
    found = read_targets(folder / "trained.jsonl").values()
    return Counter((users[each.user], items[each.after], items[each.item]) for day in found for each in day)


def differing_tensors(one: Path, other: Path) -> list[str]:
    """Names of the tensors in which the newest days of two runs differ, bit for bit."""
    import torch

    tensors, others = (read_tensors(sorted((folder / "run/days").iterdir())[-1]) for folder in (one, other))
    names = tensors.keys() ^ others.keys()
    return [*names, *(name for name in tensors.keys() & others.keys() if not torch.equal(tensors[name], others[name]))]


def measure_costs(files: list[Path], folder: Path) -> Iterator[dict[str, Any]]:
    """Seconds and bytes of appending each day, and of preparing the log so far anew; a row per day."""
    folder.mkdir(parents=True)
    common = {"--hold_out": "none"}
    for day, file in enumerate(files, 1):
        appended = run_command(
            "recgpt_torchrec.prepare",
            {"--append": "true", "--input": file, "--output": folder / "appended", **common},
            folder / "append.log",
        )
        words: dict[str, Any] = {"--min_count": 1, "--output": folder / f"anew{day}", **common}
        if day > 1:
            words["--vocabulary"] = folder / f"anew{day - 1}"
        inputs = " ".join(str(each) for each in files[:day])
        anew = run_command(f"recgpt_torchrec.prepare --input {inputs}", words, folder / "anew.log")
        yield {
            "day": day,
            "append_seconds": stage_seconds(appended),
            "anew_seconds": stage_seconds(anew),
            "append_bytes": size_of(folder / f"appended/days/{day:04d}"),
            "anew_bytes": size_of(folder / f"anew{day}"),
        }


def stage_seconds(output: str) -> float:
    """The seconds that prepare says it took."""
    match = re.search(r"^wrote .* in ([0-9.]+) s$", output, re.MULTILINE)
    assert match is not None, output
    return float(match.group(1))


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    lines = ["# Appended days", ""]
    if "trained" in report:
        trained = report["trained"]
        stops = ", ".join(f"{name} {count}" for name, count in sorted(trained["stops"].items()))
        lines += [
            f"{trained['days']} days, {trained['rows']:,} rows, {EPOCHS} epochs; stops: {stops}.",
            "",
            f"Targets that should be trained: {trained['expected']:,}; trained, left alone: {trained['alone']:,}, "
            f"stopped: {trained['stopped']:,}; not just once per epoch: {trained['wrong']:,}. "
            f"Tensors that differ: {len(trained['differing'])}.",
            "",
        ]
    if "costs" in report:
        lines += ["| day | append, s | anew, s | append, MB | anew, MB |", "|---|---|---|---|---|"]
        for row in report["costs"]:
            sizes = " | ".join(f"{row[f'{name}_bytes'] / 1e6:.1f}" for name in ("append", "anew"))
            lines.append(f"| {row['day']} | {row['append_seconds']:.1f} | {row['anew_seconds']:.1f} | {sizes} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run both parts, write the report, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder that does not exist")
    parser.add_argument("--days", type=int, default=10, help="number of days (default: 10)")
    parser.add_argument(
        "--users", type=int, default=200, help="users of the log that is trained; 0: none (default: 200)"
    )
    parser.add_argument("--items", type=int, default=100, help="items of that log (default: 100)")
    parser.add_argument("--stops", type=int, default=3, help="maximum number of stops per command (default: 3)")
    parser.add_argument("--cost_users", type=int, default=50_000, help="users of the log for costs; 0: none")
    parser.add_argument("--cost_items", type=int, default=10_000, help="items of that log (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of logs and stops (default: 0)")
    options = parser.parse_args(arguments)
    output = options.output.resolve()
    if output.exists():
        parser.error(f"--output {output} exists; name a new folder")
    report: dict[str, Any] = {}
    failed = False
    if options.users:
        rows = make_log(options.users, options.items, options.seed)
        files = cut_log(rows, options.days, output / "log")
        usual: dict[str, list[float]] = {}
        stops = Stops(options.seed, options.stops)
        train_days(files, output / "alone", None, usual)
        train_days(files, output / "stopped", stops, usual)
        expected = expected_targets(rows)
        found = {name: trained_targets(output / name) for name in ("alone", "stopped")}
        wrong = sum(1 for counts in found.values() for key in {*counts, *expected} if counts[key] != expected[key])
        differing = differing_tensors(output / "alone", output / "stopped")
        report["trained"] = {
            "days": len(files),
            "rows": len(rows),
            "stops": dict(stops.counts),
            "expected": expected.total(),
            **{name: counts.total() for name, counts in found.items()},
            "wrong": wrong,
            "differing": differing,
        }
        failed = bool(wrong or differing)
    if options.cost_users:
        files = cut_log(
            make_log(options.cost_users, options.cost_items, options.seed + 1), options.days, output / "big"
        )
        report["costs"] = []
        for row in measure_costs(files, output / "costs"):
            report["costs"].append(row)
            print(json.dumps(row), flush=True)
    (output / "report.json").write_text(json.dumps(report, indent=1))
    (output / "report.md").write_text(markdown(report))
    print(markdown(report))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
