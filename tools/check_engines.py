"""Prepares logs with both engines, compares the datasets row by row, and reads what Spark did.

    python -m tools.check_engines --output runs/engines
    python -m tools.check_engines --output runs/engines --input Beauty.txt
    python -m tools.check_engines --output runs/rows --rows 20000000

The seven logs: histories (a line per user), rows with repeats and duplicates in several files, rows that were shown,
disliked or skipped beside clicks and some that cannot be read, the same with event types, a later day of a log whose
vocabulary is extended, one that is divided by time, and a later day with tables of attributes. `--input` names others,
which are prepared with the defaults. Exits with 1 if two datasets differ in anything but the engine, if a plan of Spark
puts rows in one place whose number grows with the log, or if a statement brings too many rows to the driver.

With `--rows` it writes one log of that size in Parquet files and shows the rows per second of both engines instead,
each in a process of its own.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.data.dataset import Manifest
from recgpt_torchrec.preparation.pipeline import prepare
from tools import spark_plans
from tools.synthetic_log import Habits, World, generate_tables

FOLDERS = ("sequences", "items", "users", "rejected")
OWN = ("engine", "output", "scratch", "memory_limit")
"""Options in which the manifests may differ."""
ATTRIBUTES = {"item_attributes": ["genres", "price", "title:text"], "user_attributes": ["age:number", "country"]}
FILES = 8
"""Number of files of the large log."""
LIST_SECONDS = 600
"""Rows of a user in so many seconds are shown in one list, in the order of their places."""


def write_logs(folder: Path, users: int = 400, items: int = 120) -> dict[str, dict[str, Any]]:
    """Write the seven logs, and return prepare's options for each.

    Args:
        folder: for the files.
        users, items: sizes of the synthetic log that all are made of.
    """
    folder.mkdir(parents=True, exist_ok=True)
    world = World.make(items, max(items // 20, 1), 0.8, np.random.default_rng(1))
    tables = pa.concat_tables(generate_tables(world, Habits(mean_events=10), users, items, 1))
    rows = list(zip(*(tables.column(name).to_pylist() for name in tables.column_names), strict=True))
    header = ["user_id", "item_id", "timestamp"]
    small: dict[str, Any] = {"rows_per_group": 32, "groups_per_part": 2}  # several parts, as in a large dataset

    histories: dict[str, list[str]] = {}
    for user, item, _ in rows:
        histories.setdefault(user, []).append(item)
    lines = [" ".join([user, *sequence]) for user, sequence in histories.items()]
    (folder / "histories.txt").write_text("\n".join(lines) + "\n")

    random = np.random.default_rng(2)
    repeated = [*rows, *(rows[place] for place in random.integers(len(rows), size=len(rows) // 10))]
    repeated = [repeated[place] for place in random.permutation(len(repeated))]
    for number in range(3):
        _write_csv(folder / "times" / f"{number}.csv", header, repeated[number::3])

    words = random.choice(["buy", "cart", "view", "hide", "skip"], p=[0.5, 0.2, 0.15, 0.1, 0.05], size=len(rows))
    prices, places = random.random(len(rows)).round(2), random.choice(["", *"1234", "40000"], size=len(rows))
    requests = [(user, item, time // LIST_SECONDS * LIST_SECONDS) for user, item, time in rows]
    shown: list[Any] = [
        (*row, *more) for row, *more in zip(requests, words, prices.tolist(), places.tolist(), strict=True)
    ]
    shown += [("u", "", 5, "buy", 1, 1), ("u", "i", "soon", "buy", 1, 1)] * 40
    _write_csv(folder / "clicks.csv", [*header, "event", "price", "place"], shown)

    day = sorted(rows, key=lambda row: row[2])
    _write_csv(folder / "days" / "1.csv", header, day[: len(day) * 2 // 3])
    _write_csv(folder / "days" / "2.csv", header, day[len(day) * 2 // 3 :])
    earlier = Prepare(input=[str(folder / "days" / "1.csv")], output=str(folder / "earlier"), min_count=2, **small)
    prepare(earlier)
    tables = {"items": [str(folder / "items.parquet")], "users": [str(folder / "users")], **ATTRIBUTES}
    _write_tables(folder, rows, random)
    before = Prepare(input=[str(folder / "days" / "1.csv")], output=str(folder / "described"), **tables, **small)
    prepare(before)
    described = {**tables, "vocabulary": before.output, "catalogue": "items", "attribute_buckets": 5}
    clicks = {"click_column": "event", "click_values": ["buy", "cart"], "rating_column": "price"}
    clicks |= {"dislike_values": ["hide"], "skip_values": ["skip"], "position_column": "place"}
    types = {"event_column": "event", "hold_out": "targets", "target_events": ["buy"]}
    return {
        "histories": {"input": [str(folder / "histories.txt")], **small},
        "times": {"input": [str(folder / "times")], "duplicates": "drop", "repeats": "collapse", **small},
        "clicks": {"input": [str(folder / "clicks.csv")], "min_count": 3, **clicks, **small},
        "events": {"input": [str(folder / "clicks.csv")], "min_count": 3, **clicks, **types, **small},
        "vocabulary": {"input": [str(folder / "days")], "vocabulary": earlier.output, "min_count": 4, **small},
        "by time": {"input": [str(folder / "days")], "hold_out": "time", "test_from": "85%", **small},
        "attributes": {"input": [str(folder / "days")], "min_count": 2, **described, **small},
    }


def _write_tables(folder: Path, rows: list[Any], random: np.random.Generator) -> None:
    """Write a table of items in Parquet, and one of users in two files of different formats."""
    items, users = (sorted({row[place] for row in rows}) for place in (1, 0))
    table = {
        "item_id": [*items, "unseen"],
        "genres": [
            [f"g{value}" for value in random.integers(9, size=size)] for size in random.integers(4, size=len(items) + 1)
        ],
        "price": [*random.lognormal(size=len(items)).round(2).tolist(), float("inf")],
        "title": [f"The {item}" if number % 7 else None for number, item in enumerate([*items, "unseen"])],
    }
    pq.write_table(pa.table(table), folder / "items.parquet")
    ages = [str(age) if age < 60 else "NULL" for age in random.integers(18, 70, size=len(users)).tolist()]
    _write_csv(
        folder / "users" / "1.csv",
        ["user_id", "age", "country"],
        [(u, a, a[0]) for u, a in zip(users, ages, strict=True)][::2],
    )
    lines = [{"user_id": user, "age": age, "country": "x"} for user, age in zip(users[1::2], ages[1::2], strict=True)]
    (folder / "users" / "2.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _write_csv(path: Path, header: list[str], rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def compare_datasets(one: Path, other: Path) -> list[str]:
    """What differs between two datasets: their rows, in order, and their manifests but for the options in `OWN`."""
    differences = []
    for name in FOLDERS:
        tables = [_read_parts(root, name) for root in (one, other)]
        if not tables[0].equals(tables[1]):
            differences.append(f"{name}: {_first_difference(*tables)}")
    kinds = [sorted(path.name for path in root.glob("attributes/*")) for root in (one, other)]
    if kinds[0] != kinds[1]:
        differences.append(f"attributes: {kinds[0]} and {kinds[1]}")
    manifests = [_comparable(root) for root in (one, other)]
    for name in manifests[0].keys() | manifests[1].keys():
        values = [manifest.get(name) for manifest in manifests]
        if values[0] != values[1]:
            differences.append(f"manifest, {name}: {str(values[0])[:200]} and {str(values[1])[:200]}")
    return differences


def _read_parts(root: Path, name: str) -> pa.Table:
    """The rows of a folder's parts in the order of the manifest."""
    manifest = Manifest.from_json((root / "manifest.json").read_text())
    listed = {
        "sequences": [part.path for part in manifest.sequences],
        "items": [part.path for part in manifest.item_parts],
        "users": [part.path for part in manifest.user_parts],
        "rejected": [part["path"] for part in manifest.preparation["rejected_parts"]],
    }[name]
    there = sorted(str(path.relative_to(root)) for path in (root / name).rglob("*") if path.is_file())
    assert there == sorted(listed), f"{root / name} holds {there}, its manifest lists {listed}"
    return pa.concat_tables([pq.read_table(root / path) for path in listed]) if listed else pa.table({})


def _first_difference(one: pa.Table, other: pa.Table) -> str:
    if one.schema != other.schema or one.num_rows != other.num_rows:
        return f"{one.num_rows} rows of {one.schema.names} and {other.num_rows} of {other.schema.names}"
    pairs = zip(one.to_pylist(), other.to_pylist(), strict=True)
    return next(f"{str(a)[:200]} and {str(b)[:200]}" for a, b in pairs if a != b)


def _comparable(root: Path) -> dict[str, Any]:
    """A manifest's entries without those that may differ; the parts are listed with their checksums."""
    entries: dict[str, Any] = json.loads((root / "manifest.json").read_text())
    entries["settings"] = {name: value for name, value in entries["settings"].items() if name not in OWN}
    preparation = {f"preparation.{name}": value for name, value in entries.pop("preparation").items()}
    entries.pop("sealed", None)
    return {name: value for name, value in {**entries, **preparation}.items() if name != "checksum"}


def check_log(folder: Path, options: dict[str, Any]) -> tuple[list[str], spark_plans.Watch, dict[str, float]]:
    """Prepare a log with both engines into `folder`.

    Returns:
        What is wrong, what Spark did, and the seconds of each engine.
    """
    seconds: dict[str, float] = {}
    engines: tuple[Literal["duckdb", "pyspark"], ...] = ("duckdb", "pyspark")
    for engine in engines:
        shutil.rmtree(folder / engine, ignore_errors=True)
        config = Prepare(**options, output=str(folder / engine), engine=engine)
        if engine == "duckdb":
            seconds[engine] = prepare(config).seconds
            continue
        with spark_plans.watch(folder.parent / "events") as seen:
            seconds[engine] = prepare(config).seconds
    faults = compare_datasets(folder / "duckdb", folder / "pyspark")
    faults += [fault for plan in seen.plans for fault in spark_plans.find_faults(plan)]
    faults += [f"{call.rows:,} rows through the driver: {call}" for call in seen.too_large()]
    if not seen.plans or not seen.collected:
        faults.append("nothing was seen of Spark: its event log is empty")
    return faults, seen, seconds


def check_logs(output: Path, inputs: list[str]) -> bool:
    """Check the seven logs and those of `inputs`, and print a line about each; returns whether all is well."""
    from pyspark.sql import SparkSession

    events = output / "events"
    shutil.rmtree(output, ignore_errors=True)
    events.mkdir(parents=True)
    logs = write_logs(output / "logs") | {Path(path).stem: {"input": [path]} for path in inputs}
    options = {**spark_plans.settings(events), "spark.sql.shuffle.partitions": "4"}
    os.environ["PYSPARK_SUBMIT_ARGS"] = spark_plans.as_arguments(options)
    from recgpt_torchrec.preparation.engines.spark_session import open_session

    is_good = True
    most: dict[str, spark_plans.Collected] = {}
    session, _ = open_session(str(output))  # one for all logs: starting takes seconds
    assert SparkSession.getActiveSession() is not None
    try:
        for name, options in logs.items():
            faults, seen, seconds = check_log(output / name.replace(" ", "_"), options)
            is_good &= not faults
            verdict = "DIFFERENT" if faults else "equal"
            took = ", ".join(f"{engine} {each:.1f} s" for engine, each in seconds.items())
            print(f"{name:12} {verdict:9} {len(seen.plans)} plans, {len(seen.collected)} results; {took}", flush=True)
            for fault in faults:
                print(f"    {fault}")
            for call in seen.collected:
                most[call.caller] = max(call, most.get(call.caller, call), key=lambda each: each.rows)
    finally:
        session.stop()
    print("rows that came to the driver or from it, the most of each place:")
    for caller, call in sorted(most.items(), key=lambda entry: -entry[1].rows):
        print(f"    {call.rows:6,}  {caller}  {call.statement}")
    return is_good


def write_large_log(folder: Path, rows: int, mean_events: int = 20) -> None:
    """Write a log of at least `rows` rows in Parquet files, unless it is there."""
    if (folder / "done").exists():
        return
    users, items = rows // mean_events + 1, max(min(rows // 100, 500_000), 100)
    world = World.make(items, max(items // 50, 1), 0.8, np.random.default_rng(0))
    folder.mkdir(parents=True, exist_ok=True)
    writers: list[pq.ParquetWriter] = []
    for number, table in enumerate(generate_tables(world, Habits(mean_events=mean_events), users, items, 0)):
        if number < FILES:
            writers.append(pq.ParquetWriter(folder / f"{number}.parquet", table.schema))
        writers[number % FILES].write_table(table)
    for writer in writers:
        writer.close()
    (folder / "done").touch()


def time_engines(output: Path, rows: int) -> bool:
    """Prepare a large log with each engine in a process of its own, and print rows per second."""
    log = output / f"log-{rows}"
    began = time.monotonic()
    write_large_log(log, rows)
    files = sorted(map(str, log.glob("*.parquet")))
    total = sum(pq.ParquetFile(file).metadata.num_rows for file in files)
    print(f"{total:,} rows in {len(files)} files, written in {time.monotonic() - began:.0f} s", flush=True)
    for engine in ("duckdb", "pyspark"):
        shutil.rmtree(output / engine, ignore_errors=True)
        words = ["--input", *files, "--output", str(output / engine), "--engine", engine]
        began = time.monotonic()
        run = subprocess.run([sys.executable, "-m", "recgpt_torchrec.prepare", *words], capture_output=True, text=True)
        took = time.monotonic() - began
        if run.returncode:
            print(run.stderr)
            return False
        print(f"{engine:8} {total / took:12,.0f} rows/s, {took:.1f} s with its start", flush=True)
    differences = compare_datasets(output / "duckdb", output / "pyspark")
    print("\n".join(differences) or "the datasets are equal, file by file")
    return not differences


def main() -> None:
    """Parse the command line and run the checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for logs and datasets; it is emptied")
    parser.add_argument("--input", nargs="*", default=[], help="other logs to check")
    parser.add_argument("--rows", type=int, default=0, help="compare the speed on a log of this size instead")
    options = parser.parse_args()
    is_good = time_engines(options.output, options.rows) if options.rows else check_logs(options.output, options.input)
    raise SystemExit(0 if is_good else 1)


if __name__ == "__main__":
    main()
