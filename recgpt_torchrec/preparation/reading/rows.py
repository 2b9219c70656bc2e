"""Parses the rows of a raw log, or says why one cannot be used: Ibis expressions, for any engine.

A key has one spelling, whatever type a file gives it: 12, 12.0 and "12.0" are the key 12, and NaN, NULL and the words
of `--null_words` are no key. No cast can fail: what cannot be read is null, and `problem` names it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ibis
import ibis.expr.datatypes as dt
import ibis.expr.types as ir

BLANK = "blank line"
"""Problem of a line that holds nothing; such lines are neither read nor counted as rejected."""
FILTERED = "left out by --where"
"""Problem of a row that does not meet `--where`; such rows are counted, but not as rejected."""
UNKNOWN = "left out, as --where cannot be computed"
"""The same of a row whose values are missing, or of another type than the condition takes."""
SILENT = (BLANK, FILTERED, UNKNOWN)
"""Problems that are no fault of a row."""
DATE_TIME, RESPELLED, UNREAD_RATING, INEXACT, SEVERAL_LINES, UNREAD_POSITION = 1, 2, 4, 8, 16, 32
"""Flags of a row: its time is a date-time and not a number; a key was read as a whole number (12.0 as 12); its rating
could not be read; a key is a float so large that it may stand for several ids; it spans several lines of the file; its
place could not be read."""


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """How rows are parsed; see the options of the same names."""

    timed: bool
    rated: bool
    labelled: bool
    """Whether there is a click column."""
    typed: bool = False
    """Whether there is a column of event types."""
    placed: bool = False
    """Whether there is a position column."""
    null_words: Sequence[str] = ()
    time_format: str | None = None
    click_values: Sequence[str] = ()


@ibis.udf.scalar.builtin(name="floor")
def _floor(number: float) -> float:  # type: ignore[empty-body]  # Ibis's own casts to int64, which fails for NaN
    """The engine's own."""


@ibis.udf.scalar.builtin(name="strlen")
def _bytes(text: str) -> int:  # type: ignore[empty-body]  # Ibis's own counts characters, which takes longer
    """The engine's own."""


@ibis.udf.scalar.builtin(name="try_strptime")
def _strptime(text: str, format: str) -> dt.Timestamp(timezone="UTC"):  # type: ignore[valid-type]
    """The engine's own; null where the text is not of the format."""


def steps(source: ir.Table, options: RowOptions) -> list[ir.Table]:
    """The three steps of parsing: `mark_values`, `parse_values`, `judge_rows`, each over the table of the one before.

    Steps, so that what several values need is computed once: an engine computes the same expression once per use.
    Reading 3 million rows of text takes 4.7 s of CPU time in three steps, 7.1 s in one.

    Args:
        source: columns `user`, `item`, `time`, `rating`, `click`, `event` and `position` as they are in the file (any
            type), `fault` (what the reader found wrong, or null), `text` (the whole row, to be shown), `several_lines`
            boolean and `row` int64.
        options: what is asked for, and how it is read.

    Returns:
        The steps, over tables named source, marked and parsed. The last has the columns user string, item string, time
        int64, fraction float64, rating float64, position float64, click (float64, or string with `click_values`),
        event string (null where there is none), problem string and text string (both null for usable rows), flags int8
        and row int64.
    """
    marked = mark_values(source, options)
    values = parse_values(ibis.table(marked.schema(), name="marked"), options)
    return [marked, values, judge_rows(ibis.table(values.schema(), name="parsed"), options)]


def spell_key(column: Any, null_words: Sequence[str]) -> Any:
    """A column of any type as keys, spelled as those of a log; null where there is none."""
    return _parse_key(column, _is_respelled(column), null_words)


def mark_values(source: ir.Table, options: RowOptions) -> ir.Table:
    """Add what several values need.

    Returns:
        The source with `whole`, the time as int64 if it is written as a plain whole number, else null; `time_text`, the
        time without blanks around it if it is text and not such a number, else null; `user_respelled` and
        `item_respelled`, whether keys are whole numbers written like 12.0.
    """
    whole: Any = ibis.null("int64")
    time_text: Any = ibis.null("string")
    if options.timed and source.time.type().is_string():
        if options.time_format is None:
            number = ibis.cases((~source.time.contains("-"), source.time.try_cast("int64")), else_=whole)
            is_plain = number.cast("string") == source.time
            if numeric := _numeric_words(options.null_words):
                is_plain = is_plain & ~source.time.isin(numeric)
            whole = ibis.cases((is_plain, number), else_=whole)
        time_text = ibis.cases((whole.isnull(), source.time.strip()), else_=time_text)
    return source.mutate(
        whole=whole,
        time_text=time_text,
        user_respelled=_is_respelled(source.user),
        item_respelled=_is_respelled(source.item),
    )


def parse_values(marked: ir.Table, options: RowOptions) -> ir.Table:
    """Parse each value by itself; null where there is none or it cannot be read. `..._raw` are the values as given."""
    words = options.null_words
    time, fraction, dated = ibis.null("int64"), ibis.literal(0.0), ibis.literal(0, "int8")
    if options.timed:
        is_text = marked.time.type().is_string()
        time, fraction, dated = _parse_time(marked.time_text if is_text else marked.time, options.time_format)
        if _numeric_words(words):
            time = ibis.cases((is_empty(marked.time, words), ibis.null("int64")), else_=time)
        time = ibis.cases((marked.whole.notnull(), marked.whole), else_=time)
        fraction = ibis.cases((marked.whole.notnull(), 0.0), else_=fraction.fill_null(0.0))
        dated = ibis.cases((marked.whole.notnull(), ibis.literal(0, "int8")), else_=dated)
    click: Any = ibis.null("string" if options.click_values else "float64")
    if options.labelled:
        if options.click_values:
            click = _parse_word(marked.click, words)
        else:
            click = parse_number(marked.click)
    rating, unread = ibis.null("float64"), ibis.literal(0, "int8")
    if options.rated:
        rating = parse_number(marked.rating)
        unread = _flag(rating.isnull() & ~is_empty(marked.rating, words), UNREAD_RATING)
    position = ibis.null("float64")
    if options.placed:
        position = parse_number(marked.position)
        unread += _flag(position.isnull() & ~is_empty(marked.position, words), UNREAD_POSITION)
    flags = dated + unread + _flag(marked.several_lines, SEVERAL_LINES)
    flags += _flag(marked.user_respelled | marked.item_respelled, RESPELLED)
    inexact = _is_inexact(marked.user, marked.user_respelled) | _is_inexact(marked.item, marked.item_respelled)
    flags += _flag(inexact, INEXACT)
    return marked.select(
        "fault",
        "text",
        "row",
        user=_parse_key(marked.user, marked.user_respelled, words),
        item=_parse_key(marked.item, marked.item_respelled, words),
        time=time,
        fraction=fraction,
        rating=rating,
        position=position,
        click=click,
        event=_parse_word(marked.event, words) if options.typed else ibis.null("string"),
        flags=flags.cast("int8"),
        **{f"{name}_raw": marked[name] for name in ("user", "item", "time", "click")},
    )


def judge_rows(values: ir.Table, options: RowOptions) -> ir.Table:
    """Say why a row cannot be used: `problem`, null for usable rows."""
    words = options.null_words
    problems: list[tuple[Any, Any]] = [(values.fault.notnull(), values.fault)]
    for name in ("user", "item"):
        raw, problem = values[f"{name}_raw"], ibis.literal(f"no {name}")
        if raw.type().is_string() and words:
            named = ibis.literal(f"no {name} (") + raw + ")"
            problem = ibis.cases((raw.isin(words), named), else_=problem)
        problems.append((values[name].isnull(), problem))
    asked = {"time": ("time", options.timed), "click": ("click value", options.labelled)}
    for name, (words_for_it, is_asked) in asked.items():
        if is_asked:
            empty = is_empty(values[f"{name}_raw"], words)
            reason = ibis.cases((empty, f"no {words_for_it}"), else_=f"unreadable {words_for_it}")
            problems.append((values[name].isnull(), reason))
    problem = ibis.cases(*problems, else_=ibis.null("string"))
    shown = problem.notnull() & ~problem.isin((FILTERED, UNKNOWN))
    names = ("user", "item", "time", "fraction", "rating", "position", "click", "event", "flags", "row")
    text = ibis.cases((shown, values.text), else_=ibis.null("string"))
    return values.select(*names, problem=problem, text=text)


def _flag(condition: Any, flag: int) -> Any:
    return ibis.cases((condition, ibis.literal(flag, "int8")), else_=ibis.literal(0, "int8"))


def _as_text(column: Any) -> Any:
    return column if column.type().is_string() else column.cast("string")


def _numeric_words(words: Sequence[str]) -> list[str]:
    """The null words that are numbers."""
    return [word for word in words if re.fullmatch(r"[+-]?[0-9]+(\.[0-9]+)?", word)]


def _is_word(text: Any, words: Sequence[str]) -> Any:
    """Whether text is one of the null words; most keys are told by their length or first character alone."""
    if not words:
        return ibis.literal(False)
    is_short = _bytes(text) <= max(len(word.encode()) for word in words)
    if any("0" <= word < ":" for word in words):
        return is_short & text.isin(words)
    return is_short & ((text < "0") | (text >= ":")) & text.isin(words)


def is_empty(column: Any, words: Sequence[str]) -> Any:
    """Whether a column has no value: null, blank, NaN or one of the null words."""
    kind, numeric = column.type(), _numeric_words(words)
    if kind.is_string():
        return column.isnull() | ((column < "!") & (column.strip() == "")) | _is_word(column, words)
    empty = column.isnull() | column.isnan() if kind.is_floating() else column.isnull()
    return empty | _parse_key(column, ibis.literal(False), ()).isin(numeric) if numeric and kind.is_numeric() else empty


def _parse_key(column: Any, respelled: Any, words: Sequence[str]) -> Any:
    """Keys as strings; null where there is none. 12.0, as pandas writes a column with gaps, is the key 12."""
    key = _spell_key(column, respelled, words)
    numeric = _numeric_words(words)
    return ibis.cases((key.isin(numeric), ibis.null("string")), else_=key) if numeric else key


def _parse_word(column: Any, words: Sequence[str]) -> Any:
    """The words of a column, spelled like keys but without blanks around them; null where there is none."""
    given = column.strip() if column.type().is_string() else column
    return _parse_key(given, _is_respelled(given), words)


def _spell_key(column: Any, respelled: Any, words: Sequence[str]) -> Any:
    kind = column.type()
    if kind.is_floating():
        whole = column.try_cast("int64")
        is_whole = (whole.cast("float64") == column) & (column.abs() < 1e16)  # from here on, as programs write it
        return ibis.cases(
            (column.isnan() | column.isinf(), ibis.null("string")),
            (is_whole, whole.cast("string")),
            else_=column.cast("string"),
        )
    if kind.is_integer():
        return column.cast("string")
    text = _as_text(column)
    whole_text = text.re_extract(r"^(-?[0-9]+)\.0+$", 1)
    # Only text that sorts before "!" can be blank. Stripping nothing else took the reading of 3 million rows from 4.0 s
    # to 1.3 s.
    blank_or_not = ibis.cases((text.strip() == "", ibis.null("string")), else_=text)
    return ibis.cases(
        (text < "!", blank_or_not),
        (_is_word(text, words), ibis.null("string")),
        (respelled, ibis.cases((whole_text == "-0", "0"), else_=whole_text)),
        else_=text,
    )


def _is_respelled(column: Any) -> Any:
    """Whether a key in text is a whole number with a decimal point, such as 12.0."""
    kind = column.type()
    if not (kind.is_string() or kind.is_decimal()):
        return ibis.literal(False)
    text = _as_text(column)
    looks = text.endswith("0") & text.contains(".")
    return ibis.cases((looks, text.re_search(r"^-?[0-9]+\.0+$")), else_=False)


def _is_inexact(column: Any, respelled: Any) -> Any:
    """Whether a float key is beyond the whole numbers that its type tells apart."""
    kind = column.type()
    if kind.is_string():  # JSON's numbers are doubles on the way
        return ibis.cases((respelled, _bytes(column) > 17), else_=False)
    if not kind.is_floating():
        return ibis.literal(False)
    return column.abs() >= float(2 ** (24 if kind.is_float32() else 53))


def parse_number(column: Any) -> Any:
    """A column as float64, true as 1 and false as 0; null where it is no number."""
    kind = column.type()
    if kind.is_numeric() or kind.is_boolean():
        number = column.cast("float64")
    else:
        text = _as_text(column).strip().lower()
        number = ibis.cases((text == "true", 1.0), (text == "false", 0.0), else_=text.try_cast("float64"))
    return ibis.cases((number.isnan(), ibis.null("float64")), else_=number)


def _parse_time(column: Any, format: str | None) -> tuple[Any, Any, Any]:
    """Times as whole units int64 and the fraction of a unit float64, both null where they cannot be read; the flag.

    Numbers keep their unit. Date-times become seconds since 1970 (UTC where no offset is given). Text has no blanks
    around it.
    """
    kind = column.type()
    none, no_flag = ibis.null("int64"), ibis.literal(0, "int8")
    if format is not None and not (kind.is_timestamp() or kind.is_date()):
        text = column if kind.is_string() else _spell_key(column, ibis.literal(False), ())
        parsed = _strptime(text, format)
        # %Y reads two digits as a year of the first century.
        moment = ibis.cases((parsed.year().between(1000, 9999), parsed), else_=ibis.null(parsed.type()))
        seconds = moment.epoch_seconds().cast("int64")
        micros = moment.strftime("%f").try_cast("float64") / 1e6
        return seconds, micros, ibis.literal(DATE_TIME, "int8")
    if kind.is_integer():
        return column.try_cast("int64"), ibis.literal(0.0), no_flag
    if kind.is_floating() or kind.is_decimal():
        number = column.cast("float64")
        floor = _floor(number)
        return floor.try_cast("int64"), number - floor, no_flag
    if not kind.is_string():
        moment = column.try_cast(dt.Timestamp("UTC"))
        return _seconds(moment), _fraction_of(column.cast("string")), ibis.literal(DATE_TIME, "int8")
    integer = column.re_search(r"^[+-]?[0-9]+$").ifelse(column.try_cast("int64"), none)
    number = column.re_search(r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$").ifelse(
        column.try_cast("float64"), ibis.null("float64")
    )
    floor = _floor(number)
    # Years have four digits: 31-12-18 is no day of the year 31.
    is_moment = column.re_search(r"^[0-9]{4}-")
    moment = column.try_cast(dt.Timestamp("UTC"))
    time = ibis.cases((is_moment, _seconds(moment)), else_=ibis.coalesce(integer, floor.try_cast("int64")))
    fraction = ibis.cases((is_moment, _fraction_of(column)), (integer.notnull(), 0.0), else_=number - floor)
    return time, fraction, _flag(is_moment, DATE_TIME)


def _seconds(moment: Any) -> Any:
    return moment.truncate("s").epoch_seconds().cast("int64")


def _fraction_of(text: Any) -> Any:
    """The fraction of a second of a date-time in text."""
    digits = text.re_extract(r":[0-9][0-9]\.([0-9]+)", 1)
    return ibis.cases((text.contains("."), (ibis.literal("0.") + digits).try_cast("float64")), else_=0.0)
