"""Makes an interaction log of known structure and any size, for demos, tests and benchmarks.

    python tools/synthetic_log.py --output log.csv --users 5000 --items 2000 --seed 0

Columns: user_id, item_id (raw keys such as `user_00042`), timestamp (unix seconds). Rows come user by user.

How the next item is generated, so that the best possible prediction is known:

- Items belong to *series* of equal size, each with a cyclic order. The popularity of series, and of items within one,
  follows a Zipf law.
- A user has a few favourite series, drawn by popularity, and mixture weights over them (a flat Dirichlet).
- A user reads `threads` series in turn: event n belongs to thread n mod `threads`. With probability `follow`
  it is the successor of that thread's last item; otherwise the thread restarts at an item drawn from the user's mixture
  and then by popularity in that series.
- Events come in visits, days apart; after each event a visit ends with probability `leave`.

So with probability `follow` (0.85 by default) the next item is the successor of the item `threads` positions back. A
model that has learned the order of the series and of the threads ranks it first. Popularity knows neither, and
item-item co-occurrence, which sums over the items of the history, does not know which thread is next.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

BLOCK_USERS = 20_000
"""Number of users generated and written at once, which bounds memory."""
START = 1_700_000_000
"""Earliest time of a first event, unix seconds."""
DAY = 86_400


@dataclass(kw_only=True)
class World:
    """What all users share: the items of each series, their order and their popularity."""

    members: np.ndarray
    """[series, size] item numbers; each row by descending popularity."""
    successor: np.ndarray
    """[items] the next item in the series of each item."""
    series_cumulative: np.ndarray
    """[series] cumulative popularity of the series."""
    item_cumulative: np.ndarray
    """[size] cumulative popularity of the items of a series."""

    @classmethod
    def make(cls, items: int, series: int, zipf: float, rng: np.random.Generator) -> "World":
        """Draw the series and their orders."""
        size = items // series
        members = rng.permutation(items)[: series * size].reshape(series, size)
        order = rng.permuted(members, axis=1)
        successor = np.zeros(items, dtype=np.int64)
        successor[order] = np.roll(order, -1, axis=1)
        return cls(
            members=members,
            successor=successor,
            series_cumulative=cumulative_zipf(series, zipf),
            item_cumulative=cumulative_zipf(size, zipf),
        )

    def item_at(self, series: np.ndarray, place: np.ndarray) -> np.ndarray:
        """Item numbers at places of series, by descending popularity; int64, [n] each."""
        return self.members[series, place]

    def next_of(self, items: np.ndarray) -> np.ndarray:
        """The next item in the series of each item; int64 [n]."""
        return self.successor[items]


@dataclass(kw_only=True)
class Habits:
    """Parameters of the users' behaviour."""

    mean_events: float = 20
    """Mean number of events per user; at least 5."""
    threads: int = 3
    """Number of series that a user reads in turn."""
    follow: float = 0.85
    """Probability that an event continues its thread's series."""
    leave: float = 0.1
    """Probability that a visit ends after an event."""
    favourites: int = 4
    """Number of series that a user draws from (drawn with replacement, so some users have fewer)."""


def cumulative_zipf(count: int, exponent: float) -> np.ndarray:
    """[count] float64: cumulative shares of a Zipf law."""
    shares = 1 / np.arange(1, count + 1) ** exponent
    return np.cumsum(shares / shares.sum())


class SharedWorld(Protocol):
    """What all users share: `World`, or one that holds nothing per item (`tools.write_dataset`)."""

    series_cumulative: np.ndarray
    item_cumulative: np.ndarray

    def item_at(self, series: np.ndarray, place: np.ndarray) -> np.ndarray:
        """See `World`."""

    def next_of(self, items: np.ndarray) -> np.ndarray:
        """See `World`."""


def walk_users(world: SharedWorld, habits: Habits, users: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Generate the events of `users` users, one event of all users at a time.

    Returns:
        user [events] (0 to users - 1, ascending), item [events], time [events] (increasing per user); int64 each.
    """
    favourites = _draw(world.series_cumulative, (users, habits.favourites), rng)
    mixture = np.cumsum(rng.standard_exponential((users, habits.favourites)), axis=1)
    mixture /= mixture[:, -1:]
    extra = rng.geometric(1 / max(habits.mean_events - 4, 1), size=users) - 1
    lengths = np.minimum(5 + extra, int(10 * habits.mean_events))
    now = START + rng.integers(0, 60 * DAY, size=users)
    current = np.zeros((users, habits.threads), dtype=np.int64)
    fresh = np.ones(users, dtype=bool)
    steps: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for step in range(int(lengths.max())):
        active = np.flatnonzero(lengths > step)
        series = favourites[active, (mixture[active] < rng.random(len(active))[:, None]).sum(axis=1)]
        drawn = world.item_at(series, _draw(world.item_cumulative, len(active), rng))
        thread = step % habits.threads
        follows = (rng.random(len(active)) < habits.follow) & (step >= habits.threads)
        item = np.where(follows, world.next_of(current[active, thread]), drawn)
        current[active, thread] = item
        pause = np.where(fresh[active], rng.exponential(5 * DAY, len(active)), rng.exponential(120, len(active)))
        now[active] += 1 + pause.astype(np.int64)
        steps.append((active, item, now[active].copy()))
        fresh[active] = rng.random(len(active)) < habits.leave
    user, item, time = (np.concatenate(columns) for columns in zip(*steps, strict=True))
    order = np.argsort(user, kind="stable")
    return user[order], item[order], time[order]


def _draw(cumulative: np.ndarray, shape: int | tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Draw indices with the probabilities that `cumulative` adds up."""
    return np.searchsorted(cumulative, rng.random(shape) * cumulative[-1], side="right")


def generate_tables(world: World, habits: Habits, users: int, items: int, seed: int) -> Iterator[pa.Table]:
    """Yield the log, one block of users at a time; each block has its own random stream."""
    item_keys = pa.array([f"item_{number:0{len(str(items - 1))}d}" for number in range(items)])
    width = max(len(str(users - 1)), 5)
    for block, first in enumerate(range(0, users, BLOCK_USERS)):
        count = min(BLOCK_USERS, users - first)
        user, item, time = walk_users(world, habits, count, np.random.default_rng([seed, 1, block]))
        user_keys = pa.array([f"user_{first + number:0{width}d}" for number in range(count)])
        columns = {
            "user_id": user_keys.take(pa.array(user)),
            "item_id": item_keys.take(pa.array(item)),
            "timestamp": time,
        }
        yield pa.table(columns)


def write(path: str, blocks: Iterator[pa.Table]) -> int:
    """Write blocks to a .csv or .parquet file, under a temporary name first; returns the number of rows."""
    temporary = Path(f"{path}.incomplete")
    Path(path).resolve().parent.mkdir(parents=True, exist_ok=True)
    rows = 0
    writer: pq.ParquetWriter | pyarrow.csv.CSVWriter | None = None
    try:
        for table in blocks:
            if writer is None:
                kind = pq.ParquetWriter if path.endswith(".parquet") else pyarrow.csv.CSVWriter
                options = pyarrow.csv.WriteOptions(quoting_style="needed")
                writer = kind(
                    temporary, table.schema, **({} if kind is pq.ParquetWriter else {"write_options": options})
                )
            writer.write_table(table)
            rows += table.num_rows
        if writer is not None:
            writer.close()
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, generate and write the log, and print a summary."""
    habits = Habits()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="file to write, ending in .csv or .parquet")
    parser.add_argument("--users", type=int, default=5000, help="number of users (default: 5000)")
    parser.add_argument("--items", type=int, default=2000, help="number of items (default: 2000)")
    parser.add_argument("--series", type=int, default=0, help="number of series; 0: series of 50 items (default: 0)")
    parser.add_argument(
        "--threads", type=int, default=habits.threads, help="series each user reads in turn (default: 3)"
    )
    parser.add_argument("--mean_events", type=float, default=habits.mean_events, help="events per user (default: 20)")
    parser.add_argument(
        "--zipf", type=float, default=0.8, help="exponent of the popularity skew; 0 is none (default: 0.8)"
    )
    parser.add_argument(
        "--follow", type=float, default=habits.follow, help="probability to continue a series (default: 0.85)"
    )
    parser.add_argument(
        "--leave", type=float, default=habits.leave, help="probability that a visit ends (default: 0.1)"
    )
    parser.add_argument(
        "--favourites", type=int, default=habits.favourites, help="series each user draws from (default: 4)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (default: 0)")
    options = parser.parse_args(arguments)
    series = options.series or max(options.items // 50, 1)
    if not options.output.endswith((".csv", ".parquet")):
        parser.error(f"--output {options.output} must end in .csv or .parquet")
    if options.threads < 1:
        parser.error(f"--threads {options.threads} must be at least 1")
    if options.users < 1 or options.items < 2 or options.items // series < 2:
        parser.error("there must be at least 1 user, and 2 items in each series; pass fewer --series or more --items")
    if options.mean_events < 5:
        parser.error(f"--mean_events {options.mean_events} must be at least 5")
    if not (0 <= options.follow <= 1 and 0 <= options.leave <= 1 and options.favourites > 0 and options.zipf >= 0):
        parser.error("--follow and --leave are probabilities, --favourites is at least 1, --zipf at least 0")
    habits = Habits(
        mean_events=options.mean_events,
        threads=options.threads,
        follow=options.follow,
        leave=options.leave,
        favourites=options.favourites,
    )
    world = World.make(options.items, series, options.zipf, np.random.default_rng([options.seed, 0]))
    rows = write(options.output, generate_tables(world, habits, options.users, options.items, options.seed))
    print(
        f"wrote {options.output}: {rows:,} events of {options.users:,} users over {options.items:,} items in "
        f"{series:,} series; next: python -m recgpt_torchrec.prepare --input {options.output} --output DIR",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
