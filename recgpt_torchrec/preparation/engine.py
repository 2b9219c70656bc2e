"""What runs the Ibis expressions of `prepare`: an engine that keeps tables, and hands results out in order, in batches.

Ibis is used as the language and as the compiler; the engine gets finished SQL. Nothing else of `prepare` knows which
engine it is, apart from the reading of raw files (`raw.py`), which differs between engines by nature.
"""

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import ibis
import ibis.expr.types as ir
import pyarrow as pa

from recgpt_torchrec.errors import InputError

BATCH_ROWS = 65_536


class DuckDBEngine:
    """DuckDB on a database file in a scratch folder, so that neither tables nor sorts have to fit in memory.

    Example:
        with DuckDBEngine("/tmp") as engine:
            kept = engine.save("kept", table.filter(table.n > 1))
    """

    dialect = "duckdb"

    def __init__(self, parent: str, memory_limit: str | None = None) -> None:
        """Open an empty database.

        Args:
            parent: local folder in which a folder is made for the database and what spills; `close` removes it.
            memory_limit: most memory DuckDB takes before it spills, for example `4GB`; its own default is 80% of
                the machine's.

        Raises:
            InputError: `memory_limit` is not a size, or `parent` cannot be written to.
        """
        try:
            self.scratch = Path(tempfile.mkdtemp(prefix=".prepare-", dir=parent))
        except OSError as error:
            raise InputError(
                f"cannot write to {parent}, the place for temporary tables: {error}; give --scratch"
            ) from None
        try:
            self.connection = duckdb.connect(str(self.scratch / "prepare.duckdb"))
            self.connection.execute("SET TimeZone = 'UTC'")  # a date-time without an offset is UTC, on every machine
            self.connection.execute("SET enable_progress_bar = false")
            self.connection.execute(f"SET temp_directory = {quoted(str(self.scratch / 'spill'))}")
            if memory_limit is not None:
                try:
                    self.connection.execute(f"SET memory_limit = {quoted(memory_limit)}")
                except duckdb.Error:
                    raise InputError(f"--memory_limit {memory_limit} is not a size such as 4GB or 500MB") from None
        except BaseException:
            shutil.rmtree(self.scratch, ignore_errors=True)
            raise

    def __enter__(self) -> "DuckDBEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop every table and remove the scratch folder."""
        self.connection.close()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def save(self, name: str, expression: ir.Table) -> ir.Table:
        """Compute `expression` into the table `name` and return that table, for further expressions."""
        self.connection.execute(f'CREATE TABLE "{name}" AS {self.sql(expression)}')
        return ibis.table(expression.schema(), name=name)

    def fill(self, name: str, tables: Iterable[pa.Table], schema: pa.Schema) -> ir.Table:
        """Put Arrow tables of one schema, one after the other, into the table `name` and return that table."""
        self.connection.register("incoming", schema.empty_table())
        self.connection.execute(f'CREATE TABLE "{name}" AS SELECT * FROM incoming')
        for table in tables:
            self.connection.register("incoming", table)
            self.connection.execute(f'INSERT INTO "{name}" SELECT * FROM incoming')
        self.connection.unregister("incoming")
        return ibis.table(ibis.Schema.from_pyarrow(schema), name=name)

    def drop(self, *names: str) -> None:
        """Forget tables, so that their space on disk is used again."""
        for name in names:
            self.connection.execute(f'DROP TABLE IF EXISTS "{name}"')

    def batches(self, expression: ir.Table, rows: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
        """The rows of `expression`, in its order, never more than a few batches of them in memory."""
        schema = expression.schema().to_pyarrow()
        # A cursor of its own: whoever reads these batches may ask for other things before it comes to the last one.
        for batch in self.connection.cursor().sql(self.sql(expression)).to_arrow_reader(rows):
            # DuckDB's own types may be wider: a sum of int64 is a 128-bit integer there.
            yield batch if batch.schema.equals(schema) else batch.cast(schema)

    def rows(self, expression: ir.Table) -> list[dict[str, Any]]:
        """The rows of a small result."""
        return [row for batch in self.batches(expression) for row in batch.to_pylist()]

    def row(self, expression: ir.Table) -> dict[str, Any]:
        """The one row of an aggregate."""
        (row,) = self.rows(expression)
        return row

    def sql(self, expression: ir.Table) -> str:
        """What this engine runs for `expression`."""
        return str(ibis.to_sql(expression, dialect=self.dialect))


def quoted(text: str) -> str:
    """`text` as a string literal of SQL."""
    return "'" + text.replace("'", "''") + "'"
