"""Prepares one log in the shapes of five public sets, one command each, and checks the datasets with a plain program.

    python tools/check_formats.py --output runs/formats
    python tools/check_formats.py --output runs/formats --log ml-100k.inter

The rows (of a synthetic log, or of a RecBole file with a rating) are written as

    taobao      CSV without a header, with words for events: user,item,category,behaviour,time
    movielens   user::item::rating::time, with titles in latin-1 as a fifth value
    amazon      lines of JSON, gzipped: reviewerID, asin, overall, unixReviewTime
    partitions  a folder of Parquet files, one folder dt=YYYY-MM-DD per day
    lists       a row per user: the items and the times as lists in a column of Parquet

Each is then read twice: by the stage `prepare`, and from the written files by the plain Python here, which shares no
code with it: open a file, split, filter, sort, drop rare users and items until none is left. Exits with 1 if the two
differ in a user, an item, a time or a shown row.
"""

import argparse
import csv
import gzip
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
EVENTS = {5: "buy", 4: "cart", 3: "fav", 2: "pv", 1: "pv"}
"""Words for ratings; the last two are only shown."""
MIN_COUNT = 5


@dataclass(frozen=True, order=True)
class Row:
    """One row of a log as the plain program reads it."""

    user: str
    item: str
    time: int
    shown: bool = False


def write_taobao(folder: Path, rows: list[tuple[str, str, int, int]]) -> list[str]:
    """Write the shape, and return prepare's options for it."""
    with (folder / "UserBehavior.csv").open("w", newline="") as file:
        csv.writer(file).writerows((user, item, 7, EVENTS[rating], when) for user, item, rating, when in rows)
    places = ["--header", "false", "--user_column", "0", "--item_column", "1", "--time_column", "4"]
    return [*places, "--click_column", "3", "--click_values", "buy,cart,fav"]


def read_taobao(folder: Path) -> Iterator[Row]:
    """Read it plainly."""
    with (folder / "UserBehavior.csv").open(newline="") as file:
        for user, item, _, word, when in csv.reader(file):
            yield Row(user, item, int(when), word == "pv")


def write_movielens(folder: Path, rows: list[tuple[str, str, int, int]]) -> list[str]:
    """Write the shape, and return prepare's options for it."""
    lines = (f"{user}::{item}::{rating}::{when}::Café {item}, Misérables\n" for user, item, rating, when in rows)
    (folder / "ratings.dat").write_bytes("".join(lines).encode("latin-1"))
    places = ["--header", "false", "--user_column", "0", "--item_column", "1", "--time_column", "3"]
    return [*places, "--separator", "::", "--encoding", "latin-1"]


def read_movielens(folder: Path) -> Iterator[Row]:
    """Read it plainly."""
    for line in (folder / "ratings.dat").read_text("latin-1").splitlines():
        user, item, _, when, _ = line.split("::")
        yield Row(user, item, int(when))


def write_amazon(folder: Path, rows: list[tuple[str, str, int, int]]) -> list[str]:
    """Write the shape, and return prepare's options for it."""
    with gzip.open(folder / "reviews.json.gz", "wt") as file:
        for user, item, rating, when in rows:
            review = {"reviewerID": f"A{user}", "asin": f"B{item}", "overall": float(rating), "unixReviewTime": when}
            file.write(json.dumps({**review, "reviewText": 'says "good",\nor not'}) + "\n")
    return ["--user_column", "reviewerID", "--item_column", "asin", "--time_column", "unixReviewTime"]


def read_amazon(folder: Path) -> Iterator[Row]:
    """Read it plainly."""
    with gzip.open(folder / "reviews.json.gz", "rt") as file:
        for line in file:
            review = json.loads(line)
            yield Row(review["reviewerID"], review["asin"], review["unixReviewTime"])


def write_partitions(folder: Path, rows: list[tuple[str, str, int, int]]) -> list[str]:
    """Write the shape, and return prepare's options for it."""
    by_day: dict[str, list[tuple[str, str, int, int]]] = {}
    for row in rows:
        by_day.setdefault(datetime.fromtimestamp(row[3], UTC).strftime("%Y-%m-%d"), []).append(row)
    for day, of_day in by_day.items():
        (folder / f"dt={day}").mkdir()
        users, items, _, times = zip(*of_day, strict=True)
        columns = {"dt": pa.array(times, pa.timestamp("s")), "user_id": pa.array(users), "item_id": pa.array(items)}
        pq.write_table(pa.table(columns), folder / f"dt={day}" / "part-0.parquet")
    return ["--time_column", "dt"]  # the files' own, not the folders'


def read_partitions(folder: Path) -> Iterator[Row]:
    """Read it plainly."""
    for path in sorted(folder.rglob("*.parquet")):
        for row in pq.ParquetFile(path).read().to_pylist():
            yield Row(row["user_id"], row["item_id"], int(row["dt"].replace(tzinfo=UTC).timestamp()))


def write_lists(folder: Path, rows: list[tuple[str, str, int, int]]) -> list[str]:
    """Write the shape, and return prepare's options for it."""
    by_user: dict[str, list[tuple[str, int]]] = {}
    for user, item, _, when in rows:
        by_user.setdefault(user, []).append((item, when))
    table = [
        {"user_id": user, "items": [item for item, _ in pairs], "times": [when for _, when in pairs]}
        for user, pairs in by_user.items()
    ]
    pq.write_table(pa.Table.from_pylist(table), folder / "sequences.parquet")
    return ["--item_column", "items", "--time_column", "times"]


def read_lists(folder: Path) -> Iterator[Row]:
    """Read it plainly."""
    for row in pq.ParquetFile(folder / "sequences.parquet").read().to_pylist():
        for item, when in zip(row["items"], row["times"], strict=True):
            yield Row(row["user_id"], item, when)


SHAPES = {
    "taobao": (write_taobao, read_taobao),
    "movielens": (write_movielens, read_movielens),
    "amazon": (write_amazon, read_amazon),
    "partitions": (write_partitions, read_partitions),
    "lists": (write_lists, read_lists),
}
History = list[tuple[int, str, bool]]


def expected_histories(rows: list[Row]) -> dict[str, History]:
    """Time, item and whether only shown, per user in time order: k-core on what was clicked, and what was
    shown after a user's first click."""
    clicked = [row for row in rows if not row.shown]
    while True:
        users, items = Counter(row.user for row in clicked), Counter(row.item for row in clicked)
        left = [row for row in clicked if users[row.user] >= MIN_COUNT and items[row.item] >= MIN_COUNT]
        if len(left) == len(clicked):
            break
        clicked = left
    items = Counter(row.item for row in clicked)
    by_user: dict[str, History] = {row.user: [] for row in clicked}
    for row in rows:
        if row.user in by_user and row.item in items:
            by_user[row.user].append((row.time, row.item, row.shown))
    for user, history in by_user.items():
        history.sort(key=lambda entry: entry[0])  # stable: rows with equal times keep their order
        places = [place for place, entry in enumerate(history) if not entry[2]]
        by_user[user] = history[places[0] :]
    return by_user


def prepared_histories(data: Path) -> dict[str, History]:
    """The same of a dataset."""
    keys = {}
    for kind in ("user", "item"):
        table = pq.read_table(data / f"{kind}s")
        keys[kind] = dict(zip(table[f"{kind}_id"].to_pylist(), table["key"].to_pylist(), strict=True))
    result = {}
    for row in pq.read_table(data / "sequences").to_pylist():
        segments = row.get("segment_ids") or [0] * len(row["item_ids"])
        entries = zip(row["timestamps"], row["item_ids"], segments, strict=True)
        result[keys["user"][row["user_id"]]] = [
            (when, keys["item"][item], bool(shown)) for when, item, shown in entries
        ]
    return result


def source_rows(log: str | None, rows: int) -> list[tuple[str, str, int, int]]:
    """User, item, rating from 1 to 5 and time of each row."""
    if log is not None:
        with open(log, encoding="utf-8") as file:
            names = [name.partition(":")[0] for name in file.readline().rstrip("\n").split("\t")]
            places = [names.index(name) for name in ("user_id", "item_id", "rating", "timestamp")]
            cells = [line.rstrip("\n").split("\t") for line in file]
        user, item, rating, when = places
        return [(row[user], row[item], int(float(row[rating])), int(float(row[when]))) for row in cells]
    draw = random.Random(0)
    times = draw.sample(range(1_600_000_000, 1_600_000_000 + 40 * 86_400), rows)
    users, items = max(2, rows // 40), max(2, rows // 60)
    return [(f"{draw.randrange(users)}", f"{draw.randrange(items)}", draw.randint(1, 5), when) for when in times]


def main(arguments: list[str] | None = None) -> None:
    """Write, prepare and check every shape; print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="new folder for the files and the datasets")
    parser.add_argument("--log", help="RecBole file with user_id, item_id, rating and timestamp (default: synthetic)")
    parser.add_argument("--rows", type=int, default=20_000, help="rows of the synthetic log (default: 20000)")
    options = parser.parse_args(arguments)
    output = Path(options.output)
    if output.exists():
        parser.error(f"--output {output} exists; name a new folder")
    rows, differing = source_rows(options.log, options.rows), 0
    print(f"{len(rows):,} rows, min_count {MIN_COUNT}")
    print(f"{'shape':<12}{'users':>8}{'items':>8}{'rows':>10}{'seconds':>9}  result")
    for name, (write, read) in SHAPES.items():
        raw, data = output / name / "raw", output / name / "data"
        raw.mkdir(parents=True)
        given = write(raw, rows)
        input_ = [str(raw)] if name != "movielens" else [str(raw / "ratings.dat")]
        command = [sys.executable, "-m", "recgpt_torchrec.prepare", "--input", *input_, "--output", str(data), *given]
        started = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        seconds = time.monotonic() - started
        if done.returncode:
            print(f"{name:<12} failed: {' '.join(command)}\n{done.stderr}")
            differing += 1
            continue
        expected, found = expected_histories([*read(raw)]), prepared_histories(data)
        wrong = sum(expected.get(user) != found.get(user) for user in {**expected, **found})
        differing += bool(wrong)
        items = len({item for history in expected.values() for _, item, _ in history})
        total = sum(map(len, expected.values()))
        outcome = "equal" if not wrong else f"{wrong:,} users differ"
        print(f"{name:<12}{len(expected):>8,}{items:>8,}{total:>10,}{seconds:>9.1f}  {outcome}: {' '.join(given)}")
    if differing:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
