"""Loads tables of attributes into an engine, and checks that they say one thing of each user and item."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ibis.expr.types as ir
import pyarrow as pa

from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.attributes.columns import TableFile, Taken, resolve
from recgpt_torchrec.preparation.attributes.reading import FAILURE, ROW, VALUES, open_table_file, read_table_file
from recgpt_torchrec.preparation.attributes.tables import EntityTable
from recgpt_torchrec.preparation.engines.duckdb_engine import DuckDBEngine
from recgpt_torchrec.preparation.engines.engine import Engine
from recgpt_torchrec.preparation.engines.spark_engine import SparkEngine
from recgpt_torchrec.preparation.reading.dialect import shorten
from recgpt_torchrec.progress import progress_bar


@dataclass(kw_only=True)
class LoadedTable:
    """A table of attributes in the engine."""

    table: EntityTable
    files: list[TableFile]
    taken: list[Taken]
    keys: ir.Table
    """Each `key` once."""
    values: ir.Table
    """`key`, `attribute`, and `value` or `number`; once for each row of the table that has it."""
    rows: int
    """Number of rows that have a key."""
    distinct: int
    """Number of keys."""
    unknown: int = 0
    """Number of keys that are in no interaction."""
    problems: list[dict[str, Any]] = field(default_factory=list)
    """What could not be read: `attribute` (-1: a whole row), `problem`, `n` and an `example`."""

    @property
    def names(self) -> str:
        """The files in words."""
        return self.table.files[0].path if len(self.table.files) == 1 else f"{len(self.table.files)} files"


def load_table(engine: Engine, table: EntityTable, clicks: ir.Table, key: str) -> LoadedTable:
    """Read all files of a table into the engine.

    Args:
        engine: where the rows are stored.
        table: that is read.
        clicks: the interactions of the log.
        key: column of `clicks` with the keys of users or items.

    Raises:
        InputError: a file cannot be read or lacks a column; no row has a key, or none has a key of the log; two rows
            differ about one user or item.
    """
    here = str(engine.scratch) if isinstance(engine, DuckDBEngine) else _local_scratch(engine)
    files = [open_table_file(file, table, here) for file in table.files]
    taken = resolve(table, files)
    everywhere = here if isinstance(engine, DuckDBEngine) else getattr(engine, "local_scratch", None)
    read = partial(read_table_file, table, taken, everywhere)
    name = f"{table.entity}_table"
    if isinstance(engine, DuckDBEngine):
        total = sum(file.bytes for file in table.files)
        with progress_bar(total, "bytes", unit_scale=True, desc=f"reading {table.entity}s: ", leave=False) as bar:
            counted = _count_files(read, bar.update)
            stored = engine.fill_from(name, list(enumerate(files)), counted, VALUES)
    else:
        stored = engine.fill_from(name, list(enumerate(files)), read, VALUES)
    failures = engine.rows(
        stored.filter(stored.attribute == FAILURE).select("file", "problem").order_by("file").limit(1)
    )
    if failures:
        raise InputError(f"{table.option} {failures[0]['problem']}")
    usable = stored.filter(stored.problem.isnull())
    rows = usable.filter(usable.attribute == ROW).select("key", "file", "row")
    keys = engine.save(f"{table.entity}_table_keys", rows.group_by("key").agg(n=rows.count()))
    problems = stored.filter(stored.problem.notnull())
    counts = problems.group_by("attribute", "problem").agg(n=problems.count(), example=problems.value.min())
    loaded = LoadedTable(
        table=table,
        files=files,
        taken=taken,
        keys=keys.select("key"),
        values=usable.filter(usable.attribute >= 0).select("key", "attribute", "value", "number"),
        rows=int(engine.row(keys.agg(n=keys.n.sum()))["n"] or 0),
        distinct=engine.count(keys),
        problems=engine.rows(counts.order_by("attribute", "problem")),
    )
    if not loaded.distinct:
        seen = ", ".join(f"{each['n']:,} {each['problem']}" for each in loaded.problems)
        raise InputError(
            f"{table.option} {loaded.names}: no row has a key in the column {table.key!r}"
            + (f" ({seen})" if seen else ", the table is empty")
            + f"; give a table with a row per {table.entity}"
        )
    _check_rows(engine, loaded, usable, keys)
    _check_keys(engine, loaded, clicks, key)
    return loaded


def _local_scratch(engine: Engine) -> str:
    from recgpt_torchrec.preparation.reading.spark_loading import own_scratch

    return (engine.local_scratch if isinstance(engine, SparkEngine) else None) or own_scratch()


def _count_files(
    read: Callable[[tuple[int, TableFile]], Iterable[pa.Table]], advance: Callable[[int], object]
) -> Callable[[tuple[int, TableFile]], Iterator[pa.Table]]:
    """`read`, which calls `advance` with the bytes of each file that is read."""

    def read_and_count(source: tuple[int, TableFile]) -> Iterator[pa.Table]:
        yield from read(source)
        advance(source[1].file.bytes)

    return read_and_count


def _check_rows(engine: Engine, loaded: LoadedTable, usable: ir.Table, keys: ir.Table) -> None:
    """Raise an `InputError` if two rows of one key differ: a value of one of them is not in the other."""
    if loaded.rows == loaded.distinct:
        return
    repeated = keys.filter(keys.n > 1)
    values = usable.filter(usable.attribute >= 0).inner_join(repeated, "key")
    counts = values.group_by("key", "attribute", "value", "number", "n").agg(having=values.count())
    differing = counts.filter(counts.having < counts.n).order_by("key", "attribute").limit(1)
    if not (found := engine.rows(differing.select("key", "attribute"))):
        return
    key, attribute = found[0]["key"], found[0]["attribute"]
    name = loaded.taken[attribute].name
    of_key = usable.filter(usable.key == key, usable.attribute.isin([ROW, attribute]))
    rows: dict[tuple[int, int], list[Any]] = {}
    for each in engine.rows(of_key.order_by("file", "row", "attribute", "value", "number").limit(1000)):
        given = rows.setdefault((each["file"], each["row"]), [])
        if each["attribute"] == attribute:
            given.append(each["value"] if each["number"] is None else each["number"])
    places = sorted(rows)
    first = places[0]
    other = next((place for place in places if rows[place] != rows[first]), places[-1])
    shown = " and ".join(
        f"{shorten(', '.join(map(str, rows[place])), 40) or 'none'} in row {place[1]:,} of "
        f"{loaded.table.files[place[0]].path}"
        for place in (first, other)
    )
    raise InputError(
        f"{loaded.table.option}: the {loaded.table.entity} {key!r} has several rows that differ in {name}: {shown}. "
        f"Give one row per {loaded.table.entity}, such as the newest"
    )


def _check_keys(engine: Engine, loaded: LoadedTable, clicks: ir.Table, column: str) -> None:
    """Count the keys that are in no interaction; raise an `InputError` if these are all."""
    known = loaded.keys.semi_join(clicks, loaded.keys.key == clicks[column])
    loaded.unknown = loaded.distinct - engine.count(known)
    if loaded.unknown < loaded.distinct:
        return
    own = engine.row(loaded.keys.agg(key=loaded.keys.key.min()))["key"]
    of_log = engine.row(clicks.agg(key=clicks[column].min()))["key"]
    table = loaded.table
    raise InputError(
        f"{table.option} {loaded.names}: none of its {loaded.distinct:,} keys is in the log; those of its column "
        f"{table.key!r} are like {own!r}, those of the log like {of_log!r}. Name the column with the log's keys: "
        f"{table.option}_key"
    )
