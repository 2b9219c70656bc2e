"""Makes a log whose next item is decided by attributes, by time, by events or by ids alone, with the best possible HR.

    python tools/structured_log.py --structure attributes --output runs/attributes --seed 0

Writes to the folder --output:

    log.parquet     user_id, item_id, timestamp (unix seconds), event (view or buy); rows come user by user
    items.parquet   item_id, category, brand, tags (a list)
    users.parquet   user_id, country, age
    truth.json      the options, and HR@10 and NDCG@10 on each user's last row of a ranker that knows the rule

All four columns of inputs are there in every log; which of them decides is the structure's rule:

    attributes   the next item's category follows from the last item's category and the user's country, its brand from
                 the last item's brand; of the items of that category and brand, those that share a tag with the last
                 item are likelier. New starts are in categories that the user's age likes.
    time         items belong to series. Within a visit the next item is the successor of the last; after a pause of
                 more than 12 hours a user begins one of the series of that hour of the day, other ones on weekends.
    events       items belong to groups of ten. A buy is of the last item's group; a view is of the group that follows
                 that one, in one order of the groups after a view and in another one after a buy.
    none         the next item is the successor of the last one, whatever attributes, times and events are.

A rule holds with probability --follow; otherwise an item is drawn at random. Probabilities of all items are computed
for each event: the event is drawn from them, and so is the truth, masked as `evaluate` masks: items of the history do
not compete, the target does. `truth.json` also has the same figures for a ranker that knows the rule but not the time
or event of the request, where these decide.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

CATEGORIES, BRANDS, TAGS, COUNTRIES, AGES = 30, 10, 20, 4, 5
"""Numbers of values; ages are five groups of 12 years from 18 on."""
LIKED = 3
"""Categories that an age likes."""
SHARED_TAG = 3.0
"""Weight of an item that shares a tag with the last one, where that of others is 1."""
GROUP = 10
"""Items of a group, in the structure `events`."""
SERIES, CELLS = 20, 8
"""Items of a series, and cells of time (four blocks of six hours, on weekends or not), in the structure `time`."""
FEWEST = 2 * SERIES * CELLS
"""Smallest number of items: two series for each cell."""
PAUSE = 43_200
"""Seconds from which on a pause ends a visit."""
EVENTS = ("view", "buy")
BUYS = 0.3
"""Probability that an event is a buy."""
STARTS = (1_700_006_400, 60 * 86_400)
"""Earliest time of a first event in unix seconds, and the seconds within which it is drawn."""
BLOCK = 2**23
"""Probabilities computed at once."""
REQUESTS = 64
"""Requests over which a ranker that does not know the request takes the mean."""
ITEMS = {"attributes": 6000, "time": 1600, "events": 500, "none": 1000}
"""Default number of items."""


@dataclass(kw_only=True)
class Options:
    """Options of a log."""

    structure: str
    users: int = 3000
    items: int
    mean_events: float = 20
    follow: float = 0.85
    leave: float = 0.3
    seed: int = 0


@dataclass(kw_only=True)
class Moment:
    """What is known of some users when their next item is drawn: [n] each."""

    user: Ints
    last: Ints
    """Item of the newest event."""
    event: Ints
    """Type of the newest event."""
    gap: Ints
    """Seconds from the newest event to the next."""
    time: Ints
    """Time of the next event."""
    asked: Ints
    """Type of the next event."""

    def take(self, rows: Ints | slice) -> "Moment":
        """Some of the users."""
        return Moment(**{name: values[rows] for name, values in vars(self).items()})


class World:
    """What all users share: attributes of users and items, and the rules.

    Example: `world.chances(moment)` is [n, items] probabilities of the next item.
    """

    def __init__(self, options: Options, rng: np.random.Generator) -> None:
        users, items, self.options = options.users, options.items, options
        self.category, self.brand = rng.integers(0, CATEGORIES, items), rng.integers(0, BRANDS, items)
        self.tags = rng.random((items, TAGS)) < 1.5 / TAGS
        self.tags[np.arange(items), rng.integers(0, TAGS, items)] = True
        self.country, self.age = rng.integers(0, COUNTRIES, users), rng.integers(18, 18 + 12 * AGES, users)
        self.next_category = rng.permuted(np.tile(np.arange(CATEGORIES), (COUNTRIES, 1)), axis=1)
        self.next_brand = rng.permutation(BRANDS)
        liked = rng.permuted(np.tile(np.arange(CATEGORIES), (AGES, 1)), axis=1)[:, :LIKED]
        self.liked = (self.category[:, None, None] == liked).any(2).T
        """[ages, items] bool: whether an age likes the item's category."""
        order = rng.permutation(items)
        self.successor = np.empty(items, np.int64)
        self.successor[order] = np.roll(order, -1)
        self.place = np.empty(items, np.int64)
        self.place[order] = np.arange(items)
        groups = np.arange(-(-items // GROUP))
        self.next_group = np.stack([rng.permutation(groups), groups, rng.permutation(groups), groups])
        """[4, groups] the group after each one, by twice the last event plus the event that comes."""
        self.rule: Callable[[Moment], Floats] = getattr(self, f"_{options.structure}")

    def chances(self, moment: Moment) -> Floats:
        """[n, items] float64 probabilities of the next item."""
        ruled = self.rule(moment)
        total = ruled.sum(1, keepdims=True)
        follow = np.where(total > 0, self.options.follow, 0.0)
        return follow * ruled / np.maximum(total, 1e-12) + (1 - follow) * self._starts(moment)

    def _starts(self, moment: Moment) -> Floats:
        """Probabilities of an item that no rule decides."""
        if self.options.structure != "attributes":
            return np.full((moment.user.size, self.options.items), 1 / self.options.items)
        liked = self.liked[(self.age[moment.user] - 18) // 12].astype(np.float64)
        return (liked + 1e-6) / (liked + 1e-6).sum(1, keepdims=True)

    def _attributes(self, moment: Moment) -> Floats:
        category = self.next_category[self.country[moment.user], self.category[moment.last]]
        brand = self.next_brand[self.brand[moment.last]]
        inside = (self.category == category[:, None]) & (self.brand == brand[:, None])
        shares = (self.tags[moment.last].astype(np.float32) @ self.tags.T.astype(np.float32)) > 0
        return inside * np.where(shares, SHARED_TAG, 1.0)

    def _time(self, moment: Moment) -> Floats:
        begins = moment.gap > PAUSE
        days = moment.time // 86_400 + 3  # 1970 began on a Thursday; Monday is 0
        cell = moment.time % 86_400 // 21_600 + 4 * (days % 7 >= 5)
        first = self.place % SERIES == 0
        begun = first & (self.place // SERIES % CELLS == cell[:, None])
        return np.where(begins[:, None], begun, self._none(moment))

    def _events(self, moment: Moment) -> Floats:
        group = self.next_group[2 * moment.event + moment.asked, self.place[moment.last] // GROUP]
        return (self.place // GROUP == group[:, None]).astype(np.float64)

    def _none(self, moment: Moment) -> Floats:
        return (np.arange(self.options.items) == self.successor[moment.last][:, None]).astype(np.float64)


@dataclass
class Log:
    """Events in the order of users and times, [events] each, and each user's number of them."""

    user: Ints
    item: Ints
    time: Ints
    event: Ints
    lengths: Ints

    def last_moments(self) -> tuple[Moment, Ints]:
        """What was known before the last event of each user, and its item [users]."""
        at = np.cumsum(self.lengths) - 1
        return self._before(at), self.item[at]

    def _before(self, at: Ints) -> Moment:
        before = at - 1
        return Moment(
            user=self.user[at],
            last=self.item[before],
            event=self.event[before],
            gap=self.time[at] - self.time[before],
            time=self.time[at],
            asked=self.event[at],
        )


def generate(world: World, rng: np.random.Generator) -> Log:
    """Draw the events of all users, one event of all users at a time."""
    options = world.options
    extra = rng.geometric(1 / max(options.mean_events - 4, 1), options.users) - 1
    lengths = np.minimum(5 + extra, int(10 * options.mean_events))
    time = STARTS[0] + rng.integers(0, STARTS[1], options.users)
    item, event = rng.integers(0, options.items, options.users), _draw_events(options.users, rng)
    steps = [(np.arange(options.users), item.copy(), time.copy(), event.copy())]
    for step in range(1, int(lengths.max())):
        active = np.flatnonzero(lengths > step)
        pauses = rng.random(active.size) < options.leave
        long = PAUSE + 1 + rng.exponential(3 * 86_400, active.size)
        gap = np.where(pauses, long, 1 + rng.exponential(300, active.size).clip(max=PAUSE - 1)).astype(np.int64)
        moment = Moment(
            user=active,
            last=item[active],
            event=event[active],
            gap=gap,
            time=time[active] + gap,
            asked=_draw_events(active.size, rng),
        )
        item[active], time[active], event[active] = _draw_items(world, moment, rng), moment.time, moment.asked
        steps.append((active, item[active], time[active], event[active]))
    columns = [np.concatenate(parts) for parts in zip(*steps, strict=True)]
    order = np.argsort(columns[0], kind="stable")
    user, item, time, event = (column[order] for column in columns)
    return Log(user, item, time, event, lengths)


def _draw_events(number: int, rng: np.random.Generator) -> Ints:
    return (rng.random(number) < BUYS).astype(np.int64)


def _draw_items(world: World, moment: Moment, rng: np.random.Generator) -> Ints:
    drawn = []
    for block in _blocks(moment.user.size, world.options.items):
        cumulative = np.cumsum(world.chances(moment.take(block)), axis=1)
        point = rng.random(len(cumulative)) * cumulative[:, -1]
        drawn.append((cumulative <= point[:, None]).sum(1))
    return np.concatenate(drawn).astype(np.int64)


def _blocks(rows: int, items: int) -> list[slice]:
    size = max(1, BLOCK // items)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def measure_truth(world: World, log: Log, *, knows_request: bool = True) -> dict[str, float]:
    """HR@10 and NDCG@10 on each user's last event of a ranker that knows the rule; equal items share their ranks.

    Args:
        world, log: the rule and its log.
        knows_request: whether it knows time and event of the request, or takes the mean over requests of the log.
    """
    moment, targets = log.last_moments()
    starts = np.cumsum(log.lengths) - log.lengths
    rng = np.random.default_rng(0)
    requests = moment.take(rng.integers(0, moment.user.size, 1 if knows_request else REQUESTS))
    sums = np.zeros(2)
    gains = np.append(1 / np.log2(np.arange(10) + 2), 0)
    reach = np.concatenate([[0], np.cumsum(gains)])
    for block in _blocks(moment.user.size, world.options.items):
        some = moment.take(block)
        if knows_request:
            chances = world.chances(some)
        else:
            chances = np.zeros((some.user.size, world.options.items))
            for number in range(REQUESTS):
                request = {name: np.full(some.user.size, getattr(requests, name)[number]) for name in _REQUEST}
                chances += world.chances(Moment(**{**vars(some), **request})) / REQUESTS
        for row, user in enumerate(range(block.start, block.stop)):
            own = chances[row]
            score = own[targets[user]]
            competes = np.ones(own.size, bool)
            competes[log.item[starts[user] : starts[user] + log.lengths[user] - 1]] = False
            competes[targets[user]] = True
            near = np.isclose(own, score, rtol=1e-9, atol=0)
            better, equal = int((competes & (own > score) & ~near).sum()), int((competes & near).sum())
            first, stop = min(better, 11), min(better + equal, 11)
            sums += (min(stop, 10) - min(first, 10)) / equal, (reach[stop] - reach[first]) / equal
    hits, gain = (sums / moment.user.size).tolist()
    return {"HR@10": hits, "NDCG@10": gain}


_REQUEST = ("gap", "time", "asked")
"""What a request tells beside the history."""


def write(folder: Path, options: Options) -> dict[str, object]:
    """Write the log, the tables and the truth; returns the truth."""
    rng = np.random.default_rng([options.seed, 0])
    world = World(options, rng)
    log = generate(world, rng)
    folder.mkdir(parents=True, exist_ok=True)
    users, items = (
        pa.array([f"{name}_{number:05d}" for number in range(count)])
        for name, count in (("user", options.users), ("item", options.items))
    )
    columns = {
        "user_id": users.take(pa.array(log.user)),
        "item_id": items.take(pa.array(log.item)),
        "timestamp": log.time,
        "event": pa.array(EVENTS).take(pa.array(log.event)),
    }
    pq.write_table(pa.table(columns), folder / "log.parquet")
    words = [f"tag{number}" for number in range(TAGS)]
    of_items = {
        "item_id": items,
        "category": [f"category{value}" for value in world.category],
        "brand": [f"brand{value}" for value in world.brand],
        "tags": [[words[tag] for tag in np.flatnonzero(row)] for row in world.tags],
    }
    pq.write_table(pa.table(of_items), folder / "items.parquet")
    of_users = {"user_id": users, "country": [f"country{value}" for value in world.country], "age": world.age}
    pq.write_table(pa.table(of_users), folder / "users.parquet")
    truth: dict[str, object] = {"options": asdict(options), "rows": int(log.user.size)}
    truth["best"] = measure_truth(world, log)
    if options.structure in ("time", "events"):
        truth["best_without_request"] = measure_truth(world, log, knows_request=False)
    (folder / "truth.json").write_text(json.dumps(truth, indent=1))
    return truth


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, write the log, and print a summary."""
    options = parse(arguments)
    folder = Path(options.output)
    values = {name: value for name, value in vars(options).items() if name != "output"}
    truth = write(folder, Options(**values))
    print(
        f"wrote {folder}: {truth['rows']:,} events of {options.users:,} users over {options.items:,} items; the best "
        f"possible ranker has {truth['best']}; next: python -m recgpt_torchrec.prepare --input {folder}/log.parquet "
        f"--items {folder}/items.parquet --item_attributes category,brand,tags --users {folder}/users.parquet "
        "--user_attributes country,age:number --event_column event --min_count 1 --output DIR",
        file=sys.stderr,
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--structure", required=True, choices=list(ITEMS), help="what decides the next item")
    parser.add_argument("--output", required=True, help="folder of the log and its tables")
    parser.add_argument("--users", type=int, default=3000, help="number of users (default: 3000)")
    defaults = ", ".join(f"{items:,} for {structure}" for structure, items in ITEMS.items())
    parser.add_argument("--items", type=int, help=f"number of items, at least {FEWEST} (default: {defaults})")
    parser.add_argument("--mean_events", type=float, default=20, help="events per user, at least 5 (default: 20)")
    parser.add_argument("--follow", type=float, default=0.85, help="probability that the rule holds (default: 0.85)")
    parser.add_argument("--leave", type=float, default=0.3, help="probability of a long pause (default: 0.3)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (default: 0)")
    options = parser.parse_args(arguments)
    options.items = ITEMS[options.structure] if options.items is None else options.items
    for name, fewest in (("users", 1), ("items", FEWEST), ("mean_events", 5), ("seed", 0)):
        if not getattr(options, name) >= fewest:
            parser.error(f"--{name} {getattr(options, name)} must be at least {fewest}")
    if not (0 <= options.follow <= 1 and 0 <= options.leave <= 1):
        parser.error("--follow and --leave are probabilities, from 0 to 1")
    return options


if __name__ == "__main__":
    main()
