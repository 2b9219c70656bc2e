"""Reads raw interaction logs of every format into one table of events, and rejects rows that cannot be used.

Knows nothing of filtering, ids or the dataset's format.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import ibis
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.data.segments import EXPOSED, INTERACTED
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.duckdb_reader import LOG, MALFORMED, DuckDBReader, shorten
from recgpt_torchrec.preparation.engine import DuckDBEngine
from recgpt_torchrec.preparation.inputs import InputFile
from recgpt_torchrec.preparation.rows import BLANK
from recgpt_torchrec.progress import progress_bar


@dataclass(kw_only=True)
class RawLog:
    """A log in the engine: its usable rows, and what was rejected."""

    events: ir.Table
    """Usable rows: user string, item string, time int64 (null without times), fraction float64 (of a second),
    order int64 (index in the input), segment int8, and rating float64 where a rating column was asked for."""
    exposed: int
    """Number of usable rows that were shown and not clicked; the others are interactions."""
    timed: bool
    rows: int
    """Number of rows read: usable and rejected."""
    rejected: dict[str, int]
    """Number of rejected rows by reason."""
    files: list[InputFile]
    first_rows: list[int]
    """[files] index in the input of each file's first row."""
    header_lines: list[int]


def read_log(engine: DuckDBEngine, config: Prepare, files: list[InputFile]) -> RawLog:
    """Read every file into the engine.

    Raises:
        InputError: a file is not of its format or lacks a column, no row can be used, or the column that should tell
            clicked rows from shown ones does not.
    """
    unlabelled = [file.path for file in files if file.format == "sequences"] if config.click_column else []
    if unlabelled:
        raise InputError(
            f"--click_column {config.click_column}: {unlabelled[0]} is of the format sequences, which has no columns "
            "and does not say what was shown; leave the option out, or give a log with a row for each event"
        )
    timed = config.time_column is not None and any(file.format != "sequences" for file in files)
    if timed and any(file.format == "sequences" for file in files):
        raise InputError(
            "--input mixes files of the format sequences, which have no times, with others that have them; "
            "prepare them separately"
        )
    reader = DuckDBReader(engine, config, timed)
    total = sum(file.bytes for file in files)
    with progress_bar(total, "bytes", unit_scale=True, desc="reading: ", leave=False) as bar:
        for index, file in enumerate(files):
            bar.set_postfix_str(os.path.basename(file.path))
            reader.load(index, file)
            bar.update(file.bytes)
    usable = LOG.filter(LOG.problem.isnull())
    segment = ibis.literal(INTERACTED, "int8")
    if config.click_column:
        segment = ibis.cases((usable.click < config.click_from, EXPOSED), else_=INTERACTED).cast("int8")
    columns = ["user", "item", "time", "fraction", "order", *(["rating"] if config.rating_column else [])]
    rejected = {row["problem"]: row["n"] for row in engine.rows(LOG.group_by("problem").agg(n=LOG.count()))}
    rows = rejected.pop(None, 0)
    rejected.pop(BLANK, None)
    for row in engine.rows(MALFORMED.group_by("reason").agg(n=MALFORMED.count())):
        rejected[row["reason"]] = rejected.get(row["reason"], 0) + row["n"]
    result = RawLog(
        events=usable.select(*columns, segment=segment),
        exposed=_count_exposed(engine, config, rows),
        timed=timed,
        rows=rows + sum(rejected.values()),
        rejected=dict(sorted(rejected.items())),
        files=files,
        first_rows=reader.first_rows,
        header_lines=reader.header_lines,
    )
    names = files[0].path if len(files) == 1 else f"the {len(files)} input files"
    if result.rows == 0:
        raise InputError(f"{names}: empty, there are no rows to prepare")
    if rows == 0:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in result.rejected.items())
        shown = next((batch.to_pylist()[0] for batch in rejected_rows(engine, result) if batch.num_rows), None)
        example = f". For example {shown['file']}, row {shown['row']}: {shorten(shown['text'])}" if shown else ""
        raise InputError(f"{names}: none of the {result.rows:,} rows can be used ({reasons}){example}")
    return result


def _count_exposed(engine: DuckDBEngine, config: Prepare, rows: int) -> int:
    """Count the usable rows, of `rows`, that were shown and not clicked.

    Raises:
        InputError: these are all rows or none, although there is a click column.
    """
    if not config.click_column or not rows:
        return 0
    usable = LOG.filter(LOG.problem.isnull())
    shown = (usable.click < config.click_from).cast("int64").sum()
    clicks = engine.row(usable.agg(shown=shown, lowest=usable.click.min(), highest=usable.click.max()))
    if 0 < clicks["shown"] < rows:
        return int(clicks["shown"])
    lowest, highest = (f"{clicks[name]:g}" for name in ("lowest", "highest"))
    values = f"always {lowest}" if lowest == highest else f"from {lowest} to {highest}"
    outcome = "every row was only shown" if clicks["shown"] else "no row was only shown, all were clicked"
    raise InputError(
        f"--click_column {config.click_column} does not tell shown rows from clicked ones: {outcome}, as its values in "
        f"{rows:,} usable rows are {values} and a click is at least {config.click_from:g}. Give another --click_from "
        "or another column"
        + ("" if clicks["shown"] else "; or leave --click_column out, where the log holds interactions only")
    )


def rejected_rows(engine: DuckDBEngine, log: RawLog) -> Iterator[pa.RecordBatch]:
    """The rejected rows: file, row, reason, text.

    `row` is the line of a text file or the row of a Parquet file, both from 1. In a CSV file it is too small by the
    blank lines and the line breaks inside quotes that precede it.
    """
    schema = pa.schema([("file", pa.string()), ("row", pa.int64()), ("reason", pa.string()), ("text", pa.string())])
    paths = np.array([file.path for file in log.files], dtype=object)
    lines: dict[int, list[int]] = {}
    for batch in engine.batches(MALFORMED.order_by("file", "line")):
        rows = batch.to_pydict()
        for file, line in zip(rows["file"], rows["line"], strict=True):
            lines.setdefault(file, []).append(line)
        yield pa.record_batch([paths[rows["file"]].tolist(), rows["line"], rows["reason"], rows["text"]], schema=schema)
    bad = LOG.filter(LOG.problem.notnull(), LOG.problem != BLANK).order_by("order")
    for batch in engine.batches(bad.select("problem", "text", "order")):
        order = batch.column("order").to_numpy()
        files = np.searchsorted(log.first_rows, order, side="right") - 1
        rows_in_file = order - np.array(log.first_rows)[files] + 1
        for file in np.unique(files):
            # Malformed lines are not among the rows counted here: add those that came before.
            malformed = np.array(lines.get(int(file), []), dtype=np.int64) - log.header_lines[file]
            before = malformed - 1 - np.arange(len(malformed))
            of_file = files == file
            rows_in_file[of_file] += (
                np.searchsorted(before, rows_in_file[of_file] - 1, side="right") + log.header_lines[file]
            )
        columns = [paths[files].tolist(), rows_in_file, batch.column("problem"), batch.column("text")]
        yield pa.record_batch(columns, schema=schema)
