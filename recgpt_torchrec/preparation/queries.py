"""The queries of `prepare` between reading and writing: Ibis expressions, for any engine.

Codes number the keys in the log; ids number the users and items that are kept.
"""

from typing import TYPE_CHECKING

import ibis
import ibis.expr.types as ir

from recgpt_torchrec.data.segments import DISLIKED, INTERACTED, SKIPPED
from recgpt_torchrec.data.split import EVALUATION, HoldOut, is_held_out
from recgpt_torchrec.preparation.engines.engine import Engine

if TYPE_CHECKING:
    from recgpt_torchrec.preparation.earlier import Known

IN_TIME = ["time", "fraction", "order"]
"""Order of a user's interactions: by time, and by their order in the input where times are equal."""
LIST_ORDER = "list_order"
"""Column of events: their order in the list in which they were shown, which decides before that in the input."""
BUCKET_DIGITS = 3
"""First hex digits of the md5 that make a bucket: of a billion keys, 4,096 buckets hold a quarter of a million each."""
BUCKET_CODES = 2**20
"""Number of codes that are sorted together."""
PART = "part"
"""Column of events: 0 training, 1 validation, 2 test; where it is there, a user's events are in the order of parts."""


def order_of(events: ir.Table) -> list[str]:
    """The columns that put a user's events in order."""
    columns = IN_TIME if LIST_ORDER not in events.columns else [*IN_TIME[:-1], LIST_ORDER, IN_TIME[-1]]
    return [PART, *columns] if PART in events.columns else columns


def select_interacted(events: ir.Table) -> ir.Table:
    """The events that are interactions."""
    return events.filter(events.segment == INTERACTED)


def select_shown(events: ir.Table) -> ir.Table:
    """The events that were shown and not clicked, liked or not."""
    return events.filter(events.segment != INTERACTED)


def build_codes(
    engine: Engine,
    log: ir.Table,
    seed: int,
    known: "Known | None" = None,
    new_keys: str = "add",
    catalogue: ir.Table | None = None,
) -> tuple[ir.Table, ir.Table]:
    """A code for every user and item of the log, and every known one: columns `key`, and `user` or `item`.

    With `new_keys` leave_out only known ones have a code. A `catalogue` adds items, by their `key`.

    Codes follow the md5 of seed and key. So their order is random, and depends only on seed and keys: not on the order
    of the log, its files or the engine. It does not tell when an item first appeared, which would give away held-out
    items.
    """
    user_keys, item_keys = log.select(key=log.user), log.select(key=log.item)
    if known is not None and new_keys == "leave_out":
        user_keys, item_keys = known.users.select("key"), known.items.select("key")
    elif known is not None:
        user_keys, item_keys = user_keys.union(known.users.select("key")), item_keys.union(known.items.select("key"))
    if catalogue is not None:
        item_keys = item_keys.union(catalogue.select("key"))
    users = engine.save("user_codes", assign_codes(user_keys.distinct(), "user", seed))
    items = engine.save("item_codes", assign_codes(item_keys.distinct(), "item", seed))
    return users, items


def assign_codes(keys: ir.Table, name: str, seed: int) -> ir.Table:
    """Number distinct keys (column `key`) from 0 on, in the order of the md5 of seed and key."""
    hashed = keys.mutate(place=(ibis.literal(f"{seed}:") + keys.key).hexdigest("md5"))
    bucketed = hashed.mutate(bucket=hashed.place.left(BUCKET_DIGITS))
    return number_rows(bucketed, ["place", "key"], name).select("key", name)


def number_rows(table: ir.Table, order: list[str], name: str) -> ir.Table:
    """Add a column `name` int64: the number of each row, from 0 on, in the order of `bucket` and then of `order`.

    Only rows of one bucket are sorted together, so no worker of an engine has to hold or sort them all; what is summed
    over all is one row per bucket.
    """
    sizes = table.group_by("bucket").agg(size=table.count())
    ends = sizes.size.sum().over(ibis.cumulative_window(order_by=sizes.bucket))
    starts = sizes.select(of_bucket="bucket", start=ends - sizes.size)
    joined = table.inner_join(starts, table.bucket == starts.of_bucket)
    place = ibis.row_number().over(ibis.window(group_by=joined.bucket, order_by=[joined[column] for column in order]))
    return joined.select(*table.columns, **{name: (place + joined.start).cast("int64")})


def add_catalogue(kept: ir.Table, items: ir.Table, catalogue: ir.Table) -> ir.Table:
    """The codes of kept items (column `item`) and of all of a catalogue (column `key`), given all codes by key."""
    return kept.select("item").union(items.semi_join(catalogue, "key").select("item")).distinct()


def encode_keys(log: ir.Table, users: ir.Table, items: ir.Table) -> ir.Table:
    """Replace keys in the log by codes, and drop rows whose user or item has none."""
    values = [name for name in log.columns if name not in ("user", "item")]
    coded = users.select(user_key=users.key, user_code=users.user)
    with_users = log.inner_join(coded, log.user == coded.user_key)
    coded_items = items.select(item_key=items.key, item_code=items.item)
    both = with_users.inner_join(coded_items, with_users.item == coded_items.item_key)
    return both.select(*values, user=both.user_code, item=both.item_code)


def drop_repeats(events: ir.Table) -> ir.Table:
    """Keep the first event of each user, item and time: an interaction before a dislike, a skip, and one only shown."""
    kinds = [(events.segment == segment, rank) for rank, segment in enumerate((INTERACTED, DISLIKED, SKIPPED))]
    ranked = events.mutate(rank=ibis.cases(*kinds, else_=3))
    same = ibis.window(group_by=["user", "item", "time", "fraction"], order_by=["rank", "order"])
    numbered = ranked.mutate(repeat=ibis.row_number().over(same))
    return numbered.filter(numbered.repeat == 0).drop("repeat", "rank")


def collapse_repeats(events: ir.Table) -> ir.Table:
    """Keep the first of a user's consecutive interactions with the same item; shown events stay, and part none."""
    place = ibis.window(group_by=["user", "segment"], order_by=order_of(events))
    numbered = events.mutate(before=events.item.lag().over(place))
    repeats = (numbered.segment == INTERACTED) & (numbered.before == numbered.item)
    return numbered.filter(~repeats.fill_null(False)).drop("before")


def drop_outer_shown(events: ir.Table) -> ir.Table:
    """Keep interactions, and what was shown after the first of each user.

    What was shown before it follows no interaction, so it is no prompt. What was shown after the last one is known at
    the next request; which of it a split reads, `data.reading.feedback` decides.
    """
    clicks = (events.segment == INTERACTED).cast("int64")
    so_far = ibis.cumulative_window(group_by="user_id", order_by=order_of(events))
    placed = events.mutate(before=clicks.sum().over(so_far))
    return placed.filter(placed.before > 0).drop("before")


def assign_ids(kept: ir.Table, code: str, name: str, known: ir.Table | None = None) -> ir.Table:
    """Assign ids from 0 on to the kept codes, in their order: columns `code` and `name`.

    Known codes (the same columns) keep their ids, even if they are not in `kept`; the others come after. So ids tell
    nothing of time, but that new users and items were added later than known ones.
    """
    new = kept if known is None else kept.anti_join(known, code)
    numbered = number_rows(new.mutate(bucket=new[code] // BUCKET_CODES), [code], name).select(code, name)
    if known is None:
        return numbered
    after = (numbered[name] + known.count().as_scalar()).cast("int64")
    return known.select(code, name).union(numbered.select(code, **{name: after}))


def place_interactions(clicks: ir.Table, hold_out: HoldOut) -> ir.Table:
    """The place of each interaction in the split.

    Args:
        clicks: `user_id`, `item_id` and the columns of `order_of`; also `trained` where a dataset is extended.
        hold_out: with the values of `data.split.STORED` the column `part` is there already.

    Returns:
        user_id, item_id, part int8 (0 training, 1 validation, 2 test), first bool (the first of its user), and trained
        where it is there.
    """
    order = order_of(clicks)
    if hold_out == "last":
        backwards = ibis.window(group_by="user_id", order_by=[ibis.desc(column) for column in order])
        from_end = ibis.row_number().over(backwards)
        length = clicks.count().over(ibis.window(group_by="user_id"))
        placed = clicks.mutate(from_end=from_end, length=length)
        held_out = (is_held_out(placed.from_end, placed.length, split).cast("int8") for split in EVALUATION)
        part, first = sum(held_out), placed.from_end == placed.length - 1
    else:
        placed = clicks.mutate(place=ibis.row_number().over(ibis.window(group_by="user_id", order_by=order)))
        part, first = placed.part if PART in clicks.columns else ibis.literal(0), placed.place == 0
    kept = ["trained"] if "trained" in clicks.columns else []
    return placed.select("user_id", "item_id", *kept, part=part.cast("int8"), first=first)


def mark_before(entries: ir.Table, starts: dict[str, str]) -> ir.Table:
    """Add boolean columns, the values of `starts`: whether an entry is an interaction before a part, in the order of
    parts. The number of those of a user is where the part starts."""
    clicked = entries.segment == INTERACTED
    return entries.mutate(**{name: clicked & (entries.part < number) for number, name in enumerate(starts.values(), 1)})


def count_items(placed: ir.Table) -> ir.Table:
    """Per item: count, train_count (in the training part), and targets (those of them that are not the first of a user,
    so have a history)."""
    trains = placed.part == 0
    targets = trains & ~placed["first"]
    counts = {"train_count": trains, "targets": targets}
    sums = {name: condition.cast("int64").sum() for name, condition in counts.items()}
    return placed.group_by("item_id").agg(count=placed.count(), **sums)


def count_parts(placed: ir.Table) -> ir.Table:
    """Per user: length, validation_start and test_start, see `data.split`."""
    starts = {
        f"{split}_start": (placed.part < number).cast("int64").sum() for number, split in enumerate(EVALUATION, 1)
    }
    return placed.group_by("user_id").agg(length=placed.count(), **starts)


def summarize_parts(users: ir.Table) -> ir.Table:
    """One row: interactions in each part, users with a target in each held-out part, and interactions in no part.

    In no part are those that are neither trained on nor a target nor in the history of one: later ones of the last part
    in which a user has a target, or all held-out ones of a user without a target.
    """
    v, t, n = users.validation_start, users.test_start, users.length
    has_validation, has_test = (v > 0) & (v < t), (t > 0) & (t < n)
    used = ibis.cases((has_test, t + 1), (has_validation, v + 1), else_=v)
    return users.agg(
        training=v.sum(),
        validation=(t - v).sum(),
        test=(n - t).sum(),
        validation_users=has_validation.cast("int64").sum(),
        test_users=has_test.cast("int64").sum(),
        unused=(n - used).sum(),
    )


def name_items(item_ids: ir.Table, items: ir.Table) -> ir.Table:
    """item_id, key."""
    return item_ids.inner_join(items, "item").select("item_id", "key")


def item_table(item_ids: ir.Table, items: ir.Table, counts: ir.Table) -> ir.Table:
    """Rows of `items/`: item_id, key, count, and train_count, the count in the training part (`data.split`).

    The counts of a known item without interactions are 0.
    """
    counted = name_items(item_ids, items).left_join(counts, "item_id")
    filled = {column: counted[column].fill_null(0) for column in ("count", "train_count")}
    return counted.select("item_id", "key", **filled)


def user_table(user_ids: ir.Table, users: ir.Table) -> ir.Table:
    """Rows of `users/`: user_id, key."""
    return user_ids.inner_join(users, "user").select("user_id", "key")
