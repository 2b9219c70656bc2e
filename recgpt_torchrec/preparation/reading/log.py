"""Reads raw interaction logs of every format into one table of events, and rejects rows that cannot be used.

Knows nothing of filtering, ids or the dataset's format.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import ibis.expr.types as ir

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.engines.duckdb_engine import DuckDBEngine
from recgpt_torchrec.preparation.engines.engine import Engine
from recgpt_torchrec.preparation.engines.spark_engine import SparkEngine
from recgpt_torchrec.preparation.reading import understanding
from recgpt_torchrec.preparation.reading.dialect import shorten
from recgpt_torchrec.preparation.reading.duckdb_reader import check_time_format, open_file
from recgpt_torchrec.preparation.reading.event_types import EventTypes, find_event_types
from recgpt_torchrec.preparation.reading.feedback import check_places, count_exposed, place_columns, segment_of
from recgpt_torchrec.preparation.reading.files import InputFile, InputFiles
from recgpt_torchrec.preparation.reading.loading import load_files, order_rejected
from recgpt_torchrec.preparation.reading.rows import FILTERED, SILENT, UNKNOWN
from recgpt_torchrec.preparation.reading.spark_loading import load_on_spark, open_on_spark

NAMES = {"csv": "a table in text", "jsonl": "lines of JSON", "sequences": "histories"}
"""Formats in messages."""


@dataclass(kw_only=True)
class RawLog:
    """A log in the engine: its usable rows, and what was rejected."""

    events: ir.Table
    """Usable rows: user string, item string, time int64 (null without times), fraction float64 (of a second),
    order int64 (rises from row to row of the input), segment int8, and, where they were asked for, rating float64,
    event int16 (see `EventTypes`) and the columns of `feedback.place_columns`."""
    exposed: int
    """Number of usable rows that were not clicked; the others are interactions."""
    timed: bool
    rows: int
    """Number of rows read: usable, left out by --where, and rejected."""
    filtered: int
    """Number of rows that --where left out."""
    uncomputed: int
    """Number of these for which the condition could not be computed."""
    rejected: dict[str, int]
    """Number of rejected rows by reason."""
    rejected_rows: ir.Table
    """These rows, numbered in order: number, file, row, reason, text (see `loading.list_rejected`)."""
    files: list[InputFile]
    first_rows: list[int]
    """[files] value of `order` of each file's first row."""
    event_types: EventTypes | None = None
    """None: no column of event types was asked for."""
    page: list[list[str]]
    """What was understood of the log, in lines of a label and a text."""
    time_unit: float | None = None
    """Seconds of a unit of the times; None: it is not known, or there are none."""


def read_log(
    engine: Engine,
    config: Prepare,
    inputs: InputFiles,
    known_events: Sequence[str] = (),
    is_later_day: bool = False,
) -> RawLog:
    """Read every file into the engine.

    Args:
        engine: where the rows are stored.
        config: options of the stage.
        inputs: the files, in the order in which they are read.
        known_events: event types of the dataset that is extended, which keep their ids.
        is_later_day: whether it is appended to a day with the same options, see `count_exposed`.

    Raises:
        InputError: a file is not of its format or lacks a column, no row can be used, the column that should tell
            clicked rows from shown ones does not, or that of event types holds none.
    """
    files = inputs.files
    check_time_format(config)
    spark = engine if isinstance(engine, SparkEngine) else None
    dialects = [open_file(file, config) for file in files] if spark is None else open_on_spark(spark, config, files)
    formats = {dialect.format for file, dialect in zip(files, dialects, strict=True) if file.bytes}
    _check_options(config, formats)
    if config.time_column is not None and "sequences" in formats and len(formats) > 1:
        raise InputError(
            "--input mixes files of the format sequences, which have no times, with others that have them; "
            "prepare them separately"
        )
    timed = config.time_column is not None and "sequences" not in formats
    if config.hold_out == "time" and not timed:
        raise InputError(
            f"--hold_out time: {files[0].path} is of the format sequences, which has no times; give --hold_out last, "
            "or a log with a time in each row"
        )
    if spark is not None:
        loaded = load_on_spark(spark, config, files, dialects, timed)
    else:
        assert isinstance(engine, DuckDBEngine)
        loaded = load_files(engine, config, files, dialects, timed)
    table, malformed = loaded.table, loaded.rejected.filter(loaded.rejected.malformed)
    usable = table.filter(table.problem.isnull())
    columns = ["user", "item", "time", "fraction", "order", *(["rating"] if config.rating_column else [])]
    rejected = {row["problem"]: row["n"] for row in engine.rows(table.group_by("problem").agg(n=table.count()))}
    rows, unknown = rejected.pop(None, 0), rejected.get(UNKNOWN, 0)
    event_types, typed = None, {}
    if config.event_column and rows:
        event_types = find_event_types(engine, config, usable, [*known_events])
        typed = {"event": event_types.encode(usable.event)}
    filtered = rejected.get(FILTERED, 0) + unknown
    for problem in SILENT:
        rejected.pop(problem, None)
    for row in engine.rows(malformed.group_by("reason").agg(n=malformed.count())):
        rejected[row["reason"]] = rejected.get(row["reason"], 0) + row["n"]
    result = RawLog(
        events=usable.select(
            *columns, segment=segment_of(usable, config), **typed, **place_columns(usable, config, timed)
        ),
        exposed=count_exposed(engine, config, usable, rows, is_later_day),
        timed=timed,
        rows=rows + filtered + sum(rejected.values()),
        filtered=filtered,
        uncomputed=unknown,
        rejected=dict(sorted(rejected.items())),
        files=files,
        rejected_rows=order_rejected(loaded.rejected),
        first_rows=loaded.first_rows,
        event_types=event_types,
        page=[],
    )
    names = files[0].path if len(files) == 1 else f"the {len(files)} input files"
    if result.rows == 0:
        raise InputError(f"{names}: empty, there are no rows to prepare")
    remedies = understanding.remedies(engine, config, loaded, result.rejected)
    if rows == 0:
        counts = {**result.rejected, FILTERED: filtered - unknown, UNKNOWN: unknown}
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.items() if count)
        examples = engine.rows(result.rejected_rows.filter(result.rejected_rows.number == 0))
        example = "".join(
            f". For example {each['file']}, row {each['row']}: {shorten(each['text'])}" for each in examples
        )
        advice = "".join(f"; {remedy}" for remedy in remedies)
        raise InputError(f"{names}: none of the {result.rows:,} rows can be used ({reasons}){example}{advice}")
    result.page, result.time_unit = understanding.page(engine, config, loaded, inputs, remedies)
    result.page += [["note", note] for note in check_places(engine, config, usable)]
    return result


def _check_options(config: Prepare, formats: set[str]) -> None:
    """Raise an `InputError` if an option is given that none of the files' formats can follow."""
    given = [
        ("--separator", config.separator is not None, {"csv"}),
        ("--quote", config.quote is not None, {"csv"}),
        ("--header false", not config.header, {"csv"}),
        ("--escape", config.escape is not None, {"csv"}),
        ("--encoding", config.encoding != "utf-8", {"csv", "jsonl", "sequences"}),
    ]
    columns = {
        "--click_column": config.click_column,
        "--rating_column": config.rating_column,
        "--event_column": config.event_column,
        "--position_column": config.position_column,
        "--where": config.where,
        "--time_format": config.time_format,
        "--time_unit": None if config.time_unit == "auto" else config.time_unit,
        "--partition_columns": config.partition_columns or None,
        "--list_separator": config.list_separator,
    }
    for option, is_given, needed in given:
        if is_given and formats and not formats & needed:
            raise InputError(
                f"{option} is given, but no file of --input is {' or '.join(NAMES[f] for f in sorted(needed))}"
            )
    for option, value in columns.items():
        if value is not None and "sequences" in formats:
            raise InputError(
                f"{option} {value}: files of the format sequences have no columns; leave the option out, or give a log "
                "with a row for each event"
            )
