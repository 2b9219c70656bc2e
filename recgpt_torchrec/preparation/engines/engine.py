"""What `prepare` asks of an engine: to store the tables of Ibis expressions, return small results, and write parts.

Ibis is the language and the compiler; an engine runs the SQL. Beside the engines only the reading of raw files
(`reading/`) and the writing of parts depend on which one it is.
"""

import tempfile
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.fs

from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.writing import Layout
from recgpt_torchrec.storage.parts import Part

T = TypeVar("T")
BATCH_ROWS = 65_536
"""Maximum number of rows per batch of a result."""
REMEDY = "give another folder with --scratch"
"""What to do where an engine cannot write its temporary tables."""


class Engine(Protocol):
    """Runs Ibis expressions over the tables that it stores.

    Example:
        with DuckDBEngine("/tmp") as engine:
            active = engine.save("active", table.filter(table.n > 1))
    """

    dialect: str
    """Ibis's name for the SQL of the engine."""
    scratch: str | Path
    """Folder of what it writes until it is closed: a local path, or a URI that all its workers reach."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Drop every table and remove what the engine wrote to its scratch folder."""

    @abstractmethod
    def save(self, name: str, expression: ir.Table) -> ir.Table:
        """Store the result of `expression` as the table `name`, and return that table for further expressions.

        The rows of a stored table have no order.
        """

    @abstractmethod
    def fill_from(
        self, name: str, sources: Sequence[T], read: Callable[[T], Iterable[pa.Table]], schema: pa.Schema
    ) -> ir.Table:
        """Store the Arrow tables that `read` makes of each source as the table `name`, and return that table.

        Args:
            name: of the table.
            sources: for example parts of a dataset; there is at least one.
            read: gives the tables of a source; where an engine has many workers, each reads some of the sources.
            schema: of the tables.
        """

    @abstractmethod
    def drop(self, *names: str) -> None:
        """Drop tables, so that their space on disk is free again."""

    @abstractmethod
    def write_parts(
        self, rows: ir.Table, layout: Layout, fs: pyarrow.fs.FileSystem, root: str, total: int
    ) -> list[Part]:
        """Write rows as the Parquet parts of a folder; every engine writes the same files, byte for byte.

        Args:
            rows: the columns of `layout`.
            layout: the folder, and which rows are in which file.
            fs: file system of `root`.
            root: folder above that of the layout.
            total: number of rows, to show progress.
        """

    @abstractmethod
    def rows(self, expression: ir.Table) -> list[dict[str, Any]]:
        """The rows of a small result, in its order."""

    def row(self, expression: ir.Table) -> dict[str, Any]:
        """The one row of an aggregate."""
        (row,) = self.rows(expression)
        return row

    def count(self, expression: ir.Table) -> int:
        """Number of rows of `expression`."""
        return int(self.row(expression.agg(n=expression.count()))["n"])

    def sql(self, expression: ir.Table) -> str:
        """`expression` as SQL of this engine."""
        return str(ibis.to_sql(expression, dialect=self.dialect))


def make_scratch(parent: str, remedy: str = REMEDY) -> str:
    """A new local folder in `parent` for what an engine writes until it is closed.

    Args:
        parent: an existing folder.
        remedy: what to do if it cannot be written to.

    Raises:
        InputError: `parent` cannot be written to.
    """
    try:
        return tempfile.mkdtemp(prefix=".prepare-", dir=parent)
    except OSError as error:
        raise InputError(f"cannot write temporary tables to {parent}: {error}; {remedy}") from None


def quote_sql(text: str) -> str:
    """`text` as a string literal of SQL, as DuckDB reads it."""
    return "'" + text.replace("'", "''") + "'"
