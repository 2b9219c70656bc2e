"""What was understood of a log, for the page that `prepare` prints: formats, columns, times, and what to look at."""

import json
from bisect import bisect_right
from collections.abc import Sequence

import ibis.expr.types as ir

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.preparation.engines.engine import Engine
from recgpt_torchrec.preparation.reading.dialect import cells_of
from recgpt_torchrec.preparation.reading.duckdb_reader import FAULTS, MALFORMED_LINE, FileReport
from recgpt_torchrec.preparation.reading.files import InputFile, InputFiles
from recgpt_torchrec.preparation.reading.formats.lists import LOOKS_LIKE_LIST
from recgpt_torchrec.preparation.reading.loading import LoadedLog
from recgpt_torchrec.preparation.reading.rows import (
    DATE_TIME,
    INEXACT,
    RESPELLED,
    SEVERAL_LINES,
    UNREAD_POSITION,
    UNREAD_RATING,
)
from recgpt_torchrec.preparation.reading.times import (
    UNITS,
    choose_unit,
    describe_range,
    describe_unit,
    explain_unreadable,
)

Line = list[str]
"""A label and a text."""
NAMED = 3
"""Maximum number of files that a line names."""


def remedies(engine: Engine, config: Prepare, loaded: LoadedLog, rejected: dict[str, int]) -> list[str]:
    """What to do about rejected rows, by reason."""
    lines = []
    if "unreadable time" in rejected:
        lines.append(explain_unreadable(_unreadable_times(engine, loaded), config.time_format))
    if "unreadable click value" in rejected:
        lines.append(
            f"clicks are numbers, or true and false; for words in {config.click_column} pass --click_values WORD,WORD, "
            f"keep them as types of events (--event_column {config.click_column} without --click_column), or leave "
            "other rows out: --where \"COLUMN in ('WORD', 'WORD')\""
        )
    if FAULTS["INVALID ENCODING"] in rejected:
        lines.append("if the lines that are not UTF-8 are in another encoding, pass --encoding latin-1 or its name")
    if FAULTS["UNQUOTED VALUE"] in rejected:
        lines.append(
            "if quotes are part of the values, pass --quote none; if a backslash stands before a quote inside, pass "
            "--escape '\\'"
        )
    if MALFORMED_LINE in rejected and any(report.dialect.format == "csv" for report in loaded.reports):
        lines.append("a malformed line has more or fewer values than the first; its separator may be in a value")
    words = sum(count for reason, count in rejected.items() if reason.startswith("no ") and reason.endswith(")"))
    if words:
        lines.append(
            f"{words:,} rows hold a word for a missing value; if it is a key, give other --null_words, [] for none"
        )
    if "bytes that are not UTF-8" in rejected:
        lines.append("keys in bytes must be UTF-8 text; write others as text, such as hex digits")
    return lines


def page(
    engine: Engine,
    config: Prepare,
    loaded: LoadedLog,
    inputs: InputFiles,
    advice: Sequence[str],
) -> tuple[list[Line], float | None]:
    """The lines that say how the files were read and what was noticed; and seconds of the unit of times, see
    `choose_unit`."""
    files, left_out = inputs.files, inputs.left_out
    lines = _formats(loaded, files)
    if left_out:
        reason = "hidden, or with an unknown ending; name them to read them"
        lines.append(["left out", f"{_count(len(left_out), 'file')} ({reason}): {_names(left_out)}"])
    if inputs.repeated:
        lines.append(["left out", f"{_count(len(inputs.repeated), 'file')} named twice: {_names(inputs.repeated)}"])
    if empty := [file.path for file in files if not file.bytes]:
        lines.append(["left out", f"{_count(len(empty), 'empty file')}: {_names(empty)}"])
    table = loaded.table
    usable = table.filter(table.problem.isnull())
    flags = {
        name: ((usable.flags & flag) > 0).cast("int64").sum()
        for name, flag in {
            "dated": DATE_TIME,
            "respelled": RESPELLED,
            "unread": UNREAD_RATING,
            "unplaced": UNREAD_POSITION,
            "inexact": INEXACT,
            "several": SEVERAL_LINES,
        }.items()
    }
    scales = {
        unit: ((usable.time >= 10**8 * scale) & (usable.time < 10**10 * scale)).cast("int64").sum()
        for unit, scale in UNITS.items()
        if scale < 10**9
    }
    scales["nanoseconds"] = (usable.time >= 10**17).cast("int64").sum()
    found = engine.row(
        usable.agg(rows=usable.count(), low=usable.time.min(), high=usable.time.max(), **flags, **scales)
    )
    unit = None
    if found["low"] is not None:
        is_dated = found["dated"] == found["rows"]
        lines.append(["times", describe_range(found["low"], found["high"], is_dated, config.time_unit)])
        unit = choose_unit(config.time_unit, found["low"], found["high"], found["dated"], found["rows"])
        if words := describe_unit(config.time_unit, unit):
            lines.append(["time unit", words])
    lines += [["note", note] for note in _notes(config, found)]
    lines += [["note", note] for report in loaded.reports for note in report.notes]
    return lines + [["note", note] for note in advice], unit


def describe_keys(engine: Engine, config: Prepare, users: ir.Table, items: ir.Table) -> list[Line]:
    """Notes on keys that look as if they were read with something that does not belong to them.

    Args:
        engine: that holds the tables.
        config: options of the stage.
        users, items: each key of the log once, in a column `key`.
    """
    notes = []
    for name, keys in (("user", users), ("item", items)):
        odd = {
            "begin or end with a blank, which is kept": keys.key.strip() != keys.key,
            "begin with a quote; if values are quoted, name --quote": keys.key.startswith('"'),
            "look like lists; if they are, name --list_separator": keys.key.re_search(LOOKS_LIKE_LIST),
            "hold a zero byte": keys.key.contains("\0"),
            "are the name of their column; is its header repeated?": keys.key == getattr(config, f"{name}_column"),
        }
        counts = engine.row(keys.agg(**{f"n{n}": each.cast("int64").sum() for n, each in enumerate(odd.values())}))
        for count, what in zip(counts.values(), odd, strict=True):
            if count:
                notes.append(f"{count:,} keys of {name}s {what}")
    return [["note", note] for note in notes]


def _notes(config: Prepare, found: dict[str, int]) -> list[str]:
    notes = []
    if 0 < found["dated"] < found["rows"]:
        notes.append(
            f"{found['dated']:,} times are date-times, kept as seconds since 1970, and "
            f"{found['rows'] - found['dated']:,} are numbers: their order is right only if these are seconds as well"
        )
    units = [unit for unit in UNITS if found[unit]]
    if len(units) > 1:
        counts = " and ".join(f"{found[unit]:,} {unit}" for unit in units)
        notes.append(f"times look like {counts} since 1970: they are ordered as numbers, so give them one unit")
    if found["respelled"]:
        notes.append(f"{found['respelled']:,} rows have keys written like 12.0, which were read as 12")
    if found["inexact"]:
        notes.append(
            f"{found['inexact']:,} rows have keys in floating point beyond the whole numbers that it tells apart: "
            "several keys may have become one; write them as whole numbers or as text"
        )
    if found["several"]:
        notes.append(
            f"{found['several']:,} rows span several lines, with line breaks inside quotes; if quotes are part of the "
            "values, they swallow lines: pass --quote none"
        )
    if found["unread"]:
        notes.append(
            f"{found['unread']:,} ratings are no numbers and were left empty (--rating_column {config.rating_column})"
        )
    if found["unplaced"]:
        notes.append(
            f"{found['unplaced']:,} places are no numbers and were left unknown (--position_column "
            f"{config.position_column})"
        )
    return notes


def _formats(loaded: LoadedLog, files: Sequence[InputFile]) -> list[Line]:
    """How the files were read: one line per kind of file."""
    by_kind: dict[tuple[str, str], list[str]] = {}
    for file, report in zip(files, loaded.reports, strict=True):
        if file.bytes:
            columns = ", ".join(f"{role} {c.name!r} ({c.kind})" for role, c in report.columns.items())
            by_kind.setdefault((report.dialect.words, columns), []).append(file.path)
    lines = []
    for (words, columns), paths in by_kind.items():
        which = f"{_names(paths)}: " if len(by_kind) > 1 else ""
        lines.append(["read as", f"{which}{words}"])
        if columns:
            lines.append(["columns", columns])
    return lines


def _unreadable_times(engine: Engine, loaded: LoadedLog, count: int = 200) -> list[str]:
    """Some times that could not be read, as far as they can be found in the text of their rows."""
    table = loaded.table
    bad = table.filter(table.problem == "unreadable time").select("text", "order").limit(count)
    times = []
    for row in engine.rows(bad):
        time = _time_in(row["text"] or "", loaded.reports[bisect_right(loaded.first_rows, row["order"]) - 1])
        if time is not None and time.strip():
            times.append(time)
    return times


def _time_in(text: str, report: FileReport) -> str | None:
    """The time in the text of a row; None: it cannot be told."""
    column = report.columns["time"]
    if report.dialect.format == "csv":
        (cells,) = cells_of([text], report.dialect) or [[]]
        place = column.sql.removeprefix("c")
        return cells[int(place)] if place.isdigit() and len(cells) == report.places else None
    try:
        value = json.loads(text).get(column.name)
    except (ValueError, AttributeError):
        return None
    return value if isinstance(value, str) else None


def _names(paths: Sequence[str]) -> str:
    return ", ".join(paths[:NAMED]) + (f" and {len(paths) - NAMED:,} more" if len(paths) > NAMED else "")


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'s' * (number != 1)}"
