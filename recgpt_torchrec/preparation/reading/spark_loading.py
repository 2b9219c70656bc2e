"""Loads the files of a log on Spark's executors, many at once, each with the reader that `--engine duckdb` has.

A task reads a file, or several small ones, into a DuckDB of its own on the executor's disk, and hands the rows to Spark
as Arrow batches. So every rule of reading, every reason for a rejection and every note is the same on both engines.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import ibis
import pyarrow as pa
import pyarrow.compute as pc

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.engines.duckdb_engine import DuckDBEngine, explain_lack
from recgpt_torchrec.preparation.engines.spark_engine import SparkEngine
from recgpt_torchrec.preparation.reading.dialect import Dialect
from recgpt_torchrec.preparation.reading.duckdb_reader import DuckDBReader, FileReport, log_table, open_file
from recgpt_torchrec.preparation.reading.files import InputFile
from recgpt_torchrec.preparation.reading.loading import FILE_ROWS, LoadedLog, list_rejected
from recgpt_torchrec.preparation.reading.rows import SILENT
from recgpt_torchrec.progress import LOGGER

if TYPE_CHECKING:
    from pyspark import Accumulator, Broadcast

GROUP_BYTES = 256 * 2**20
"""Maximum number of bytes of the files that one task reads, if they are several."""
GROUP_FILES = 256
"""Maximum number of files that one task reads."""
FEW_FILES = 16
"""Maximum number of files whose first lines the driver reads by itself."""
HUGE = 4 * 2**30
"""Bytes of a file from which on a line says that one task reads it."""
STORED = {"row": "listed_row", "reason": "problem", "place": "order"}
"""Names of columns of `REJECTED` among those that tasks return."""
TASK_MEMORY = "1GB"
"""Maximum memory of a task's DuckDB, unless `--memory_limit` gives another."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Files that one task reads, one after the other in the order of the input."""

    first: int
    """Index of the first of them in the input."""
    files: list[InputFile]
    dialects: list[Dialect]
    """[files] how each is read; empty: it is not known yet."""


@dataclass(kw_only=True)
class _Outcome:
    """What tasks have reported: by the index of a group's first file, how its files were read; or what is wrong."""

    reports: dict[int, tuple[list[FileReport], list[int]]]
    """The report of each file of the group, and the value of `order` of its first row."""
    errors: dict[int, str]


def open_on_spark(engine: SparkEngine, config: Prepare, files: Sequence[InputFile]) -> list[Dialect]:
    """Decide how each file is to be read, by its first lines.

    Raises:
        InputError: a file is not of its format, or looks like something else; of several, the first.
    """
    if len(files) <= FEW_FILES:
        return [open_file(file, config) for file in files]
    groups = group_files(files, [], engine.parallelism)
    context = engine.spark.sparkContext
    with engine.shown("opening files"):
        opened = context.parallelize(groups, len(groups)).map(partial(_open_group, config)).collect()
    found = [each for group in opened for each in group]
    for each in found:
        if isinstance(each, str):
            raise InputError(each)
    return found


def load_on_spark(
    engine: SparkEngine, config: Prepare, files: Sequence[InputFile], dialects: Sequence[Dialect], timed: bool
) -> LoadedLog:
    """Load files into tables of Spark; see `loading.load_files`.

    Raises:
        InputError: a file is not of its format, or lacks a column; the files that are not read yet are left.
    """
    for file in files:
        if file.bytes > HUGE:
            LOGGER.info(
                f"note        one task reads {file.path} ({file.bytes / 2**30:.1f} GiB) from its beginning to its end; "
                "several files are read at once"
            )
    groups = group_files(files, dialects, engine.parallelism)
    context = engine.spark.sparkContext
    outcome = context.accumulator(_Outcome(reports={}, errors={}), _merging())
    job = _Job(config=config, timed=timed, groups=groups, scratch=engine.local_scratch)
    schema = _stored_schema(config)
    frame = engine.spark.range(0, len(groups), 1, len(groups)).mapInArrow(
        partial(_read_groups, context.broadcast(job), outcome, schema.to_pyarrow()), engine.types(schema)
    )
    errors, reports = outcome.value.errors, outcome.value.reports
    try:
        stored = engine.save_frame("raw_log", frame, schema, "reading files", lambda: bool(errors))
    except Exception:
        if not errors:  # else these tasks were cancelled
            raise
    if errors:
        raise InputError(errors[min(errors)])
    assert len(reports) == len(groups), "a task has not reported"
    rejected = stored.filter(stored.listed_row.notnull())
    return LoadedLog(
        table=stored.filter(~stored.malformed).drop("file", "listed_row", "malformed"),
        rejected=rejected.select(
            "file", "malformed", "text", row=rejected.listed_row, reason=rejected.problem, place=rejected.order
        ),
        reports=[report for first in sorted(reports) for report in reports[first][0]],
        first_rows=[row for first in sorted(reports) for row in reports[first][1]],
    )


def group_files(files: Sequence[InputFile], dialects: Sequence[Dialect], parallelism: int) -> list[Group]:
    """Deal files to tasks: neighbours together, as long as they are small and every executor has several tasks."""
    most = min(sum(file.bytes for file in files) // (4 * parallelism), GROUP_BYTES)
    starts, size = [0], 0
    for index, file in enumerate(files):
        size += file.bytes
        if index > starts[-1] and (size > most or index - starts[-1] == GROUP_FILES):
            starts.append(index)
            size = file.bytes
    ends = [*starts[1:], len(files)]
    return [
        Group(first=start, files=[*files[start:end]], dialects=[*dialects[start:end]])
        for start, end in zip(starts, ends, strict=True)
    ]


# -- on the executors


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What every task needs to know."""

    config: Prepare
    timed: bool
    groups: list[Group]
    scratch: str | None
    """Folder for the tasks' databases; None: the executor's own."""


def _open_group(config: Prepare, group: Group) -> list[Dialect | str]:
    """How each file is to be read, or what is wrong with it."""
    opened: list[Dialect | str] = []
    for file in group.files:
        try:
            opened.append(open_file(file, config))
        except InputError as error:
            opened.append(str(error))
    return opened


def _read_groups(
    job: "Broadcast[_Job]", outcome: "Accumulator[_Outcome]", schema: pa.Schema, batches: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """The rows of groups of files, given their numbers; reports go to `outcome`."""
    for batch in batches:
        for number in batch.column(0).to_pylist():
            group = job.value.groups[number]
            try:
                yield from _read_group(job.value, group, outcome, schema)
            except InputError as error:
                outcome.add(_Outcome(reports={}, errors={group.first: str(error)}))


def _read_group(
    job: _Job, group: Group, outcome: "Accumulator[_Outcome]", schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    scratch = job.scratch or own_scratch()
    memory = job.config.memory_limit or TASK_MEMORY
    offset = group.first * FILE_ROWS
    with explain_lack(scratch), DuckDBEngine(scratch, memory, threads=1) as engine:
        reader = DuckDBReader(engine, job.config, job.timed)
        for file, dialect in zip(group.files, group.dialects, strict=True):
            reader.load(file, dialect)
        table = reader.table
        for batch in engine.batches(table.filter(table.problem.isnull() | table.problem.isin(SILENT))):
            yield _complete(batch, schema, offset, malformed=False)
        for rows in list_rejected(engine, reader, group.files):
            for batch in rows.rename_columns([STORED.get(name, name) for name in rows.column_names]).to_batches():
                yield _complete(batch, schema, offset)
    first_rows = [offset + row for row in reader.first_rows]
    outcome.add(_Outcome(reports={group.first: (reader.reports, first_rows)}, errors={}))


def _complete(batch: pa.RecordBatch, schema: pa.Schema, offset: int, **constants: Any) -> pa.RecordBatch:
    """The batch with all columns of the schema, null where it has none, and `order` in the whole input."""
    columns = {name: batch.column(name) for name in batch.schema.names}
    columns |= {name: pa.repeat(value, batch.num_rows) for name, value in constants.items()}
    columns["order"] = pc.add(columns["order"], offset)
    filled = [columns.get(field.name, pa.nulls(batch.num_rows, field.type)) for field in schema]
    return pa.record_batch([each.cast(field.type) for each, field in zip(filled, schema, strict=True)], schema=schema)


def own_scratch() -> str:
    """The folder that Spark gives an executor for what it spills, or else the machine's for temporary files."""
    folders = os.environ.get("SPARK_LOCAL_DIRS") or os.environ.get("LOCAL_DIRS") or ""
    return next((folder for folder in folders.split(",") if os.path.isdir(folder)), tempfile.gettempdir())


def _stored_schema(config: Prepare) -> ibis.Schema:
    """The columns that tasks return: those of `log_table`, and those of `REJECTED` for rows that are."""
    log = log_table("string" if config.click_values else "float64").schema()
    more = {"file": "string", "listed_row": "int64", "malformed": "boolean"}
    return ibis.schema({**dict(log.items()), **more})


def _merging() -> Any:
    """How Spark adds what tasks report. Here, as pyspark may be missing where this module is imported."""
    from pyspark import AccumulatorParam

    class Merging(AccumulatorParam[_Outcome]):
        def zero(self, value: _Outcome) -> _Outcome:
            return _Outcome(reports={}, errors={})

        def addInPlace(self, value1: _Outcome, value2: _Outcome) -> _Outcome:  # noqa: N802
            value1.reports.update(value2.reports)
            value1.errors.update(value2.errors)
            return value1

    return Merging()
