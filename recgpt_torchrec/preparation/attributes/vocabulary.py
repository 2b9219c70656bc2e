"""Ids of attribute values: dense, in an order that tells nothing, and kept from day to day."""

from collections.abc import Iterator
from functools import partial

import ibis.expr.types as ir
import pyarrow as pa

from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.inputs.records import DatasetAttribute, ValueVocabulary
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.attributes.columns import Taken
from recgpt_torchrec.preparation.attributes.tables import EntityTable
from recgpt_torchrec.preparation.engines.engine import Engine
from recgpt_torchrec.preparation.queries import assign_codes
from recgpt_torchrec.storage.parts import Part

KNOWN = pa.schema([("key", pa.string()), ("value_id", pa.int64())])
"""Schema of the vocabulary of an earlier dataset."""


def find_earlier(earlier: Dataset | None, table: EntityTable, taken: Taken) -> DatasetAttribute | None:
    """The attribute of the earlier dataset, if it has it.

    Raises:
        InputError: it was taken for something else.
    """
    attributes = [] if earlier is None else earlier.manifest.attributes
    found = next((each for each in attributes if (each.entity, each.name) == (table.entity, taken.name)), None)
    if earlier is None or found is None:
        return None
    kind = "category" if taken.kind == "list" else taken.kind
    if kind != found.kind:
        said = f"{taken.name}:{'list' if found.multiple else found.kind}"
        raise InputError(
            f"{table.attributes_option} {taken.name} is a {kind} now ({taken.words}), and a {found.kind} in "
            f"--vocabulary {earlier.path}; pass {said}, or prepare without --vocabulary"
        )
    return found


def assign_values(
    engine: Engine, name: str, values: ir.Table, seed: int, known: ir.Table | None, known_values: int
) -> ir.Table:
    """The vocabulary of an attribute, stored as the table `name`: value_id int64, key, count.

    Ids are in the order of the md5 of seed and value, like those of items: so they depend neither on the order of the
    table nor on the engine, and frequent values, whose rows are looked up most, are spread over the ranks that share a
    table by rows. Values of the earlier dataset keep their ids, and stay where nothing has them any more.

    Args:
        engine: that holds the values.
        name: of the table.
        values: `value` once for each user or item that has it.
        seed: of the order.
        known: the vocabulary of the earlier dataset, with the schema `KNOWN`; None: there is none.
        known_values: number of its values.
    """
    counts = values.group_by("value").agg(count=values.count()).rename(key="value")
    if known is None:
        ids = assign_codes(counts.select("key"), "value_id", seed)
    else:
        new = assign_codes(counts.select("key").anti_join(known, "key"), "value_id", seed)
        after = new.select("key", value_id=new.value_id + known_values)
        ids = known.select("key", "value_id").union(after)
    numbered = ids.left_join(counts, "key")
    return engine.save(name, numbered.select("value_id", "key", count=numbered["count"].fill_null(0)))


def load_known(engine: Engine, name: str, earlier: Dataset, attribute: DatasetAttribute) -> ir.Table:
    """The vocabulary of an earlier dataset's attribute, in the engine.

    Raises:
        InputError: it does not hold each id once.
    """
    if not attribute.parts:
        raise InputError(
            f"--vocabulary {earlier.path} lists no vocabulary of the {attribute.entity} attribute {attribute.name}; "
            "prepare it again"
        )
    known = engine.fill_from(name, attribute.parts, partial(_read_values, earlier), KNOWN)
    found = engine.row(
        known.agg(
            n=known.count(),
            ids=known.value_id.nunique(),
            keys=known.key.nunique(),
            low=known.value_id.min(),
            high=known.value_id.max(),
        )
    )
    if found != {"n": attribute.values, "ids": found["n"], "keys": found["n"], "low": 0, "high": attribute.values - 1}:
        raise InputError(
            f"--vocabulary {earlier.path}: the vocabulary of the {attribute.entity} attribute {attribute.name} is "
            f"damaged: it has {found['keys']:,} values with {found['ids']:,} ids from {found['low']} to "
            f"{found['high']}, the manifest promises {attribute.values:,}; restore it, or prepare it again"
        )
    return known


def _read_values(dataset: Dataset, part: Part) -> Iterator[pa.Table]:
    with dataset.read_part(part) as file:
        for batch in file.iter_batches(columns=["key", "value_id"]):
            yield pa.Table.from_batches([batch]).select(["key", "value_id"]).cast(KNOWN)


def lineage_of(before: DatasetAttribute | None, fingerprint: str) -> list[ValueVocabulary]:
    """The vocabularies that the one with this fingerprint extends, oldest first; `before` has the newest.

    If nothing was added the vocabulary is the same, and does not extend itself.
    """
    if before is None:
        return []
    own = ValueVocabulary(fingerprint=before.fingerprint, values=before.values)
    return [each for each in (*before.lineage, own) if each.fingerprint != fingerprint]
