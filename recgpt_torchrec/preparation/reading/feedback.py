"""Tells clicks from what was shown, disliked or skipped, and reads places in a list: Ibis expressions, any engine."""

from typing import Any

import ibis
import ibis.expr.types as ir

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.data.segments import DISLIKED, EXPOSED, INTERACTED, SKIPPED
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.engines.engine import Engine

LARGEST_PLACE = 2**15 - 1
"""Places beyond this one are stored as this one."""


def segment_of(usable: ir.Table, config: Prepare) -> Any:
    """The segment id of each usable row, int8: clicked, shown, disliked or skipped."""
    if not config.click_column:
        return ibis.literal(INTERACTED, "int8")
    click = usable.click
    kinds: list[tuple[Any, int]]
    if config.click_values:
        words = ((config.click_values, INTERACTED), (config.dislike_values, DISLIKED), (config.skip_values, SKIPPED))
        kinds = [(click.isin(values), segment) for values, segment in words if values]
    else:
        kinds = [(click >= config.click_from, INTERACTED)]
        ranges = ((config.dislike_to, DISLIKED), (config.skip_to, SKIPPED))
        ends = sorted((to, segment) for to, segment in ranges if to is not None)
        kinds += [(click <= to, segment) for to, segment in ends]  # the lower range first
    return ibis.cases(*kinds, else_=EXPOSED).cast("int8")


def count_exposed(engine: Engine, config: Prepare, usable: ir.Table, rows: int, is_later_day: bool = False) -> int:
    """Count the usable rows, of `rows`, that were not clicked: shown, disliked or skipped.

    Args:
        engine: holds the rows.
        config: options of the stage.
        usable: the rows.
        rows: their number.
        is_later_day: whether a day before had rows of all words and ranges of the options, so that this one need not.

    Raises:
        InputError: these are all rows or none, although there is a click column; or a word or a range of an option is
            in no row.
    """
    if not config.click_column or not rows:
        return 0
    segment = segment_of(usable, config)
    sums = {name: (segment == of).cast("int64").sum() for name, of in (("disliked", DISLIKED), ("skipped", SKIPPED))}
    by_value = usable.group_by("click").agg(n=usable.count(), shown=(segment != INTERACTED).cast("int64").sum(), **sums)
    values = engine.rows(by_value.order_by(ibis.desc("n"), "click").limit(20))
    total = engine.row(by_value.agg(**{name: by_value[name].sum() for name in ("shown", "disliked", "skipped")}))
    if is_later_day and total["shown"] < rows:
        return int(total["shown"])
    counts = ", ".join(f"{row['click']} ({row['n']:,})" for row in values)
    for option in ("click_values", "dislike_values", "skip_values"):
        if not (words := getattr(config, option)):
            continue
        known = engine.rows(by_value.filter(by_value.click.isin(words)).select("click"))
        if missing := [word for word in words if word not in [row["click"] for row in known]]:
            raise InputError(
                f"--{option} {','.join(words)}: no row has {' or '.join(map(repr, missing))} in "
                f"{config.click_column}, whose values are {counts}. Give words of that column"
            )
    if config.click_values and not 0 < total["shown"] < rows:
        raise InputError(
            f"--click_values {','.join(config.click_values)} are all values of {config.click_column}: {counts}. Name "
            "those that are clicks, or leave --click_column out, where the log holds interactions only"
        )
    clicks = (
        {"lowest": 0.0, "highest": 0.0}
        if config.click_values
        else engine.row(usable.agg(lowest=usable.click.min(), highest=usable.click.max()))
    )
    lowest, highest = (f"{clicks[name]:g}" for name in ("lowest", "highest"))
    range_ = f"always {lowest}" if lowest == highest else f"from {lowest} to {highest}"
    if not 0 < total["shown"] < rows:
        outcome = "every row was only shown" if total["shown"] else "no row was only shown, all were clicked"
        raise InputError(
            f"--click_column {config.click_column} does not tell shown rows from clicked ones: {outcome}, as its "
            f"values in {rows:,} usable rows are {range_} and a click is at least {config.click_from:g}. Give another "
            "--click_from or another column"
            + ("" if total["shown"] else "; or leave --click_column out, where the log holds interactions only")
        )
    for option, name in (("dislike_to", "disliked"), ("skip_to", "skipped")):
        if (to := getattr(config, option)) is not None and not total[name]:
            raise InputError(
                f"--{option} {to:g}: no row of {config.click_column} is in that range, as its values are {range_}. "
                f"Give another --{option}, or leave it out"
            )
    return int(total["shown"])


def place_columns(usable: ir.Table, config: Prepare, timed: bool) -> dict[str, Any]:
    """Columns of places, where they are asked for: `list_place` int16, 0 where it is unknown; and with times
    `list_order` int16, which puts unknown places last."""
    if not config.position_column:
        return {}
    place = ibis.least(usable.position - (config.position_from - 1), float(LARGEST_PLACE)).cast("int16")
    unknown = usable.position.isnull()
    columns = {"list_place": ibis.cases((unknown, 0), else_=place).cast("int16")}
    if timed:
        columns["list_order"] = ibis.cases((unknown, LARGEST_PLACE), else_=place).cast("int16")
    return columns


def check_places(engine: Engine, config: Prepare, usable: ir.Table) -> list[str]:
    """Check the values of the position column; returns notes on what is stored otherwise.

    Raises:
        InputError: none is a number, or some are below the first place or no whole number.
    """
    column, first = config.position_column, config.position_from
    if column is None:
        return []
    given = usable.filter(usable.position.notnull())
    low, whole = given.position < first, given.position.floor() == given.position
    too_large = given.position - (first - 1) > LARGEST_PLACE
    found = engine.row(
        given.agg(
            rows=given.count(),
            low=low.cast("int64").sum(),
            least=given.position.min(),
            broken=(~whole).cast("int64").sum(),
            example=ibis.cases((~whole, given.position)).min(),
            large=too_large.cast("int64").sum(),
        )
    )
    if not found["rows"]:
        raise InputError(
            f"--position_column {column}: no usable row has a number in it; name the column with an item's place in "
            "the list in which it was shown, or leave the option out"
        )
    if found["broken"]:
        raise InputError(
            f"--position_column {column}: {found['broken']:,} rows have a place that is no whole number, such as "
            f"{found['example']:g}; name the column with an item's place in the list in which it was shown"
        )
    if found["low"]:
        zero = (
            f"if places are counted from 0, pass --position_from 0; else leave these rows out: --where '{column} > 0'"
        )
        remedy = zero if first == 1 else f"give the number of the first place: --position_from {found['least']:.0f}"
        raise InputError(
            f"--position_column {column}: {found['low']:,} rows have a place below {first}, the least is "
            f"{found['least']:.0f}; {remedy}"
        )
    if not found["large"]:
        return []
    return [f"{found['large']:,} places are beyond {LARGEST_PLACE:,}, the largest that is stored, and became that one"]
