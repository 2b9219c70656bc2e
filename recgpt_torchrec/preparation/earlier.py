"""What a dataset that is extended knows: the ids of its keys, and how far each user's history was trained on.

The earlier dataset is read once, a row group at a time, into tables of the engine; the raw log it was made from is not
needed, nor what it was made with.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import ibis
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa

from recgpt_torchrec.data.dataset import Dataset, Vocabulary, histories_fingerprint
from recgpt_torchrec.data.ragged import Ragged
from recgpt_torchrec.data.reader import Reader
from recgpt_torchrec.data.segments import INTERACTED, Interacted
from recgpt_torchrec.data.split import cut
from recgpt_torchrec.data.windows import row_groups
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.engine import DuckDBEngine
from recgpt_torchrec.storage import filesystem
from recgpt_torchrec.storage.parts import Part

TRAINED = pa.schema([("user_id", pa.int64()), ("trained", pa.int64()), ("until", pa.int64()), ("at_until", pa.int64())])
"""What `trained_parts` gives: a user, the interactions of their training part, the time of the newest of these (null in
a dataset without times), and how many of these have just that time."""


def open_earlier(path: str, output: str) -> Dataset:
    """The dataset that `path` names, to be extended into `output`.

    Raises:
        InputError: it is no finished dataset, or would be written over.
    """
    if filesystem(path)[1] == filesystem(output)[1]:
        raise InputError(
            f"--vocabulary {path} is the output folder; a dataset is extended into a new folder, because runs on the "
            "old one still need it: name another --output"
        )
    try:
        return Dataset.open(path)
    except InputError as error:
        raise InputError(f"--vocabulary: {error}") from None


def lineage_of(earlier: Dataset, vocabulary: str) -> list[Vocabulary]:
    """The vocabularies that one with the fingerprint `vocabulary`, made by extending `earlier`, extends; oldest first.

    A vocabulary to which nothing was added is the same, and stands there once.
    """
    manifest = earlier.manifest
    own = Vocabulary(fingerprint=manifest.vocabulary, users=manifest.users, items=manifest.items)
    return [each for each in (*manifest.lineage, own) if each.fingerprint != vocabulary]


def record_of(earlier: Dataset) -> dict[str, str]:
    """What tells whether a dataset was made by extending this one, wherever it lies."""
    return {"vocabulary": earlier.manifest.vocabulary, "histories": histories_fingerprint(earlier)}


@dataclass(frozen=True)
class Known:
    """Tables of the engine with what the earlier dataset knows."""

    dataset: Dataset
    users: ir.Table
    """`key` and `user_id` of every user."""
    items: ir.Table
    """`key` and `item_id` of every item."""

    @classmethod
    def load(cls, engine: DuckDBEngine, dataset: Dataset) -> "Known":
        """Read both vocabularies into the engine."""
        manifest = dataset.manifest
        return cls(
            dataset,
            engine.fill("known_users", _keys(dataset, manifest.user_parts, "user_id"), _keys_schema("user_id")),
            engine.fill("known_items", _keys(dataset, manifest.item_parts, "item_id"), _keys_schema("item_id")),
        )

    def coded(self, engine: DuckDBEngine, users: ir.Table, items: ir.Table) -> "KnownCodes":
        """The ids by code, given the codes by key."""
        of_users = self.users.inner_join(users, "key").select("user", "user_id")
        of_items = self.items.inner_join(items, "key").select("item", "item_id")
        return KnownCodes(engine.save("known_user_codes", of_users), engine.save("known_item_codes", of_items))


@dataclass(frozen=True)
class KnownCodes:
    """Tables of the engine: `user` and `user_id`, `item` and `item_id` of what the earlier dataset knows."""

    users: ir.Table
    items: ir.Table


def trained_parts(dataset: Dataset) -> Iterator[pa.Table]:
    """How far each user's history is trained on, as `TRAINED` has it; a table a row group."""
    groups = row_groups(dataset)
    reader = Reader(dataset, times=True)
    for group in groups:
        table = reader.read(group).table
        items = Ragged.from_arrow(table["item_ids"])
        segments = Ragged.from_arrow(table["segment_ids"]).values if "segment_ids" in table.schema.names else None
        real = Interacted.among(items.offsets, segments)
        _, start, stop, _ = cut(real.offsets, "training")
        until = at_until = None
        if "timestamps" in table.schema.names:
            times = Ragged(Ragged.from_arrow(table["timestamps"]).values[real.places], real.offsets)
            some = stop > start
            newest = np.zeros(items.rows, dtype=np.int64)
            newest[some] = times.values[stop[some] - 1]
            trained = times.cut(start, stop)
            equal = trained.values == np.repeat(newest, stop - start)
            at_until = trained.keep(equal).lengths
            until = pa.array(newest, mask=~some)
        columns = [table["user_id"].combine_chunks(), pa.array(stop - start), until, at_until]
        absent = pa.nulls(items.rows, pa.int64())
        yield pa.table([absent if column is None else pa.array(column) for column in columns], schema=TRAINED)


def mark_trained(entries: ir.Table, trained: ir.Table, by_time: bool) -> ir.Table:
    """The entries with a column `trained` int8: 1 for interactions of the earlier dataset's training part.

    By time, an entry was if it is not newer than the newest there (of entries at that very time, as many as were);
    without times, if it is among as many first ones.

    Args:
        entries: `user_id`, `time`, `fraction`, `order` and `segment` beside other columns.
        trained: as `TRAINED` has it.
        by_time: whether both have times.
    """
    alike = ["user_id", "segment", *(["time"] if by_time else [])]
    place = ibis.row_number().over(ibis.window(group_by=alike, order_by=["time", "fraction", "order"]))
    placed = entries.mutate(place=place)
    ends = trained.rename(of_user="user_id", count="trained")
    joined = placed.left_join(ends, placed.user_id == ends.of_user)
    if by_time:
        before = (joined.time < joined.until) | ((joined.time == joined.until) & (joined.place < joined.at_until))
    else:
        before = joined.place < joined["count"]
    known = ((joined.segment == INTERACTED) & before).fill_null(False).cast("int8")
    return joined.select(*entries.columns, trained=known)


def _keys(dataset: Dataset, parts: list[Part], name: str) -> Iterator[pa.Table]:
    for part in parts:
        with dataset.open_part(part) as file:
            for batch in file.iter_batches(columns=["key", name]):
                yield pa.Table.from_batches([batch]).select(["key", name]).cast(_keys_schema(name))


def _keys_schema(name: str) -> pa.Schema:
    return pa.schema([("key", pa.string()), (name, pa.int64())])
