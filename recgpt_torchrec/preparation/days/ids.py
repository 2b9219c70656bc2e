"""The ids of a day's keys: the only place where a day's users and items are numbered."""

from dataclasses import dataclass, field

import ibis.expr.types as ir
import pyarrow as pa

from recgpt_torchrec.data.ragged import Int64
from recgpt_torchrec.preparation import queries
from recgpt_torchrec.preparation.engines.duckdb_engine import DuckDBEngine
from recgpt_torchrec.preparation.engines.engine import Engine
from recgpt_torchrec.preparation.ids.assigning import Ids
from recgpt_torchrec.preparation.writing import Fingerprint


@dataclass
class DaySlots:
    """What a day's ids are where they are slots of a table of fixed size."""

    ids: Ids
    named: ir.Table
    """The id and `key` of every slot: of the key that names it."""
    reassigned: Int64
    """[n] slots, ascending, that had another key the day before."""
    keys: ir.Table | None = None
    """Where keys share slots, every key of all days: its number, id, `key`, and `count` of interactions."""


@dataclass(frozen=True)
class DayIds:
    """The ids of a day's keys, in tables of the engine: `key`, and `user_id` or `item_id`."""

    of_day: ir.Table
    """Every key of the day that has an id: none, if it was only ever shown, or has no slot."""
    new: ir.Table
    """The keys that got an id of their own in this day."""
    new_count: int
    count: int = field(kw_only=True)
    """Number of ids after the day."""
    slots: DaySlots | None = None
    """None: a vocabulary."""


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
    new_count = engine.count(new)
    return DayIds(engine.save(f"{name}_of_day", of_day), new, new_count, count=known_count + new_count)


def fingerprint_keys(engine: DuckDBEngine, before: str, users: DayIds, items: DayIds) -> str:
    """The fingerprint of what ids mean after a day: of that before it, and of the keys that got an id, in its order.

    Args:
        engine: that holds the tables.
        before: fingerprint of the vocabulary of the day before.
        users, items: of the day.
    """
    fingerprint = Fingerprint()
    fingerprint.add(pa.chunked_array([[before]]))
    for name, id, ids in (("items", "item_id", items), ("users", "user_id", users)):
        fingerprint.add(pa.chunked_array([[name]]))
        for batch in engine.batches(ids.new.order_by(id).select("key", id)):
            fingerprint.add(pa.chunked_array([batch.column(0)]))
            if ids.slots is not None:  # not only ids after all others
                fingerprint.add(pa.chunked_array([batch.column(1).cast(pa.string())]))
    return fingerprint.hex()
