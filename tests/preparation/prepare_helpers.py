"""Small logs, and reading a dataset back as plain Python, for the tests of prepare."""

import csv
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.preparation.pipeline import Result, prepare

Row = tuple[str, str, int]


def make(input: Path | str | list[str], output: Path | str, **options: Any) -> Result:
    """Run prepare in this process; keeps everything unless told otherwise."""
    inputs = input if isinstance(input, list) else [str(input)]
    return prepare(Prepare(**{"min_count": 1, "input": inputs, "output": str(output), **options}))


def write_csv(path: Path, rows: list[Row], delimiter: str = ",") -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
        writer.writerow(["user_id", "item_id", "timestamp"])
        writer.writerows(rows)
    return path


def read_keys(folder: Path, name: str, column: str) -> list[str]:
    """Raw keys of `items` or `users`, checked to be dense from 0."""
    table = pq.read_table(folder / name)
    assert table.column(column).to_pylist() == list(range(table.num_rows))
    return table.column("key").to_pylist()


def read_sequences(folder: Path, value: str = "item_ids") -> dict[str, list[Any]]:
    """User key -> item keys (or the values of another list column), in the order of the dataset."""
    users, items = read_keys(folder, "users", "user_id"), read_keys(folder, "items", "item_id")
    table = pq.read_table(folder / "sequences")
    assert table.column("user_id").to_pylist() == list(range(table.num_rows))
    lists = table.column(value).to_pylist()
    if value == "item_ids":
        lists = [[items[item] for item in row] for row in lists]
    return dict(zip(users, lists, strict=True))


def random_log(events: int, users: int, items: int, seed: int = 0) -> list[Row]:
    """Rows whose times are all different, in random order."""
    source = random.Random(seed)
    times = source.sample(range(10 * events), events)
    return [(f"u{source.randrange(users)}", f"i{source.randrange(items)}", time) for time in times]


def in_time_order(rows: list[Row]) -> dict[str, list[str]]:
    """What the sequences of a log should be."""
    result: dict[str, list[str]] = {}
    for user, item, _ in sorted(rows, key=lambda row: row[2]):
        result.setdefault(user, []).append(item)
    return result
