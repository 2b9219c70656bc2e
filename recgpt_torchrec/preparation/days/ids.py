"""The ids of a day's keys: the only place where a day's users and items are numbered."""

from dataclasses import dataclass

import ibis.expr.types as ir

from recgpt_torchrec.preparation import queries
from recgpt_torchrec.preparation.engines.engine import Engine


@dataclass(frozen=True)
class DayIds:
    """The ids of a day's keys, in tables of the engine: `key`, and `user_id` or `item_id`."""

    of_day: ir.Table
    """Every key of the day, but for those that were only ever shown."""
    new: ir.Table
    """The keys that no earlier day has."""
    new_count: int


def assign_day_ids(
    engine: Engine, name: str, keys: ir.Table, others: ir.Table, known: ir.Table | None, known_count: int, seed: int
) -> DayIds:
    """Number a day's keys: known ones keep their ids, new ones come after, in the order of the md5 of seed and key.

    Args:
        engine: that holds the tables.
        name: `user_id` or `item_id`.
        keys: column `key`, of the day's interactions.
        others: column `key`, of all rows of the day; those of rows that were only shown get no new ids.
        known: `key` and `name` of all keys of earlier days; None: there are none.
        known_count: number of these.
        seed: of the order of new keys.

    Returns:
        The `DayIds`.
    """
    distinct = engine.save(f"{name}_keys", keys.distinct())
    fresh = distinct if known is None else distinct.anti_join(known, "key")
    numbered = queries.assign_codes(fresh, name, seed)
    new = engine.save(f"{name}_new", numbered.select("key", **{name: (numbered[name] + known_count).cast("int64")}))
    of_day = new if known is None else new.union(known.semi_join(others, "key").select("key", name))
    return DayIds(engine.save(f"{name}_of_day", of_day), new, engine.count(new))
