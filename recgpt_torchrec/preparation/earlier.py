"""The earlier dataset that `prepare` extends: ids of its keys, and how far each user's history was trained on.

It is read once, one row group at a time, into tables of the engine; where that has many workers, each reads some parts.
Neither its raw log nor its options are needed.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import ibis
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa

from recgpt_torchrec.data.dataset import Dataset, Vocabulary, histories_fingerprint
from recgpt_torchrec.data.ids.records import Entity
from recgpt_torchrec.data.inputs.times import unit_name
from recgpt_torchrec.data.ragged import Int64, Ragged
from recgpt_torchrec.data.reading.reader import Reader, stored_starts
from recgpt_torchrec.data.segments import INTERACTED, Interacted
from recgpt_torchrec.data.split import cut
from recgpt_torchrec.data.windows import RowGroup, row_groups
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.engines.engine import Engine
from recgpt_torchrec.preparation.queries import order_of
from recgpt_torchrec.storage import filesystem
from recgpt_torchrec.storage.parts import Part

TRAINED = pa.schema([("user_id", pa.int64()), ("trained", pa.int64()), ("until", pa.int64()), ("at_until", pa.int64())])
"""Schema of `trained_parts`: a user, the number of interactions in their training part, the time of the newest of these
(null without times), and how many of these have that time."""
TRAINED_ROWS = pa.schema([("user_id", pa.int64()), ("item_id", pa.int64()), ("time", pa.int64())])
"""Schema of `trained_rows`: an interaction of the training part; its time is 0 without times."""


def open_earlier(path: str, output: str) -> Dataset:
    """Open the dataset at `path`, to be extended into `output`.

    Raises:
        InputError: it is not a finished dataset, or would be overwritten.
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


def check_unit(earlier: Dataset, unit: float | None) -> None:
    """Check that the times of a log have the unit of those of the dataset that it extends, where both are known.

    Raises:
        InputError: they have another one.
    """
    known = earlier.manifest.time_unit
    if unit is not None and known is not None and unit != known:
        raise InputError(
            f"--vocabulary {earlier.path}: its times are in {unit_name(known)}, those of the log in {unit_name(unit)}; "
            "write the log's times in that unit, or name it with --time_unit"
        )


def lineage_of(earlier: Dataset, vocabulary: str) -> list[Vocabulary]:
    """The vocabularies that the one with fingerprint `vocabulary` extends, oldest first; `earlier` has the newest.

    If nothing was added the vocabulary is the same, and does not extend itself.
    """
    manifest = earlier.manifest
    own = Vocabulary(fingerprint=manifest.vocabulary, users=manifest.users, items=manifest.items)
    return [each for each in (*manifest.lineage, own) if each.fingerprint != vocabulary]


def record_of(earlier: Dataset) -> dict[str, str]:
    """Fingerprints of this dataset that one which extends it records; they do not depend on its path."""
    return {"vocabulary": earlier.manifest.vocabulary, "histories": histories_fingerprint(earlier)}


@dataclass(frozen=True)
class Known:
    """The users and items of the earlier dataset, in tables of the engine."""

    dataset: Dataset
    users: ir.Table
    """`key` and `user_id` of every user."""
    items: ir.Table
    """`key` and `item_id` of every item."""

    @classmethod
    def load(cls, engine: Engine, dataset: Dataset) -> "Known":
        """Load both vocabularies into the engine."""

        def load(name: str, parts: list[Part], id: str) -> ir.Table:
            return engine.fill_from(name, parts, partial(_read_keys, dataset, id), _make_schema(id))

        manifest = dataset.manifest
        return cls(
            dataset,
            load("known_users", manifest.user_parts, "user_id"),
            load("known_items", manifest.item_parts, "item_id"),
        )

    @classmethod
    def load_day(cls, engine: Engine, dataset: Dataset) -> "Known":
        """Load the keys of a day of a folder of days: where keys share an id, all of them, with the number of their
        interactions in `before`."""

        def load(entity: Entity, parts: list[Part]) -> ir.Table:
            id = f"{entity}_id"
            table = dataset.manifest.id_table(entity)
            shared = table is not None and table.ids == "hash"
            if shared:
                parts = [part for part in dataset.manifest.key_parts if f"/{entity}_keys/" in part.path]
            schema = _make_schema(id).append(pa.field("before", pa.int64())) if shared else _make_schema(id)
            read = partial(_read_counted if shared else _read_keys, dataset, id)
            return engine.fill_from(f"known_{entity}s", parts, read, schema)

        return cls(dataset, load("user", dataset.manifest.user_parts), load("item", dataset.manifest.item_parts))

    def join_codes(self, engine: Engine, users: ir.Table, items: ir.Table) -> "KnownCodes":
        """The ids by code, given the codes by key (`queries.build_codes`)."""
        of_users = self.users.inner_join(users, "key").select("user", "user_id")
        of_items = self.items.inner_join(items, "key").select("item", "item_id")
        return KnownCodes(engine.save("known_user_codes", of_users), engine.save("known_item_codes", of_items))


@dataclass(frozen=True)
class KnownCodes:
    """Codes and ids of the earlier dataset, in tables of the engine: `user` and `user_id`, `item` and `item_id`."""

    users: ir.Table
    items: ir.Table


def _training_part(dataset: Dataset, group: RowGroup) -> tuple[pa.Table, Interacted, Int64, Int64]:
    """A row group, its interactions, and where each user's training part starts and stops among these."""
    table = Reader(dataset, times=True).read(group).table
    items = Ragged.from_arrow(table["item_ids"])
    segments = Ragged.from_arrow(table["segment_ids"]).values if "segment_ids" in table.schema.names else None
    interacted = Interacted.among(items.offsets, segments)
    _, start, stop, _ = cut(interacted.offsets, "training", dataset.manifest.hold_out, stored_starts(table))
    return table, interacted, start, stop


def trained_parts(dataset: Dataset, groups: list[RowGroup]) -> Iterator[pa.Table]:
    """How far each user's history is trained on: one table per row group, with the schema `TRAINED`."""
    for group in groups:
        table, interacted, start, stop = _training_part(dataset, group)
        until = at_until = None
        if "timestamps" in table.schema.names:
            times = Ragged(Ragged.from_arrow(table["timestamps"]).values[interacted.places], interacted.offsets)
            has_trained = stop > start
            newest = np.zeros(table.num_rows, dtype=np.int64)
            newest[has_trained] = times.values[stop[has_trained] - 1]
            trained = times.cut(start, stop)
            is_newest = trained.values == np.repeat(newest, stop - start)
            at_until = trained.keep(is_newest).lengths
            until = pa.array(newest, mask=~has_trained)
        columns = [table["user_id"].combine_chunks(), pa.array(stop - start), until, at_until]
        nulls = pa.nulls(table.num_rows, pa.int64())
        yield pa.table([nulls if column is None else pa.array(column) for column in columns], schema=TRAINED)


def mark_trained(
    engine: Engine,
    entries: ir.Table,
    dataset: Dataset,
    timed: bool,
    changed_users: ir.Table | None = None,
    changed_items: ir.Table | None = None,
) -> ir.Table:
    """Add a column `trained` int8 to the entries: 1 for interactions of the earlier dataset's training part.

    Args:
        engine: that holds the entries.
        entries: `user_id`, `item_id`, `time`, `fraction`, `order` and `segment` beside other columns.
        dataset: the earlier one.
        timed: whether the entries have times.
        changed_users, changed_items: `user_id` and `item_id` of those that mean another key now, which no entry of the
            earlier dataset is about; None: there are none.
    """
    of_part = itertools.groupby(row_groups(dataset), lambda group: group.part)
    parts = [list(groups) for _, groups in of_part]
    by_time = timed and "timestamps" in dataset.columns
    changed = {"user_id": changed_users, "item_id": changed_items}
    if dataset.manifest.hold_out == "given" or any(ids is not None for ids in changed.values()):
        trained = engine.fill_from("trained_rows", parts, partial(trained_rows, dataset), TRAINED_ROWS)
        for id, ids in changed.items():
            trained = trained if ids is None else trained.anti_join(ids, id)
        return _mark_same_rows(entries, trained, by_time)
    trained = engine.fill_from("trained_parts", parts, partial(trained_parts, dataset), TRAINED)
    return _mark_beginnings(entries, trained, by_time)


def trained_rows(dataset: Dataset, groups: list[RowGroup]) -> Iterator[pa.Table]:
    """Every interaction of the training part: one table per row group, with the schema `TRAINED_ROWS`.

    Needed where the user's own files divide the log: then a training part may hold later interactions than a test part.
    And where an item lost its id: then a training part may have had more interactions up to some time than there are.
    """
    for group in groups:
        table, interacted, start, stop = _training_part(dataset, group)
        columns: list[np.ndarray] = [np.repeat(table["user_id"].to_numpy(), stop - start)]
        for name in ("item_ids", "timestamps"):
            if name in table.schema.names:
                values = Ragged.from_arrow(table[name]).values[interacted.places]
                columns.append(Ragged(values, interacted.offsets).cut(start, stop).values)
            else:
                columns.append(np.zeros(columns[0].size, dtype=np.int64))
        yield pa.table([pa.array(column) for column in columns], schema=TRAINED_ROWS)


def _mark_same_rows(entries: ir.Table, trained: ir.Table, by_time: bool) -> ir.Table:
    """Mark as many interactions of the same user, item and (by time) time as the training part had, the first ones.

    Args:
        entries: see `mark_trained`.
        trained: columns of `TRAINED_ROWS`.
        by_time: whether both datasets have times.
    """
    same = ["user_id", "item_id", *(["time"] if by_time else [])]
    order = order_of(entries)
    placed = entries.mutate(place=ibis.row_number().over(ibis.window(group_by=[*same, "segment"], order_by=order)))
    counts = trained.group_by(same).agg(count=trained.count()).rename({f"of_{name}": name for name in same})
    joined = placed.left_join(counts, [placed[name] == counts[f"of_{name}"] for name in same])
    known = ((joined.segment == INTERACTED) & (joined.place < joined["count"])).fill_null(False).cast("int8")
    return joined.select(*entries.columns, trained=known)


def _mark_beginnings(entries: ir.Table, trained: ir.Table, by_time: bool) -> ir.Table:
    """Mark the beginning of each user's interactions that the training part held.

    By time, these are a user's interactions up to the newest of that part; of those with just its time, as many as that
    part had. Without times, they are a user's first interactions, as many as that part had.

    Args:
        entries: see `mark_trained`.
        trained: columns of `TRAINED`.
        by_time: whether both datasets have times.
    """
    group = ["user_id", "segment", *(["time"] if by_time else [])]
    place = ibis.row_number().over(ibis.window(group_by=group, order_by=order_of(entries)))
    placed = entries.mutate(place=place)
    ends = trained.rename(of_user="user_id", count="trained")
    joined = placed.left_join(ends, placed.user_id == ends.of_user)
    if by_time:
        before = (joined.time < joined.until) | ((joined.time == joined.until) & (joined.place < joined.at_until))
    else:
        before = joined.place < joined["count"]
    known = ((joined.segment == INTERACTED) & before).fill_null(False).cast("int8")
    return joined.select(*entries.columns, trained=known)


def _read_keys(dataset: Dataset, name: str, part: Part) -> Iterator[pa.Table]:
    with dataset.open_part(part) as file:
        for batch in file.iter_batches(columns=["key", name]):
            yield pa.Table.from_batches([batch]).select(["key", name]).cast(_make_schema(name))


def _read_counted(dataset: Dataset, name: str, part: Part) -> Iterator[pa.Table]:
    schema = _make_schema(name).append(pa.field("before", pa.int64()))
    with dataset.open_part(part) as file:
        for batch in file.iter_batches(columns=["key", name, "count"]):
            yield (
                pa.Table.from_batches([batch]).select(["key", name, "count"]).rename_columns(schema.names).cast(schema)
            )


def _make_schema(name: str) -> pa.Schema:
    return pa.schema([("key", pa.string()), (name, pa.int64())])
