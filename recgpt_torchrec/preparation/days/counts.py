"""The counts of all items after a day: those of the day before, and the day's."""

from collections.abc import Iterator
from functools import partial

import ibis
import ibis.expr.types as ir
import pyarrow as pa

from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.preparation.days.histories import NEW
from recgpt_torchrec.preparation.days.ids import DayIds, DaySlots
from recgpt_torchrec.preparation.engines.engine import Engine
from recgpt_torchrec.storage.parts import Part

COUNTS = pa.schema([("item_id", pa.int64()), ("key", pa.string()), ("count", pa.int64()), ("train_count", pa.int64())])


def count_items(
    engine: Engine, before: Dataset | None, items: DayIds, interacted: ir.Table, targets: ir.Table
) -> ir.Table:
    """All items with their counts after the day: rows of items/, without attributes.

    Args:
        engine: that holds the tables.
        before: the day before; None: it is the first.
        items: ids of the day.
        interacted: the day's entries that are interactions.
        targets: those of them that are trained on after the day, and were not before.
    """
    new = interacted.filter(interacted.new == NEW)
    of_day = new.group_by("item_id").agg(more=new.count()).rename(of_item="item_id")
    trained = targets.group_by("item_id").agg(more_trained=targets.count()).rename(trained_item="item_id")
    zero = ibis.literal(0, "int64")
    rows = items.new.select("item_id", "key", count=zero, train_count=zero)
    if before is not None:
        read = partial(_read_counts, before)
        known = engine.fill_from("known_counts", before.manifest.item_parts, read, COUNTS)
        rows = known.union(rows) if items.slots is None else _count_rows(known, items.slots)
    joined = rows.left_join(of_day, rows.item_id == of_day.of_item)
    joined = joined.left_join(trained, joined.item_id == trained.trained_item)
    return joined.select(
        "item_id",
        "key",
        count=joined["count"] + joined.more.fill_null(0),
        train_count=joined.train_count + joined.more_trained.fill_null(0),
    )


def _count_rows(known: ir.Table, slots: DaySlots) -> ir.Table:
    """All slots with their counts before the day: 0 of one that another key has now."""
    rows, earlier = slots.named, known.rename(of_id="item_id", of_key="key")
    same = [rows.item_id == earlier.of_id]
    if slots.keys is None:  # where keys share a slot it may be named by another one, and is the same
        same.append(rows.key == earlier.of_key)
    joined = rows.left_join(earlier, same)
    counts = {name: joined[name].fill_null(0) for name in ("count", "train_count")}
    return joined.select("item_id", "key", **counts)


def _read_counts(dataset: Dataset, part: Part) -> Iterator[pa.Table]:
    with dataset.read_part(part) as file:
        for batch in file.iter_batches(columns=COUNTS.names):
            yield pa.Table.from_batches([batch]).select(COUNTS.names).cast(COUNTS)
