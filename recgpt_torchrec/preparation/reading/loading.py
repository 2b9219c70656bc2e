"""Loads the files of a log into tables of an engine: its rows, and those that cannot be used.

Here into DuckDB; `spark_loading.py` does the same with many readers at once.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import ibis
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.preparation.engines.duckdb_engine import DuckDBEngine
from recgpt_torchrec.preparation.queries import BUCKET_CODES, number_rows
from recgpt_torchrec.preparation.reading.dialect import Dialect
from recgpt_torchrec.preparation.reading.duckdb_reader import MALFORMED, DuckDBReader, FileReport
from recgpt_torchrec.preparation.reading.files import InputFile
from recgpt_torchrec.preparation.reading.rows import SILENT
from recgpt_torchrec.preparation.writing import NUMBER
from recgpt_torchrec.progress import progress_bar

REJECTED = pa.schema(
    [
        ("file", pa.string()),
        ("row", pa.int64()),
        ("reason", pa.string()),
        ("text", pa.string()),
        ("malformed", pa.bool_()),
        ("place", pa.int64()),
    ]
)
"""Schema of `list_rejected`. `place` puts the rows of the same `malformed` in the order of the input."""
LISTED = ("file", "row", "reason", "text")
"""The columns of `REJECTED` that users see."""
FILE_ROWS = 2**40
"""Rows and lines of a file that `place` leaves room for."""


@dataclass(kw_only=True)
class LoadedLog:
    """The files of a log in tables of an engine, and how each was understood."""

    table: ir.Table
    """Every row, with the columns of `log_table`; `order` rises from row to row of the input, with gaps."""
    rejected: ir.Table
    """The rows that cannot be used, and lines that cannot be split into columns, which are not in `table`: columns of
    `REJECTED`."""
    reports: list[FileReport]
    first_rows: list[int]
    """[files] value of `order` of each file's first row."""


def load_files(
    engine: DuckDBEngine, config: Prepare, files: Sequence[InputFile], dialects: Sequence[Dialect], timed: bool
) -> LoadedLog:
    """Load files into DuckDB, one after the other.

    Args:
        engine: where the rows are stored.
        config: options of the stage.
        files: in the order of the input.
        dialects: [files] how each is read.
        timed: whether rows have times.

    Raises:
        InputError: a file is not of its format, or lacks a column.
    """
    reader = DuckDBReader(engine, config, timed)
    total = sum(file.bytes for file in files)
    with progress_bar(total, "bytes", unit_scale=True, desc="reading: ", leave=False) as bar:
        for file, dialect in zip(files, dialects, strict=True):
            bar.set_postfix_str(os.path.basename(file.path))
            reader.load(file, dialect)
            bar.update(file.bytes)
    rejected = engine.fill("rejected", list_rejected(engine, reader, files), REJECTED)
    return LoadedLog(table=reader.table, rejected=rejected, reports=reader.reports, first_rows=reader.first_rows)


def list_rejected(engine: DuckDBEngine, reader: DuckDBReader, files: Sequence[InputFile]) -> Iterator[pa.Table]:
    """The rejected rows of loaded files, in tables of the schema `REJECTED`.

    `row` is the line of a text file or the row of a Parquet file, both from 1. In a CSV file it is too small by the
    blank lines and the line breaks inside quotes that precede it.
    """
    paths = np.array([file.path for file in files], dtype=object)
    first_rows = np.array(reader.first_rows)
    header_lines = [report.dialect.header_lines for report in reader.reports]
    lines: dict[int, list[int]] = {}
    for batch in engine.batches(MALFORMED.order_by("file", "line")):
        rows = batch.to_pydict()
        for file, line in zip(rows["file"], rows["line"], strict=True):
            lines.setdefault(file, []).append(line)
        places = np.array(rows["file"]) * FILE_ROWS + np.array(rows["line"])
        named = paths[rows["file"]].tolist()
        columns = [named, rows["line"], rows["reason"], rows["text"], np.ones(len(places), dtype=bool), places]
        yield pa.table(columns, schema=REJECTED)
    table = reader.table
    bad = table.filter(table.problem.notnull(), ~table.problem.isin(SILENT)).order_by("order")
    for batch in engine.batches(bad.select("problem", "text", "order", "row")):
        order = batch.column("order").to_numpy()
        of_files = np.searchsorted(first_rows, order, side="right") - 1
        rows_in_file = order - first_rows[of_files] + 1
        for number in np.unique(of_files):
            # Malformed lines are not among the rows counted here: add those that came before.
            malformed = np.array(lines.get(int(number), []), dtype=np.int64) - header_lines[number]
            before = malformed - 1 - np.arange(len(malformed))
            of_file = of_files == number
            rows_in_file[of_file] += (
                np.searchsorted(before, rows_in_file[of_file] - 1, side="right") + header_lines[number]
            )
        listed = batch.column("row").to_numpy(zero_copy_only=False)  # of rows that hold lists
        rows_in_file = np.where(np.isnan(listed), rows_in_file, np.nan_to_num(listed)).astype(np.int64)
        shown = [paths[of_files].tolist(), rows_in_file, batch.column("problem"), batch.column("text")]
        yield pa.table([*shown, np.zeros(len(order), dtype=bool), order], schema=REJECTED)


def order_rejected(rejected: ir.Table) -> ir.Table:
    """Number rejected rows, in a column `number` beside those that users see: first lines that cannot be split, both in
    the order of the input."""
    # As a float a place may round into the next bucket, but never past one that comes after it.
    bucket = rejected.place // BUCKET_CODES + ibis.cases((rejected.malformed, 0), else_=2**60)
    return number_rows(rejected.mutate(bucket=bucket), ["place"], NUMBER).select(NUMBER, *LISTED)
