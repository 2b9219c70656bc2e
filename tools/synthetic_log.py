"""Make an interaction log with known structure, of any size, for demos, tests and benchmarks.

    python tools/synthetic_log.py --output log.csv --users 5000 --items 2000 --seed 0

Columns: user_id, item_id (raw keys such as `user_00042`), timestamp (unix seconds). Rows come user by user.

What generates the next item, so that the best possible answer is known:

- Items belong to communities of equal size; communities, and items within one, differ in popularity by a Zipf law.
- A user has a few favourite communities, drawn by popularity, and a personal mixture over them (a flat Dirichlet).
- A user's events fall into sessions. A session starts at an item drawn from the mixture, then from the popularity in
  that community, and picks one of the community's two *rings* (random cyclic orders of its items) to walk on.
- Each later event of the session is, with probability `follow`, the current item's successor on the session's ring,
  and otherwise a new draw like the first one (the session's ring number stays).
- After each event the session ends with probability `leave`; the next one begins days later.

So the next item is the current ring's successor with probability `follow` x (1 - `leave`) (0.765 by default), and a
model that knows both rings but not which one is walked gets half of that at rank 1. Which ring it is shows in the last
two items, in their order. Popularity knows none of this, and item-item co-occurrence, which ignores order, cannot tell
successors from predecessors, nor the last item's neighbours from those of the whole history.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

BLOCK_USERS = 20_000
"""Users made and written at once; what is in memory does not grow beyond it."""
START = 1_700_000_000
"""First session's earliest time, unix seconds."""
DAY = 86_400


@dataclass(kw_only=True)
class World:
    """What all users share: which items are in which community, how popular they are, and the two rings."""

    members: np.ndarray
    """[communities, size] item numbers; row c in the order of popularity."""
    successor: np.ndarray
    """[2, items] the item after each item on ring 0 and on ring 1 of its community."""
    community_cumulative: np.ndarray
    """[communities] cumulative popularity of communities."""
    item_cumulative: np.ndarray
    """[size] cumulative popularity of a community's items."""

    @classmethod
    def make(cls, items: int, communities: int, zipf: float, rng: np.random.Generator) -> "World":
        """Draw communities and rings."""
        size = items // communities
        members = rng.permutation(items)[: communities * size].reshape(communities, size)
        successor = np.zeros((2, items), dtype=np.int64)
        for ring in range(2):
            order = rng.permuted(members, axis=1)
            successor[ring, order] = np.roll(order, -1, axis=1)
        shares = 1 / np.arange(1, communities + 1) ** zipf
        popularity = 1 / np.arange(1, size + 1) ** zipf
        return cls(
            members=members,
            successor=successor,
            community_cumulative=np.cumsum(shares / shares.sum()),
            item_cumulative=np.cumsum(popularity / popularity.sum()),
        )


@dataclass(kw_only=True)
class Habits:
    """How users behave."""

    mean_events: float = 20
    """Events a user, on average; at least 5."""
    follow: float = 0.85
    """Probability that an event within a session follows the ring."""
    leave: float = 0.1
    """Probability that a session ends after an event."""
    favourites: int = 4
    """Communities a user draws from (drawn with replacement, so some users have fewer)."""


def events(world: World, habits: Habits, users: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Walk `users` users through their events, all of them a step at a time.

    Returns:
        user [events] (0 to users - 1, in order), item [events], time [events] (rising for each user).
    """
    favourites = _draw(world.community_cumulative, (users, habits.favourites), rng)
    mixture = np.cumsum(rng.standard_exponential((users, habits.favourites)), axis=1)
    mixture /= mixture[:, -1:]
    extra = rng.geometric(1 / max(habits.mean_events - 4, 1), size=users) - 1
    lengths = np.minimum(5 + extra, int(10 * habits.mean_events))
    now = START + rng.integers(0, 60 * DAY, size=users)
    current = np.zeros(users, dtype=np.int64)
    ring = np.zeros(users, dtype=np.int64)
    fresh = np.ones(users, dtype=bool)
    made: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for step in range(int(lengths.max())):
        active = np.flatnonzero(lengths > step)
        starts = fresh[active]
        ring[active] = np.where(starts, rng.integers(0, 2, size=len(active)), ring[active])
        community = favourites[active, (mixture[active] < rng.random(len(active))[:, None]).sum(axis=1)]
        drawn = world.members[community, _draw(world.item_cumulative, len(active), rng)]
        follows = ~starts & (rng.random(len(active)) < habits.follow)
        current[active] = np.where(follows, world.successor[ring[active], current[active]], drawn)
        pause = np.where(starts, rng.exponential(5 * DAY, len(active)), rng.exponential(120, len(active)))
        now[active] += 1 + pause.astype(np.int64)
        made.append((active, current[active].copy(), now[active].copy()))
        fresh[active] = rng.random(len(active)) < habits.leave
    user, item, time = (np.concatenate(columns) for columns in zip(*made, strict=True))
    order = np.argsort(user, kind="stable")
    return user[order], item[order], time[order]


def _draw(cumulative: np.ndarray, shape: int | tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Indices, each with its share of `cumulative`."""
    return np.searchsorted(cumulative, rng.random(shape) * cumulative[-1], side="right")


def tables(world: World, habits: Habits, users: int, items: int, seed: int) -> Iterator[pa.Table]:
    """The log, a block of users at a time; each block has its own random numbers."""
    item_keys = pa.array([f"item_{number:0{len(str(items - 1))}d}" for number in range(items)])
    width = max(len(str(users - 1)), 5)
    for block, first in enumerate(range(0, users, BLOCK_USERS)):
        count = min(BLOCK_USERS, users - first)
        user, item, time = events(world, habits, count, np.random.default_rng([seed, 1, block]))
        user_keys = pa.array([f"user_{first + number:0{width}d}" for number in range(count)])
        columns = {
            "user_id": user_keys.take(pa.array(user)),
            "item_id": item_keys.take(pa.array(item)),
            "timestamp": time,
        }
        yield pa.table(columns)


def write(path: str, blocks: Iterator[pa.Table]) -> int:
    """Write blocks to a .csv or .parquet file, through a temporary name. Returns the rows written."""
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
    """Parse, make, write, and say what was made."""
    habits = Habits()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="file to write, ending in .csv or .parquet")
    parser.add_argument("--users", type=int, default=5000, help="number of users (default: 5000)")
    parser.add_argument("--items", type=int, default=2000, help="number of items (default: 2000)")
    parser.add_argument(
        "--communities", type=int, default=0, help="item communities; 0 makes them of 50 items (default: 0)"
    )
    parser.add_argument("--mean_events", type=float, default=habits.mean_events, help="events a user (default: 20)")
    parser.add_argument(
        "--zipf", type=float, default=0.8, help="exponent of the popularity skew; 0 is none (default: 0.8)"
    )
    parser.add_argument(
        "--follow", type=float, default=habits.follow, help="probability to follow the ring (default: 0.85)"
    )
    parser.add_argument(
        "--leave", type=float, default=habits.leave, help="probability that a session ends (default: 0.1)"
    )
    parser.add_argument(
        "--favourites", type=int, default=habits.favourites, help="communities a user draws from (default: 4)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    options = parser.parse_args(arguments)
    communities = options.communities or max(options.items // 50, 1)
    if not options.output.endswith((".csv", ".parquet")):
        parser.error(f"--output {options.output} must end in .csv or .parquet")
    if options.users < 1 or options.items < 2 or options.items // communities < 2:
        parser.error(
            "there must be at least 1 user, and 2 items in each community; pass fewer --communities or more --items"
        )
    if options.mean_events < 5:
        parser.error(f"--mean_events {options.mean_events} must be at least 5")
    if not (0 <= options.follow <= 1 and 0 <= options.leave <= 1 and options.favourites > 0 and options.zipf >= 0):
        parser.error("--follow and --leave are probabilities, --favourites is at least 1, --zipf at least 0")
    habits = Habits(
        mean_events=options.mean_events, follow=options.follow, leave=options.leave, favourites=options.favourites
    )
    world = World.make(options.items, communities, options.zipf, np.random.default_rng([options.seed, 0]))
    rows = write(options.output, tables(world, habits, options.users, options.items, options.seed))
    print(
        f"wrote {options.output}: {rows:,} events of {options.users:,} users over {options.items:,} items in "
        f"{communities:,} communities; next: python -m recgpt_torchrec.prepare --input {options.output} --output DIR",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
