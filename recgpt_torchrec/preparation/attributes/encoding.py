"""Turns the values of a table into ids, and joins them to the users or items of the dataset."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import ibis
import ibis.expr.types as ir
import pyarrow.fs

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.inputs.records import DatasetAttribute
from recgpt_torchrec.data.inputs.spec import column_of
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.attributes.buckets import find_edges, fingerprint_edges, number_bucket
from recgpt_torchrec.preparation.attributes.columns import Taken
from recgpt_torchrec.preparation.attributes.loading import LoadedTable
from recgpt_torchrec.preparation.attributes.tables import TEXT
from recgpt_torchrec.preparation.attributes.vocabulary import assign_values, find_earlier, lineage_of, load_known
from recgpt_torchrec.preparation.engines.engine import Engine
from recgpt_torchrec.preparation.reading.dialect import shorten
from recgpt_torchrec.preparation.writing import fingerprint_parts
from recgpt_torchrec.storage.parts import Part

FREQUENT = 3
"""Number of values that the summary names."""
SAMPLE = 1000
"""Number of values that are looked at for what they seem to be."""
Write = Callable[[str, ir.Table, int], list[Part]]
"""Writes the parts of a folder: its name, the rows, and their number."""


@dataclass(kw_only=True)
class EncodedAttribute:
    """An attribute of the users or items of the dataset."""

    taken: Taken
    attribute: DatasetAttribute | None
    """As the manifest describes it; None: of a text."""
    present: int
    """Number of users or items with a value."""
    vocabulary: ir.Table | None = None
    """value_id, key, count; None: values are buckets, or texts."""
    frequent: list[dict[str, Any]] = field(default_factory=list)
    """`key` and `count` of the most frequent values."""
    ends: tuple[float, float] | None = None
    """Least and greatest number."""
    pairs: int = 0
    """Number of values of all users or items together."""
    most: int = 1
    """Maximum number of values of a user or item."""
    used: int = 0
    """Number of distinct values that a user or item has."""
    left_out: int = 0
    """Number of values that were left out because the earlier dataset lacks them (--new_keys leave_out)."""
    before: DatasetAttribute | None = None
    """The attribute of the earlier dataset, if it has it."""


@dataclass(kw_only=True)
class EncodedTable:
    """The attributes of the users or items of the dataset."""

    loaded: LoadedTable
    attributes: list[EncodedAttribute]
    columns: ir.Table
    """user_id or item_id, and a column for each attribute; those without any value are left out."""
    total: int
    """Number of users or items of the dataset."""
    with_row: int
    """Number of these with a row in the table."""

    def join(self, rows: ir.Table) -> ir.Table:
        """Add the attributes to the rows of users/ or items/."""
        id = f"{self.loaded.table.entity}_id"
        joined = rows.left_join(self.columns, id)
        columns = {}
        for each in self.attributes:
            name = _column(each.taken)
            empty = ibis.literal([], "array<int32>")
            columns[name] = joined[name] if each.attribute is None else ibis.coalesce(joined[name], empty)
        return joined.select(*rows.columns, **columns)


def _column(taken: Taken) -> str:
    return f"text_{taken.name}" if taken.kind == TEXT else column_of(taken.name)


def encode_table(
    engine: Engine, config: Prepare, loaded: LoadedTable, ids: ir.Table, total: int, earlier: Dataset | None
) -> EncodedTable:
    """Give the values of the users or items of the dataset ids.

    Args:
        engine: that holds the tables.
        config: options of the stage.
        loaded: the table.
        ids: `key`, and user_id or item_id of each of them.
        total: their number.
        earlier: the dataset that is extended.

    Raises:
        InputError: an attribute has no value at all, or is another kind than in the earlier dataset.
    """
    entity = loaded.table.entity
    id = f"{entity}_id"
    keyed = loaded.values.inner_join(ids, "key").select(id, "attribute", "value", "number").distinct()
    values = engine.save(f"{entity}_values", keyed)
    attributes, encoded = [], []
    for place in range(len(loaded.taken)):
        attribute, rows = _encode_attribute(engine, config, loaded, place, values, earlier)
        if attribute.attribute is not None:
            attribute.attribute.missing = total - attribute.present
        attributes.append(attribute)
        encoded.append(rows.select(id, "value_id", "value", attribute=ibis.literal(place, "int32")))
    if encoded:
        united = engine.save(f"{entity}_encoded", reduce(lambda one, other: one.union(other), encoded))
        columns = {
            _column(taken): united.value.max(where=united.attribute == place)
            if taken.kind == TEXT
            else united.value_id.collect(where=united.attribute == place)
            for place, taken in enumerate(loaded.taken)
        }
        lists = united.group_by(id).agg(**columns)
        lists = lists.mutate(**{_column(t): lists[_column(t)].sort() for t in loaded.taken if t.kind != TEXT})
    else:
        lists = ids.select(id)
    with_row = engine.count(ids.semi_join(loaded.keys, "key"))
    return EncodedTable(loaded=loaded, attributes=attributes, columns=lists, total=total, with_row=with_row)


def _encode_attribute(
    engine: Engine, config: Prepare, loaded: LoadedTable, place: int, values: ir.Table, earlier: Dataset | None
) -> tuple[EncodedAttribute, ir.Table]:
    """An attribute and its rows: user_id or item_id, value_id int32, value."""
    table, taken = loaded.table, loaded.taken[place]
    id = f"{table.entity}_id"
    values = values.filter(values.attribute == place)
    before = None if taken.kind == TEXT else find_earlier(earlier, table, taken)
    known, left_out = None, 0
    if earlier is not None and before is not None and before.kind == "category":
        known = load_known(engine, f"{table.entity}_known_values_{place}", earlier, before)
        if config.new_keys == "leave_out":
            given = engine.count(values)
            values = values.semi_join(known, values.value == known.key)
            left_out = given - engine.count(values)
    sizes = values.group_by(id).agg(n=values.count())
    found = engine.row(sizes.agg(present=sizes.count(), most=sizes.n.max(), pairs=sizes.n.sum()))
    present, most, pairs = int(found["present"]), int(found["most"] or 0), int(found["pairs"] or 0)
    none = ibis.null("string")
    if taken.kind == TEXT:
        rows = values.select(id, value_id=ibis.null("int32"), value=values.value)
        return EncodedAttribute(taken=taken, attribute=None, present=present), rows
    if not present and before is None:
        raise _explain_nothing(loaded, place)
    result = EncodedAttribute(
        taken=taken, attribute=None, present=present, pairs=pairs, most=most, left_out=left_out, before=before
    )
    result.attribute = DatasetAttribute(
        entity=table.entity,
        name=taken.name,
        kind="number" if taken.kind == "number" else "category",
        multiple=taken.kind == "list" or (before is not None and before.multiple),
        values=0,
        fingerprint="",
    )
    if taken.kind == "number":
        edges = find_edges(engine, values, config.attribute_buckets) if before is None else before.edges
        result.attribute.edges, result.attribute.values = edges, len(edges) + 1
        result.attribute.fingerprint = fingerprint_edges(table.entity, taken.name, edges)
        ends = engine.row(values.agg(low=values.number.min(), high=values.number.max()))
        result.ends = (ends["low"], ends["high"])
        return result, values.select(id, value_id=number_bucket(values.number, edges), value=none)
    vocabulary = assign_values(
        engine, f"{table.entity}_vocabulary_{place}", values, config.seed, known, before.values if before else 0
    )
    result.vocabulary = vocabulary
    result.attribute.values = engine.count(vocabulary)
    used = vocabulary.filter(vocabulary["count"] > 0)
    result.used = engine.count(used)
    ordered = used.order_by(ibis.desc("count"), "key")
    result.frequent = engine.rows(ordered.select("key", "count").limit(SAMPLE))
    numbered = vocabulary.select(of_value="key", id_of_value="value_id")
    joined = values.inner_join(numbered, values.value == numbered.of_value)
    return result, joined.select(id, value_id=joined.id_of_value.cast("int32"), value=none)


def _explain_nothing(loaded: LoadedTable, place: int) -> InputError:
    """The error for an attribute that no user or item of the dataset has."""
    table, name = loaded.table, loaded.taken[place].name
    unread = [each for each in loaded.problems if each["attribute"] == place]
    if loaded.taken[place].kind == "number" and unread:
        example = f", such as {shorten(unread[0]['example'], 40)!r}" if unread[0]["example"] else ""
        return InputError(
            f"{table.attributes_option} {name}: no {table.entity} of the dataset has a number in {loaded.names}; "
            f"{sum(each['n'] for each in unread):,} values cannot be read as one{example}. Pass {name}:category, or "
            "leave the column out"
        )
    return InputError(
        f"{table.attributes_option} {name}: no {table.entity} of the dataset has a value in {loaded.names}; leave the "
        "column out, or give a table with values"
    )


def write_vocabularies(tables: list[EncodedTable], fs: pyarrow.fs.FileSystem, root: str, write: Write) -> None:
    """Write the vocabularies of all attributes, and complete their description: parts, fingerprint, lineage.

    Args:
        tables: of users and items.
        fs: file system of `root`.
        root: folder of the dataset.
        write: writes parts below it.
    """
    for each in (each for table in tables for each in table.attributes):
        attribute = each.attribute
        if attribute is None or each.vocabulary is None:
            continue
        attribute.parts = write(f"attributes/{attribute.table}", each.vocabulary, attribute.values)
        named = {f"{attribute.entity}-{attribute.name}": attribute.parts}
        attribute.fingerprint = fingerprint_parts(fs, root, named)
        attribute.lineage = lineage_of(each.before, attribute.fingerprint)
