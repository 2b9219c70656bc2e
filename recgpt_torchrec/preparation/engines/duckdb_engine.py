"""The engine of one machine: DuckDB, on a database file."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import duckdb
import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.fs

from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.engines.engine import BATCH_ROWS, REMEDY, Engine, T, make_scratch, quote_sql
from recgpt_torchrec.preparation.writing import Layout
from recgpt_torchrec.progress import progress_bar
from recgpt_torchrec.storage import is_full
from recgpt_torchrec.storage.parts import Part


class DuckDBEngine(Engine):
    """DuckDB on a database file in a scratch folder, so that neither tables nor sorts have to fit in memory.

    Example:
        with DuckDBEngine("/tmp") as engine:
            active = engine.save("active", table.filter(table.n > 1))
    """

    dialect = "duckdb"

    def __init__(
        self,
        parent: str,
        memory_limit: str | None = None,
        threads: int | None = None,
        remedy: str = REMEDY,
    ) -> None:
        """Open an empty database.

        Args:
            parent: local folder in which a scratch folder is created for the database and what spills; `close` removes
                it.
            memory_limit: maximum memory that DuckDB takes before it spills, for example `4GB`; None: 80% of the
                machine's, DuckDB's default.
            threads: number of threads; None: one per core.
            remedy: what to do if `parent` cannot be written to.

        Raises:
            InputError: `memory_limit` is not a size, or `parent` cannot be written to.
        """
        self.scratch = Path(make_scratch(parent, remedy))
        try:
            self.connection = duckdb.connect(str(self.scratch / "prepare.duckdb"))
            self.connection.execute("SET TimeZone = 'UTC'")  # a date-time without an offset is UTC, on every machine
            with suppress(duckdb.InvalidInputException):  # in Jupyter without ipywidgets there is none to switch off
                self.connection.execute("SET enable_progress_bar = false")
            self.connection.execute(f"SET temp_directory = {quote_sql(str(self.scratch / 'spill'))}")
            if threads is not None:
                self.connection.execute(f"SET threads = {threads}")
            if memory_limit is not None:
                try:
                    self.connection.execute(f"SET memory_limit = {quote_sql(memory_limit)}")
                except duckdb.Error:
                    raise InputError(f"--memory_limit {memory_limit} is not a size such as 4GB or 500MB") from None
        except BaseException:
            shutil.rmtree(self.scratch, ignore_errors=True)
            raise

    def close(self) -> None:
        """Drop every table and remove the scratch folder."""
        self.connection.close()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def save(self, name: str, expression: ir.Table) -> ir.Table:
        """Store the result of `expression` as the table `name`, and return that table for further expressions."""
        self.connection.execute(f'CREATE TABLE "{name}" AS {self.sql(expression)}')
        return ibis.table(expression.schema(), name=name)

    def fill(self, name: str, tables: Iterable[pa.Table], schema: pa.Schema) -> ir.Table:
        """Store Arrow tables of one schema, one after the other, as the table `name`, and return that table."""
        self.connection.register("incoming", schema.empty_table())
        self.connection.execute(f'CREATE TABLE "{name}" AS SELECT * FROM incoming')
        for table in tables:
            self.connection.register("incoming", table)
            self.connection.execute(f'INSERT INTO "{name}" SELECT * FROM incoming')
        self.connection.unregister("incoming")
        return ibis.table(ibis.Schema.from_pyarrow(schema), name=name)

    def fill_from(
        self, name: str, sources: Sequence[T], read: Callable[[T], Iterable[pa.Table]], schema: pa.Schema
    ) -> ir.Table:
        """Store the Arrow tables that `read` makes of each source, one after the other; see `Engine`."""
        return self.fill(name, (table for source in sources for table in read(source)), schema)

    def drop(self, *names: str) -> None:
        """Drop tables, so that their space on disk is free again."""
        for name in names:
            self.connection.execute(f'DROP TABLE IF EXISTS "{name}"')

    def batches(self, expression: ir.Table, rows: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
        """The rows of `expression`, in its order, with only a few batches in memory at a time."""
        schema = expression.schema().to_pyarrow()
        # A cursor of its own: the caller may run other queries before it has read the last batch.
        for batch in self.connection.cursor().sql(self.sql(expression)).to_arrow_reader(rows):
            # DuckDB's own types may be wider: a sum of int64 is a 128-bit integer there.
            yield batch if batch.schema.equals(schema) else batch.cast(schema)

    def rows(self, expression: ir.Table) -> list[dict[str, Any]]:
        """The rows of a small result, in its order."""
        return [row for batch in self.batches(expression) for row in batch.to_pylist()]

    def write_parts(
        self, rows: ir.Table, layout: Layout, fs: pyarrow.fs.FileSystem, root: str, total: int
    ) -> list[Part]:
        """Write rows as the Parquet parts of a folder, in this process; see `Engine`."""
        ordered = rows.order_by(layout.id, *layout.order).select(layout.columns)
        with progress_bar(total, "rows", unit_scale=True, desc=f"writing {layout.folder}: ", leave=False) as bar:
            return layout.write_all(fs, root, _count(self.batches(ordered), bar))


def _count(batches: Iterable[pa.RecordBatch], bar: Any) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        yield batch
        bar.update(batch.num_rows)


SCRATCH_ERRORS = (duckdb.IOException, duckdb.TransactionException, PermissionError)
"""Errors of a scratch folder that cannot be written. One connection has no conflicts, so that a commit fails where its
log cannot be written."""


@contextmanager
def explain_lack(scratch: str) -> Iterator[None]:
    """Make an `InputError` of DuckDB's errors about memory and scratch space, and of a full disk."""
    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise InputError(
            f"the engine ran out of memory or scratch space; give more with --memory_limit or --scratch ({error})"
        ) from None
    except (*SCRATCH_ERRORS, OSError) as error:
        if not isinstance(error, SCRATCH_ERRORS) and not is_full(error):
            raise
        reason = " ".join(str(error).split())
        space = "free space there, or " if is_full(error) else ""
        raise InputError(f"scratch folder {scratch}: {reason}; {space}name another with --scratch") from None
