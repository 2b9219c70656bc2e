"""What `prepare` asks of its engine between reading and writing: Ibis expressions, for any engine.

Codes number the keys that are in the log; ids number the users and items that are kept.
"""

import ibis
import ibis.expr.types as ir

from recgpt_torchrec.data.segments import EXPOSED, INTERACTED
from recgpt_torchrec.data.split import is_trained_on
from recgpt_torchrec.preparation.earlier import Known
from recgpt_torchrec.preparation.engine import DuckDBEngine

IN_TIME = ["time", "fraction", "order"]
"""What orders a user's interactions: time, and place in the input where times are equal."""


def interacted(events: ir.Table) -> ir.Table:
    """The events that are interactions."""
    return events.filter(events.segment == INTERACTED)


def shown(events: ir.Table) -> ir.Table:
    """The events that were shown and not clicked."""
    return events.filter(events.segment == EXPOSED)


def vocabulary(engine: DuckDBEngine, log: ir.Table, seed: int, known: Known | None = None) -> tuple[ir.Table, ir.Table]:
    """A code for every user and item of the log, and every known one: columns `key`, and `user` or `item`.

    Codes follow the md5 of seed and key. So their order is random, but the same for the same seed and keys, whatever
    the order of the log, its split into files, or the engine; and it does not tell when an item first appeared, which
    would give away held-out items.
    """
    user_keys, item_keys = log.select(key=log.user), log.select(key=log.item)
    if known is not None:
        user_keys, item_keys = user_keys.union(known.users.select("key")), item_keys.union(known.items.select("key"))
    users = engine.save("user_codes", codes(user_keys.distinct(), "user", seed))
    items = engine.save("item_codes", codes(item_keys.distinct(), "item", seed))
    return users, items


def codes(keys: ir.Table, name: str, seed: int) -> ir.Table:
    """Number distinct keys (column `key`) from 0 on, in the order of the md5 of seed and key."""
    hashed = keys.mutate(place=(ibis.literal(f"{seed}:") + keys.key).hexdigest("md5"))
    place = ibis.row_number().over(order_by=[hashed.place, hashed.key]).cast("int64")
    return hashed.select("key", **{name: place})


def encoded(log: ir.Table, users: ir.Table, items: ir.Table) -> ir.Table:
    """The log with codes in place of keys; without rows whose user or item has none."""
    values = [name for name in log.columns if name not in ("user", "item")]
    coded = users.select(user_key=users.key, user_code=users.user)
    with_users = log.inner_join(coded, log.user == coded.user_key)
    coded_items = items.select(item_key=items.key, item_code=items.item)
    both = with_users.inner_join(coded_items, with_users.item == coded_items.item_key)
    return both.select(*values, user=both.user_code, item=both.item_code)


def without_repeats(events: ir.Table) -> ir.Table:
    """The first of each user, item and time; an interaction, if it is among them."""
    same = ibis.window(group_by=["user", "item", "time", "fraction"], order_by=["segment", "order"])
    numbered = events.mutate(repeat=ibis.row_number().over(same))
    return numbered.filter(numbered.repeat == 0).drop("repeat")


def between(events: ir.Table) -> ir.Table:
    """Interactions, and what was shown between the first and the last of each user.

    What was shown earlier or later stands between no two items: it is no prompt, and the later is the held-out item's
    future.
    """
    clicks = (events.segment == INTERACTED).cast("int64")
    placed = events.mutate(
        before=clicks.sum().over(ibis.cumulative_window(group_by="user_id", order_by=IN_TIME)),
        clicks=clicks.sum().over(ibis.window(group_by="user_id")),
    )
    inside = (placed.before > 0) & (placed.before < placed.clicks)
    return placed.filter((placed.segment == INTERACTED) | inside).drop("before", "clicks")


def dense_ids(kept: ir.Table, code: str, name: str, known: ir.Table | None = None) -> ir.Table:
    """Ids from 0 on for the kept codes, in their order: columns `code` and `name`.

    Known ones (the same columns) keep their ids, kept or not; the others come after. So ids tell nothing of the time
    within what is added at once, but that it was added later than what was known.
    """
    if known is None:
        return kept.select(code, **{name: ibis.row_number().over(order_by=kept[code]).cast("int64")})
    new = kept.anti_join(known, code)
    place = ibis.row_number().over(order_by=new[code]) + known.count().as_scalar()
    return known.select(code, name).union(new.select(code, **{name: place.cast("int64")}))


def placed_from_end(clicks: ir.Table) -> ir.Table:
    """Interactions with `from_end`, how many of the same user come after, and `length`, how many the user has."""
    backwards = ibis.window(group_by="user_id", order_by=[ibis.desc(column) for column in IN_TIME])
    length = clicks.count().over(ibis.window(group_by="user_id"))
    return clicks.mutate(from_end=ibis.row_number().over(backwards), length=length)


def item_table(kept: ir.Table, item_ids: ir.Table, items: ir.Table) -> ir.Table:
    """Rows of `items/`: item_id, key, count, and train_count, that of the training part (`data.split`).

    Known items without interactions count 0.
    """
    placed = placed_from_end(kept)
    trains = is_trained_on(placed.from_end, placed.length)
    counts = placed.group_by("item_id").agg(count=placed.count(), train_count=trains.cast("int64").sum())
    named = item_ids.inner_join(items, "item").select("item_id", "key")
    counted = named.left_join(counts, "item_id")
    found = {column: counted[column].fill_null(0) for column in ("count", "train_count")}
    return counted.select("item_id", "key", **found).order_by("item_id")


def user_table(user_ids: ir.Table, users: ir.Table) -> ir.Table:
    """Rows of `users/`: user_id, key."""
    return user_ids.inner_join(users, "user").select("user_id", "key").order_by("user_id")
