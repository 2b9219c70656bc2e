"""Parses the rows of a raw log, or says why one cannot be used: Ibis expressions, for any engine."""

from typing import Any

import ibis
import ibis.expr.datatypes as dt
import ibis.expr.types as ir

BLANK = "blank line"
"""Problem of a line that holds nothing; such lines are neither read nor counted as rejected."""


def parse_rows(source: ir.Table, *, timed: bool, rated: bool, labelled: bool) -> ir.Table:
    """Parse the rows of a source; `problem` says why a row cannot be used, or is null.

    Args:
        source: columns `user`, `item`, `time`, `rating` and `click` as they are in the file (any type), `fault`
            (what the reader found wrong, or null) and `text` (the whole row, to be shown).
        timed, rated, labelled: whether `time`, `rating` and `click` are asked for.

    Returns:
        user string, item string, time int64, fraction float64, rating float64, click float64, problem string, text
        string (null for usable rows).
    """
    user, item = _parse_key(source.user), _parse_key(source.item)
    time, fraction = _parse_time(source.time) if timed else (ibis.null("int64"), ibis.literal(0.0))
    problems = [(source.fault.notnull(), source.fault), (user.isnull(), "no user"), (item.isnull(), "no item")]
    if timed:
        empty = _parse_key(source.time) if source.time.type().is_string() else source.time
        problems += [(empty.isnull(), "no time"), (time.isnull(), "unreadable time")]
    click = ibis.null("float64")
    if labelled:
        click = _parse_number(source.click)
        empty = _parse_key(source.click) if source.click.type().is_string() else source.click
        problems += [(empty.isnull(), "no click value"), (click.isnull(), "unreadable click value")]
    problem = ibis.cases(*problems, else_=ibis.null("string"))
    rating = source.rating.try_cast("float64") if rated else ibis.null("float64")
    return source.select(
        user=user,
        item=item,
        time=time,
        fraction=fraction.fill_null(0.0),
        rating=rating,
        click=click,
        problem=problem,
        text=ibis.cases((problem.notnull(), source.text), else_=ibis.null("string")),
    )


def _parse_key(column: Any) -> Any:
    """Keys as strings; null where there is none. 12.0 in a float column (pandas, with gaps) is the key 12."""
    kind = column.type()
    if kind.is_floating():
        whole = column.round().try_cast("int64")
        text = ibis.cases(
            (column.isnan(), ibis.null("string")), (whole == column, whole.cast("string")), else_=column.cast("string")
        )
    else:
        text = column if kind.is_string() else column.cast("string")
    # Only text that sorts before "!" can be blank. Stripping nothing else took the reading of 3 million rows from 4.0 s
    # to 1.3 s.
    blank_or_not = ibis.cases((text.strip() == "", ibis.null("string")), else_=text)
    return ibis.cases((text < "!", blank_or_not), else_=text)


def _parse_number(column: Any) -> Any:
    """A column as float64, true as 1 and false as 0; null where it is no number."""
    kind = column.type()
    if kind.is_numeric() or kind.is_boolean():
        number = column.cast("float64")
    else:
        text = column.cast("string").strip().lower()
        number = ibis.cases((text == "true", 1.0), (text == "false", 0.0), else_=text.try_cast("float64"))
    return ibis.cases((number.isnan(), ibis.null("float64")), else_=number)


def _parse_time(column: Any) -> tuple[Any, Any]:
    """Times as whole units int64 and the fraction of a unit float64; both null where they cannot be read.

    Numbers keep their unit. Date-times become seconds since 1970 (UTC where no offset is given).
    """
    kind = column.type()
    if kind.is_integer():
        return column.try_cast("int64"), ibis.literal(0.0)
    if kind.is_floating() or kind.is_decimal():
        number = column.cast("float64")
        whole = number.floor().try_cast("int64")
        return whole, number - whole
    if kind.is_string():
        text = column.strip()
        integer = text.re_search(r"^[+-]?[0-9]+$").ifelse(text.try_cast("int64"), ibis.null("int64"))
        number = text.re_search(r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$").ifelse(
            text.try_cast("float64"), ibis.null("float64")
        )
        moment = text.re_search(r"^[0-9]+-").ifelse(text, ibis.null("string")).try_cast(dt.Timestamp("UTC"))
    else:
        text, integer, number = column.cast("string"), ibis.null("int64"), ibis.null("float64")
        moment = column.cast(dt.Timestamp("UTC"))
    seconds = moment.truncate("s").epoch_seconds().cast("int64")
    digits = text.re_extract(r":[0-9][0-9]\.([0-9]+)", 1)
    whole = ibis.coalesce(integer, number.floor().try_cast("int64"), seconds)
    fraction = ibis.cases(
        (integer.notnull(), 0.0),
        (number.notnull(), number - number.floor()),
        else_=(ibis.literal("0.") + digits).try_cast("float64"),
    )
    return whole, fraction
