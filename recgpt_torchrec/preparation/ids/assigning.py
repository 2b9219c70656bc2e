"""Assigns ids to the users or items that the log kept: from a vocabulary, or as slots of a table of fixed size."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import ibis
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.ids.records import CountedTable, Entity, IdsRecord, IdTable
from recgpt_torchrec.data.ids.slots import read_slots
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation import queries
from recgpt_torchrec.preparation.engines.engine import BATCH_ROWS, Engine
from recgpt_torchrec.preparation.ids.tables import COLUMNS, Slots, Stream, assign_hashed, assign_managed
from recgpt_torchrec.preparation.writing import NUMBER, lay_out_rows
from recgpt_torchrec.storage import filesystem
from recgpt_torchrec.storage.parts import Part, open_part, write_parts

GROUPS_PER_PART = 16
STATE = ("since", "seen", "last_seen")
"""Columns that the parts of a managed table have beside a vocabulary's."""


@dataclass(frozen=True, kw_only=True)
class Ids:
    """The ids of users or items."""

    codes: ir.Table
    """Code and id of every key that has one; keys may share an id."""
    named: ir.Table
    """Code and id, once per id: of the key that names it."""
    columns: ir.Table | None = None
    """The id and further columns of its part; None: there are none."""
    count: int
    """Number of ids, which are 0 to `count` - 1."""
    slots: Slots | None = None
    """None: a vocabulary."""

    def add_columns(self, part: ir.Table) -> ir.Table:
        """Add `columns` to the rows of a part."""
        if self.columns is None:
            return part
        id, *names = self.columns.columns
        return part.inner_join(self.columns, id).select(*part.columns, *names)

    def list_keys(self, codes: ir.Table) -> ir.Table | None:
        """Every key with its id, numbered in the order of ids, given code and `key`; None: a key has its own id."""
        if self.slots is None or self.slots.record.ids != "hash":
            return None
        entity, id = self.codes.columns
        keys = self.codes.inner_join(codes, entity).select(entity, id, "key")
        bucketed = keys.mutate(bucket=keys[id] // queries.BUCKET_CODES)
        return queries.number_rows(bucketed, [id, entity], NUMBER).select(NUMBER, id, "key")

    def changed_since(self, extended: Dataset) -> ir.Table | None:
        """The ids of the earlier dataset that mean another key now; None: there are none."""
        version = len(extended.manifest.lineage)
        if self.slots is None or self.columns is None or self.slots.record.reassigned <= version:
            return None
        return self.columns.filter(self.columns.since > version).select(self.columns.columns[0])


def check_tables(config: Prepare, extended: Dataset | None) -> None:
    """Check that the ids of the dataset that is extended were assigned by the same rule.

    Raises:
        InputError: they were not.
    """
    if extended is None:
        return
    for entity, asked in _tables(config).items():
        there = extended.manifest.id_table(entity)
        old, new = (_describe(entity, each) for each in (there, asked))
        if old != new:
            raise InputError(
                f"--vocabulary {extended.path} was prepared with {old}, which now is {new}: ids would mean other "
                "keys, and tables keep their size. Give the same options, or leave --vocabulary out"
            )
    if extended.manifest.id_tables and config.time_column is None and config.ids == "managed":
        raise InputError(
            "--ids managed with --vocabulary counts the interactions after those that were counted before, which needs "
            "times, but --time_column is null; name the column"
        )


def _tables(config: Prepare) -> dict[Entity, IdTable | None]:
    """The empty tables that a configuration asks for; None: a vocabulary."""
    if config.ids == "vocabulary":
        return {"user": None, "item": None}
    managed = config.ids == "managed"
    rule: dict[str, Any] = {"eviction": config.eviction, "step": config.eviction_step} if managed else {}
    rows: dict[Entity, int | None] = {"user": config.user_rows, "item": config.item_rows}
    return {
        entity: None if count is None else IdTable(entity=entity, ids=config.ids, rows=count, seed=config.seed, **rule)
        for entity, count in rows.items()
    }


def _describe(entity: Entity, table: IdTable | None) -> str:
    """A table as the options that ask for it."""
    if table is None:
        return f"a vocabulary of {entity}s"
    rule = f" --eviction {table.eviction} --eviction_step {table.step}" if table.ids == "managed" else ""
    return f"--ids {table.ids} --{entity}_rows {table.rows}{rule} --seed {table.seed}"


def assign_ids(
    engine: Engine,
    config: Prepare,
    entity: Entity,
    *,
    kept: ir.Table,
    codes: ir.Table,
    known: ir.Table | None,
    pairs: ir.Table,
    extended: Dataset | None,
    all_new: bool = False,
    counted: ir.Table | None = None,
) -> Ids:
    """Assign the ids of users or items.

    Args:
        engine: that holds the tables.
        config: of the stage.
        entity: `user` or `item`, which is the column of its codes; that of its ids is `user_id` or `item_id`.
        kept: the codes that the log kept.
        codes: code and `key` of every key.
        known: code and id of the earlier dataset's keys; None: there is none.
        pairs: the interactions that the log kept: codes, and `time`.
        extended: the earlier dataset.
        all_new: whether no interaction of the log was counted before, as where it holds later days alone; otherwise
            those are that are later than all that were counted.
        counted: code and `before`, the number of interactions of a key that the log does not hold; None: it holds all.
    """
    record = _tables(config)[entity]
    if record is None or (config.new_keys == "leave_out" and extended is not None):
        numbered = engine.save(f"{entity}_ids", queries.assign_ids(kept, entity, f"{entity}_id", known))
        ids = Ids(codes=numbered, named=numbered, count=engine.count(numbered))
        return ids if record is None or extended is None else _keep_slots(engine, entity, ids, extended)
    used, version, state = 0, 0, [np.zeros(0, np.int64) for _ in STATE]
    if extended is not None:
        there = extended.manifest.id_table(entity)
        assert there is not None, "see check_tables"
        record, used, version = there, getattr(extended.manifest, f"{entity}s"), len(extended.manifest.lineage) + 1
    until = None if all_new else record.until
    stream = _write_stream(engine, entity, record.seed, kept, codes, known, pairs, until, counted)
    if record.ids == "hash":
        return _store(engine, entity, *assign_hashed(stream, record, used))
    if extended is not None:
        state = [np.concatenate(blocks) for blocks in zip(*read_slots(extended, entity, STATE), strict=True)]
    since, seen, last_seen = state
    return _store(engine, entity, *assign_managed(stream, record, since, seen, last_seen, version))


def _write_stream(
    engine: Engine,
    entity: Entity,
    seed: int,
    kept: ir.Table,
    codes: ir.Table,
    known: ir.Table | None,
    pairs: ir.Table,
    until: int | None,
    counted: ir.Table | None,
) -> Stream:
    """Write the keys of the log and those with slots to the engine's scratch folder, to be read several times."""
    id = f"{entity}_id"
    marked = pairs.mutate(is_new=ibis.literal(True) if until is None else pairs.time > until)
    counts = marked.group_by(entity).agg(
        kept=marked.count(), count=marked.is_new.cast("int64").sum(), last=marked.time.max(where=marked.is_new)
    )
    every = kept.select(entity)
    if known is not None:
        every = every.union(known.select(entity)).distinct()
    rows = every.inner_join(codes, entity).select(entity, "key")
    rows = rows.left_join(counts, entity).select(entity, "key", "kept", "count", "last")
    if counted is not None:
        joined = rows.left_join(counted.select(entity, "before"), entity)
        rows = joined.select(
            *(name for name in rows.columns if name != "kept"),
            kept=joined.kept.fill_null(0) + joined.before.fill_null(0),
        )
    if known is not None:
        rows = rows.left_join(known, entity).select(*rows.columns, id)
    hashed = (ibis.literal(f"{seed}:") + rows.key).hexdigest("md5").left(16)
    rows = rows.select(
        code=rows[entity],
        hash=hashed,
        known=rows[id].fill_null(-1) if known is not None else ibis.literal(-1, "int64"),
        kept=rows.kept.fill_null(0).cast("int64"),
        count=rows["count"].fill_null(0).cast("int64"),
        last=rows["last"].cast("int64"),
    )
    stored = engine.save(f"{entity}_keys", rows)
    numbered = queries.number_rows(stored.mutate(bucket=stored.code // queries.BUCKET_CODES), ["code"], NUMBER)
    total = engine.count(stored)
    folder = f"keys of {entity}s"
    layout = lay_out_rows(folder, [NUMBER, *COLUMNS], total, BATCH_ROWS, GROUPS_PER_PART)
    fs, root = filesystem(str(engine.scratch))
    parts = engine.write_parts(numbered, layout, fs, root, total)
    engine.drop(stored.get_name())

    def read() -> Iterator[pa.RecordBatch]:
        for part in parts:
            with open_part(fs, root, part) as file:
                for batch in file.iter_batches(BATCH_ROWS, columns=list(COLUMNS)):
                    yield batch.select(list(COLUMNS))

    return read


def _store(engine: Engine, entity: Entity, slots: Slots, read_codes: Callable[[], Iterator[pa.Table]]) -> Ids:
    """Store what was assigned as tables of the engine."""
    id, count = f"{entity}_id", len(slots.code)
    names = {"code": entity, "id": id}
    codes = _load(engine, f"{entity}_ids", (table.rename_columns(names) for table in read_codes() if len(table)))
    columns = {id: np.arange(count), entity: slots.code, **slots.columns}
    rows = (
        pa.table({name: values[first : first + BATCH_ROWS] for name, values in columns.items()})
        for first in range(0, count, BATCH_ROWS)
    )
    named = _load(engine, f"{entity}_slots", rows)
    return Ids(codes=codes, named=named.select(entity, id), columns=named.drop(entity), count=count, slots=slots)


def _keep_slots(engine: Engine, entity: Entity, ids: Ids, extended: Dataset) -> Ids:
    """The ids and slots of the earlier dataset, of which none changes."""
    record, id = extended.manifest.id_table(entity), f"{entity}_id"
    assert record is not None, "see check_tables"
    first = 0
    tables = []
    for values in read_slots(extended, entity, STATE):
        tables.append(pa.table({id: np.arange(first, first + len(values[0])), **dict(zip(STATE, values, strict=True))}))
        first += len(values[0])
    slots = Slots(record=record, code=np.zeros(0, np.int64), columns={})  # nothing was counted
    return replace(ids, columns=_load(engine, f"{entity}_slots", iter(tables)), slots=slots)


def _load(engine: Engine, name: str, tables: Iterator[pa.Table]) -> ir.Table:
    """Load tables that are made here into the engine, through files that its workers read."""
    fs, root = filesystem(str(engine.scratch))
    parts = write_parts(fs, root, f"loading {name}", tables, GROUPS_PER_PART)

    def read(part: Part) -> Iterator[pa.Table]:
        with open_part(fs, root, part) as file:
            for batch in file.iter_batches(BATCH_ROWS):
                yield pa.Table.from_batches([batch])

    with open_part(fs, root, parts[0]) as file:
        schema = file.schema_arrow
    return engine.fill_from(name, parts, read, schema)


def describe_rules(slots: list[Slots]) -> list[str]:
    """How the ids were assigned, as part of the fingerprint of what they mean."""
    return [f"{each.record.entity}: {each.record.ids} {each.record.rows} {each.record.seed}" for each in slots]


def describe_slots(slots: list[Slots], left_out: int, forgotten: int = 0) -> dict[str, Any]:
    """What the manifest's preparation records of the slots.

    Args:
        slots: of users, items or both.
        left_out: number of interactions that are left out because their user or item has no slot.
        forgotten: number of an appended day's earlier entries that are left out because their item lost its slot.
    """
    tables = []
    for each in slots:
        keys = each.columns.get("keys", np.zeros(0, np.int64))
        tables.append(
            CountedTable(
                entity=each.record.entity,
                ids=each.record.ids,
                rows=each.record.rows,
                evicted=each.evicted,
                refused=each.refused,
                shared=int((keys > 1).sum()),
                keys=int(keys.sum()),
            )
        )
    return asdict(IdsRecord(left_out=left_out, forgotten=forgotten, tables=tables))
