"""The ids of a day's keys where they are slots of a table of fixed size, assigned as `prepare --vocabulary` does."""

import ibis.expr.types as ir
import numpy as np
import pyarrow as pa

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.ids.records import Entity
from recgpt_torchrec.preparation import queries
from recgpt_torchrec.preparation.days.ids import DayIds, DaySlots
from recgpt_torchrec.preparation.engines.duckdb_engine import DuckDBEngine
from recgpt_torchrec.preparation.ids.assigning import assign_ids
from recgpt_torchrec.preparation.writing import NUMBER

SAME = ["user", "item", "time", "fraction"]
"""Columns in which rows are repeated."""


def assign_day_slots(
    engine: DuckDBEngine,
    config: Prepare,
    entity: Entity,
    *,
    clicks: ir.Table,
    others: ir.Table,
    known: ir.Table | None,
    catalogue: ir.Table | None,
    before: Dataset | None,
) -> DayIds:
    """Give a day's keys slots of the table of users or items.

    The policy counts the interactions that are newer than all of the days before; without times, all of the day.

    Args:
        engine: that holds the tables.
        config: of the stage.
        entity: `user` or `item`.
        clicks: the day's interactions.
        others: column `key`, of all rows of the day.
        known: `key`, the id and, where keys share ids, `before` of all keys with a slot; None: it is the first day.
        catalogue: column `key`: further keys that get a slot; None: there are none.
        before: the day before.
    """
    id = f"{entity}_id"
    counted = clicks.select(*SAME).distinct() if config.duplicates == "drop" else clicks
    keys = clicks.select(key=clicks[entity])
    keys = engine.save(f"{id}_keys", (keys if catalogue is None else keys.union(catalogue.select("key"))).distinct())
    every = keys if known is None else keys.union(known.select("key")).distinct()
    codes = engine.save(f"{entity}_codes", queries.assign_codes(every, entity, config.seed))
    coded = None
    if known is not None:
        names = [name for name in known.columns if name != "key"]
        coded = engine.save(f"known_{entity}_codes", known.inner_join(codes, "key").select(entity, *names))
    of_key = codes.select(of_key="key", code=entity)
    pairs = counted.inner_join(of_key, counted[entity] == of_key.of_key)
    pairs = engine.save(f"{entity}_pairs", pairs.select("time", **{entity: pairs.code}))
    shared = config.ids == "hash"
    used = 0 if before is None else getattr(before.manifest, f"{entity}s")
    version = 0 if before is None else len(before.manifest.lineage) + 1
    ids = assign_ids(
        engine,
        config,
        entity,
        kept=keys.inner_join(codes, "key").select(entity),
        codes=codes,
        known=None if coded is None else coded.select(entity, id),
        pairs=pairs,
        extended=before,
        counted=coded if shared else None,
    )
    assert ids.slots is not None
    named = engine.save(f"{id}_named", ids.named.inner_join(codes, entity).select(id, "key"))
    since = ids.slots.columns.get("since", np.zeros(ids.count, np.int64))
    (reassigned,) = np.nonzero(since == version) if version else np.nonzero(since < 0)
    fresh = np.concatenate([reassigned, np.arange(used, ids.count)])
    schema = pa.schema([(f"of_{id}", pa.int64())])
    given = engine.fill(f"{id}_given", iter([pa.table([pa.array(fresh)], schema=schema)]), schema)
    new = engine.save(f"{id}_new", named.inner_join(given, named[id] == given[f"of_{id}"]).select("key", id))
    with_slot = ids.codes.inner_join(codes, entity).select("key", id)
    of_day = engine.save(f"{id}_of_day", with_slot.semi_join(others.union(keys), "key"))
    slots = DaySlots(ids=ids, named=named, reassigned=reassigned)
    if shared:
        counts = pairs.group_by(entity).agg(more=pairs.count())
        listed = ids.codes.inner_join(codes, entity).left_join(counts, entity).select(entity, id, "key", "more")
        listed = listed.mutate(count=listed.more.fill_null(0))
        if coded is not None:
            joined = listed.left_join(coded.select(entity, "before"), entity).select(*listed.columns, "before")
            listed = joined.mutate(count=joined["count"] + joined.before.fill_null(0))
        bucketed = listed.mutate(bucket=listed[id] // queries.BUCKET_CODES)
        numbered = queries.number_rows(bucketed, [id, entity], NUMBER)
        columns = numbered.select(NUMBER, id, "key", count=numbered["count"].cast("int64"))
        slots.keys = engine.save(f"{entity}_listed", columns)
    return DayIds(of_day, new, engine.count(new), count=ids.count, slots=slots)
