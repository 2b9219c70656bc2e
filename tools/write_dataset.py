"""Writes a dataset with a large synthetic catalogue, as `prepare` would, in bounded memory.

    python -m tools.write_dataset --items 1e8 --users 200000 --output DIR
    python -m tools.write_dataset --items 1e8 --users 200000 --histories 100 --output SAMPLE

`prepare` needs a log in which every item occurs; here most items of a catalogue of 10^8 have no interaction. Users
behave as in `tools.synthetic_log`: they follow short cyclic series of items. An item's number is computed from its
series and its place in it, so that nothing is held per item but its counts (9 bytes).

With `--histories N` only the first N users have interactions. Both datasets above have the same vocabulary, so a
checkpoint of one can be used with the other.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recgpt_torchrec.config.command_line import whole_number
from recgpt_torchrec.data.dataset import Manifest
from recgpt_torchrec.data.split import EVALUATION, Starts
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.pipeline import group_size
from recgpt_torchrec.preparation.writing import fingerprint_parts, list_groups
from recgpt_torchrec.storage import folders
from recgpt_torchrec.storage.parts import Part, write_parts
from tools.synthetic_log import BLOCK_USERS, Habits, cumulative_zipf, walk_users

SERIES = 50
"""Number of items per series; fewer in a smaller catalogue."""
KEYS = 2**18
"""Number of keys generated at once, a row group of items/ and users/."""
GROUPS_PER_PART = 64
"""Row groups per file."""
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass
class Arithmetic:
    """Series of items that are computed, not held: item m * n mod items is at place n % size of series n // size.

    The multiplier m is near a golden section of the catalogue, so that neighbours of a series, and popular series, lie
    far apart: every shard of a table has its share.
    """

    items: int
    zipf: float
    size: int = field(init=False)
    multiplier: int = field(init=False)
    inverse: int = field(init=False)
    series_cumulative: np.ndarray = field(init=False)
    item_cumulative: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.size = min(SERIES, self.items)
        self.multiplier = max(int(GOLDEN * self.items), 1)
        while math.gcd(self.multiplier, self.items) > 1:
            self.multiplier += 1
        self.inverse = pow(self.multiplier, -1, self.items)
        self.series_cumulative = cumulative_zipf(self.items // self.size, self.zipf)
        self.item_cumulative = cumulative_zipf(self.size, self.zipf)

    def item_at(self, series: np.ndarray, place: np.ndarray) -> np.ndarray:
        """Item numbers at places of series; int64, [n] each."""
        return (series * self.size + place) * self.multiplier % self.items

    def next_of(self, items: np.ndarray) -> np.ndarray:
        """The next item in the series of each item; int64 [n]."""
        number = items * self.inverse % self.items
        return (number - number % self.size + (number + 1) % self.size) * self.multiplier % self.items


@dataclass
class Counts:
    """What is counted while histories are written."""

    count: np.ndarray
    """[items] int32 interactions."""
    train_count: np.ndarray
    """[items] int32 interactions in the training part."""
    is_target: np.ndarray
    """[items] bool: whether a target of training is the item."""
    lengths: list[np.ndarray] = field(default_factory=list)
    """[users of a block] int64 interactions per user, for each block."""

    def add(self, user: np.ndarray, item: np.ndarray) -> None:
        """Count a block's events, [events] int64 user and item, ordered by user."""
        lengths = np.bincount(user)
        ends = np.cumsum(lengths)
        place = np.arange(user.size) - (ends - lengths)[user]
        trained = place < Starts.of(lengths, "last").validation[user]
        self.is_target[item[trained & (place > 0)]] = True
        for counts, ids in ((self.count, item), (self.train_count, item[trained])):
            distinct, times = np.unique(ids, return_counts=True)
            counts[distinct] += times.astype(np.int32)
        self.lengths.append(lengths)

    def record(self) -> dict[str, Any]:
        """`preparation` of the manifest, as `prepare` writes it."""
        lengths = np.concatenate(self.lengths)
        starts = Starts.of(lengths, "last")
        quantiles = np.quantile(lengths, [0, 0.5, 0.9, 0.99, 1], method="inverted_cdf").tolist()
        return {
            "rows": int(lengths.sum()),
            "lengths": {
                "mean": round(float(lengths.mean()), 2),
                **dict(zip(("min", "50%", "90%", "99%", "max"), map(int, quantiles), strict=True)),
            },
            "split": {
                "interactions": {
                    "training": int(starts.validation.sum()),
                    "validation": int((starts.test - starts.validation).sum()),
                    "test": int((lengths - starts.test).sum()),
                },
                **{f"{split}_users": int(starts.has_target(split, lengths).sum()) for split in EVALUATION},
                "unused": 0,
                "training_targets": int(np.maximum(starts.validation - 1, 0).sum()),
                "items_without_target": int(self.is_target.size - np.count_nonzero(self.is_target)),
            },
        }


def blocks(world: Arithmetic, habits: Habits, users: int, seed: int, counts: Counts) -> Iterator[pa.RecordBatch]:
    """Generate and count the interactions of the users 0 to `users` - 1, ordered by user and time, a block at a time.

    A block has its own random stream, and always all its users, so a user's history does not depend on `users`.
    """
    for number, first in enumerate(range(0, users, BLOCK_USERS)):
        user, item, moment = walk_users(world, habits, BLOCK_USERS, np.random.default_rng([seed, 1, number]))
        inside = slice(0, int(np.searchsorted(user, users - first)))
        user, item, moment = user[inside], item[inside], moment[inside]
        counts.add(user, item)
        yield pa.RecordBatch.from_pydict({"user_id": user + first, "item_id": item, "time": moment})


def key_tables(prefix: str, column: str, total: int) -> Iterator[pa.Table]:
    """Generate ids and keys, `i0`, `i1`, ..."""
    for first in range(0, total, KEYS):
        ids = pa.array(np.arange(first, min(first + KEYS, total), dtype=np.int64))
        keys = pc.binary_join_element_wise(prefix, ids.cast(pa.string()), "")
        yield pa.table({column: ids, "key": keys})


def write_dataset(
    output: str, *, items: int, users: int, histories: int, habits: Habits, zipf: float, seed: int
) -> Manifest:
    """Write a dataset folder, whole or not at all.

    Args:
        output: folder to write, which must not exist.
        items, users: sizes of the vocabulary.
        histories: number of users that have interactions, the first ones.
        habits: of the users.
        zipf: exponent of the popularity of series, and of items within one; 0: all are equally popular.
        seed: of the interactions; the vocabulary does not depend on it.

    Raises:
        InputError: `output` holds something.
    """
    folders.check_free(output, "dataset")
    world = Arithmetic(items, zipf)
    counts = Counts(np.zeros(items, np.int32), np.zeros(items, np.int32), np.zeros(items, np.bool_))
    lists: dict[str, tuple[str, pa.DataType]] = {
        "item_ids": ("item_id", pa.int64()),
        "timestamps": ("time", pa.int64()),
    }
    with folders.stage_folder(output) as (fs, folder):
        groups = list_groups(
            blocks(world, habits, histories, seed, counts), group_size(histories), lists, stop=histories
        )
        manifest = Manifest(users=users, items=items, sequences=write_parts(fs, folder, "sequences", groups, 8))
        manifest.preparation = counts.record()
        manifest.interactions = manifest.preparation["rows"]
        manifest.settings = {"synthetic": {"seed": seed, "zipf": zipf, "histories": histories}}

        def write(name: str, tables: Iterator[pa.Table]) -> list[Part]:
            return write_parts(fs, folder, name, tables, GROUPS_PER_PART)

        def with_counts(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
            for table in tables:
                ids = table.column("item_id").to_numpy()
                columns = {"count": counts.count, "train_count": counts.train_count}
                for column, values in columns.items():
                    table = table.append_column(column, pa.array(values[ids].astype(np.int64)))
                yield table

        manifest.item_parts = write("items", with_counts(key_tables("i", "item_id", items)))
        manifest.user_parts = write("users", key_tables("u", "user_id", users))
        keys = {"items": manifest.item_parts, "users": manifest.user_parts}
        manifest.vocabulary = fingerprint_parts(fs, folder, keys)
        folders.write_manifest(fs, folder, manifest.to_json())
    return manifest


def whole(text: str) -> int:
    """Read a number of an option, which may be written as 1e8."""
    return int(str(whole_number(int, text)))


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, write the dataset, and print a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--items", type=whole, required=True, help="size of the catalogue, 2 to 3e9; 1e8 is a number")
    parser.add_argument("--users", type=whole, required=True, help="number of users")
    parser.add_argument(
        "--histories", type=whole, default=None, help="number of users with interactions, the first (default: all)"
    )
    parser.add_argument("--mean_events", type=float, default=20, help="mean interactions per user (default: 20)")
    parser.add_argument("--zipf", type=float, default=0.8, help="exponent of popularity; 0 is uniform (default: 0.8)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (default: 0)")
    options = parser.parse_args(arguments)
    histories = options.users if options.histories is None else options.histories
    if not 2 <= options.items <= 3e9:  # products of two item numbers are 64-bit integers
        parser.error(f"--items {options.items} must be from 2 to 3e9")
    if not 1 <= histories <= options.users:
        parser.error(f"--histories {histories} must be from 1 to --users {options.users}")
    if options.mean_events < 5 or options.zipf < 0:
        parser.error("--mean_events must be at least 5, and --zipf at least 0")
    since = time.perf_counter()
    try:
        manifest = write_dataset(
            options.output,
            items=options.items,
            users=options.users,
            histories=histories,
            habits=Habits(mean_events=options.mean_events),
            zipf=options.zipf,
            seed=options.seed,
        )
    except InputError as error:
        parser.error(str(error))
    print(
        f"wrote {options.output}: {manifest.interactions:,} interactions of {histories:,} users, {manifest.users:,} "
        f"users and {manifest.items:,} items in the vocabulary; {manifest.size / 2**20:,.0f} MiB, "
        f"{time.perf_counter() - since:.1f} s",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
