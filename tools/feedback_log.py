"""Makes a log of clicks and refusals with known truth: the best possible HR@10 with and without reading refusals.

    python tools/feedback_log.py --output log.csv --users 4000 --seed 0

Columns: user_id, item_id, timestamp (unix seconds), label (click, dislike or show) and place (from 1). How it is made:

- Items belong to *clusters* of equal size, and these to *regions* of `choices` clusters. A user stays in one region.
- A user wants a cluster at each request: the same as before with probability `stay`, else any of the others, all
  alike. He clicks an item of it that he has not clicked yet, all alike.
- Before each click but the first he is shown an item of each cluster that he does not want, and refuses it: `dislike`,
  at the places 1, 2, ... So these items rule all clusters out but one.
- With `noise` he is also shown that many items of his region that he does not look at: `show`, at the places after
  those. Their order in time says nothing; label and place tell them from what he refused.
- With `--truth noise` what he refuses is drawn from his region as well, whatever he wants, and tells nothing.

The best prediction from clicks alone ranks the items of the newest cluster first, and with what was refused those of
the cluster that is left.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.synthetic_log import BLOCK_USERS, DAY, START, write  # noqa: E402

LABELS = ("click", "dislike", "show")
K = 10
"""Length of the lists whose best possible hit rate is known."""


@dataclass(kw_only=True)
class Truth:
    """How a log is made."""

    regions: int = 5
    choices: int = 4
    """Number of clusters of a region."""
    size: int = 10
    """Number of items of a cluster; the longest history has as many clicks."""
    shortest: int = 6
    """Number of clicks of the shortest history."""
    stay: float = 0.5
    """Probability that a user wants the cluster of the last click again."""
    noise: int = 0
    """Number of items that are shown before each click without being looked at."""
    refusals_tell: bool = True
    """Whether what a user refuses depends on what he wants."""

    @property
    def items(self) -> int:
        """Number of items."""
        return self.regions * self.choices * self.size


@dataclass(kw_only=True)
class Best:
    """Sums over held-out clicks, the last one of each user."""

    users: int = 0
    without: float = 0.0
    """Sum of the best HR@10 from clicks alone."""
    with_feedback: float = 0.0
    """Sum of the best HR@10 from clicks and refusals."""

    def describe(self) -> str:
        """One line."""
        return (
            f"best possible HR@{K} on test: {self.without / self.users:.4f} from clicks alone, "
            f"{self.with_feedback / self.users:.4f} with what was refused"
        )


def make_block(truth: Truth, users: int, rng: np.random.Generator, best: Best) -> dict[str, np.ndarray]:
    """The rows of `users` users, in the order of time for each, and add their last clicks to `best`.

    Returns:
        user, item, time int64; label (index in `LABELS`) and place int64; [rows] each.
    """
    everyone = np.arange(users)
    region = rng.integers(0, truth.regions, users)
    order = rng.permuted(np.broadcast_to(np.arange(truth.size), (users, truth.choices, truth.size)), axis=2)
    clicked = np.zeros((users, truth.choices), dtype=np.int64)
    lengths = rng.integers(truth.shortest, truth.size + 1, users)
    wanted = rng.integers(0, truth.choices, users)
    now = START + rng.integers(0, 60 * DAY, users)
    rows: list[tuple[np.ndarray, ...]] = []

    def add(user: np.ndarray, cluster: np.ndarray, inside: np.ndarray, label: np.ndarray, place: np.ndarray) -> None:
        item = (region[user] * truth.choices + cluster) * truth.size + inside
        rows.append((user, item, now[user].copy(), label, place))

    for step in range(truth.size):
        active = everyone[lengths > step]
        if step:
            is_last = lengths[active] == step + 1
            add_best(truth, clicked[active[is_last]], wanted[active[is_last]], best)
            moves = rng.random(active.size) >= truth.stay
            shift = rng.integers(1, truth.choices, active.size)
            wanted[active] = (wanted[active] + moves * shift) % truth.choices
            shown = truth.choices - 1 + truth.noise
            # In a random order of time; the place tells which is which.
            numbers = rng.permuted(np.broadcast_to(np.arange(shown), (active.size, shown)), axis=1)
            for column in numbers.T:
                now[active] += rng.integers(2, 60, active.size)
                tells = (column < truth.choices - 1) & truth.refusals_tell
                cluster = rng.integers(0, truth.choices, active.size)
                cluster = np.where(tells, (wanted[active] + 1 + column) % truth.choices, cluster)
                inside = rng.integers(0, truth.size, active.size)
                label = np.where(column < truth.choices - 1, 1, 2)
                add(active, cluster, inside, label, column + 1)
        now[active] += rng.integers(2, 60, active.size)
        inside = order[active, wanted[active], clicked[active, wanted[active]]]
        clicked[active, wanted[active]] += 1
        place = rng.integers(1, truth.choices + truth.noise + 1, active.size)
        add(active, wanted[active], inside, np.zeros(active.size, np.int64), place)
        now[active] += rng.integers(60, DAY, active.size)
    names = ("user", "item", "time", "label", "place")
    columns = dict(zip(names, map(np.concatenate, zip(*rows, strict=True)), strict=True))
    by_user = np.argsort(columns["user"], kind="stable")
    return {name: values[by_user] for name, values in columns.items()}


def add_best(truth: Truth, clicked: np.ndarray, wanted: np.ndarray, best: Best) -> None:
    """Add the best possible hit rates of users' last clicks.

    Args:
        truth: of the log.
        clicked: [users, choices] items clicked so far in each cluster of the region.
        wanted: [users] cluster of the click before.
    """
    left = truth.size - clicked
    chance = np.full(left.shape, (1 - truth.stay) / (truth.choices - 1))
    chance[np.arange(wanted.size), wanted] = truth.stay
    chance /= left  # of each item that is left
    order = np.argsort(-chance, axis=1)
    chance, left = np.take_along_axis(chance, order, 1), np.take_along_axis(left, order, 1)
    before = np.cumsum(left, axis=1) - left
    without = (chance * np.clip(K - before, 0, left)).sum(1)
    best.users += wanted.size
    best.without += float(without.sum())
    best.with_feedback += float(wanted.size if truth.refusals_tell else without.sum())


def generate_tables(truth: Truth, users: int, seed: int, best: Best) -> Iterator[pa.Table]:
    """Yield the log, one block of users at a time; each block has its own random stream."""
    keys = pa.array([f"item_{number:0{len(str(truth.items - 1))}d}" for number in range(truth.items)])
    labels = pa.array(LABELS)
    width = max(len(str(users - 1)), 5)
    for block, first in enumerate(range(0, users, BLOCK_USERS)):
        count = min(BLOCK_USERS, users - first)
        rows = make_block(truth, count, np.random.default_rng([seed, block]), best)
        user_keys = pa.array([f"user_{first + number:0{width}d}" for number in range(count)])
        columns: dict[str, Any] = {
            "user_id": user_keys.take(pa.array(rows["user"])),
            "item_id": keys.take(pa.array(rows["item"])),
            "timestamp": rows["time"],
            "label": labels.take(pa.array(rows["label"])),
            "place": rows["place"],
        }
        yield pa.table(columns)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, generate and write the log, and print a summary."""
    default = Truth()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="file to write, ending in .csv or .parquet")
    parser.add_argument("--users", type=int, default=4000, help="number of users (default: 4000)")
    parser.add_argument("--regions", type=int, default=default.regions, help="number of regions (default: 5)")
    parser.add_argument("--stay", type=float, default=default.stay, help="probability to want the same (default: 0.5)")
    parser.add_argument("--noise", type=int, default=0, help="items shown and not looked at, per click (default: 0)")
    parser.add_argument(
        "--truth", choices=("refusals", "noise"), default="refusals", help="whether refusals tell (default: refusals)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (default: 0)")
    options = parser.parse_args(arguments)
    if not options.output.endswith((".csv", ".parquet")):
        parser.error(f"--output {options.output} must end in .csv or .parquet")
    if options.users < 1 or options.regions < 1 or options.noise < 0:
        parser.error("--users and --regions must be at least 1, --noise at least 0")
    if not 0 <= options.stay <= 1:
        parser.error(f"--stay {options.stay} must be a probability")
    tells = options.truth == "refusals"
    truth = Truth(regions=options.regions, stay=options.stay, noise=options.noise, refusals_tell=tells)
    best = Best()
    rows = write(options.output, generate_tables(truth, options.users, options.seed, best))
    print(
        f"wrote {options.output}: {rows:,} rows of {options.users:,} users over {truth.items:,} items; "
        f"{best.describe()}\nnext: python -m recgpt_torchrec.prepare --input {options.output} --output DIR "
        "--click_column label --click_values click --dislike_values dislike --position_column place --min_count 1",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
