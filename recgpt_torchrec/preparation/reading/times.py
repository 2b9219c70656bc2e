"""What the times of a log are: their range in words, and formats for those that cannot be read."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime

from recgpt_torchrec.config.inputs.time import TimeUnit
from recgpt_torchrec.data.inputs.spec import UNITS as SECONDS
from recgpt_torchrec.data.inputs.times import guess_unit, unit_name
from recgpt_torchrec.errors import InputError

FORMATS = (
    "%d/%m/%Y",
    "%m/%d/%Y",
    "%Y/%m/%d",
    "%d-%m-%Y",
    "%m-%d-%Y",
    "%d.%m.%Y",
    "%d-%m-%y",
    "%m-%d-%y",
    "%y-%m-%d",
    "%d/%m/%y",
    "%m/%d/%y",
    "%d-%b-%Y",
    "%d-%b-%y",
    "%d %b %Y",
    "%b %d, %Y",
    "%B %d, %Y",
    "%m %d, %Y",
    "%d.%m.%y",
    "%Y-%m-%d",
)
"""Dates that logs hold beside ISO's."""
CLOCKS = (
    "",
    " %H:%M",
    " %H:%M:%S",
    " %H:%M:%S.%f",
    " %H:%M:%S,%f",
    "T%H:%M:%S,%f",
    " %I:%M %p",
    " %I:%M:%S %p",
    " %H:%M:%S %z",
)
WHOLE = (
    *("%a %b %d %H:%M:%S %z %Y", "%a, %d %b %Y %H:%M:%S %z", "%d/%b/%Y:%H:%M:%S %z", "[%d/%b/%Y:%H:%M:%S %z]"),
    *("%a %b %d %H:%M:%S %Y", "%Y%m%dT%H%M%SZ"),
)
"""Formats of Twitter, of mail, of web servers, of C's ctime, and ISO's without marks."""
UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
FORMS = "numbers, or date-times such as 2019-10-01, 2019-10-01 08:26:05 or 2019-10-01T08:26:05.123Z"


def suggest_formats(texts: Sequence[str]) -> list[str]:
    """Formats for `--time_format` that read all of some times; several if day and month could be either."""
    candidates = [*WHOLE, *(date + clock for date in FORMATS for clock in CLOCKS)]
    return [format for format in candidates if texts and all(_reads(text.strip(), format) for text in texts)]


def _reads(text: str, format: str) -> bool:
    try:
        return datetime.strptime(text, format).year > 1900
    except ValueError:
        return False


def explain_unreadable(texts: Sequence[str], given: str | None) -> str:
    """What to do about times that cannot be read, given some of them and `--time_format`."""
    if given is not None:
        example = f", such as {texts[0]!r}" if texts else ""
        return f"times that are not of --time_format '{given}'{example} cannot be read"
    formats = suggest_formats(texts)
    if not formats:
        others = f"; for others, such as {texts[0]!r}, give their --time_format" if texts else ""
        return f"times are {FORMS}{others}"
    options = " or ".join(f"--time_format '{format}'" for format in formats[:2])
    either = ": the log does not tell which of them is meant" if len(formats) > 1 else ""
    return f"times are {FORMS}; for {texts[0]!r} pass {options}{either}"


def describe_range(low: int, high: int, dated: bool, given: TimeUnit) -> str:
    """The range of a log's times in words, as moments in the unit `--time_unit`, or in one that they are likely in."""
    if dated:
        return f"{_date(low, 1)} to {_date(high, 1)} UTC, kept as seconds since 1970"
    words = f"numbers from {low:,} to {high:,}"
    if given != "auto":
        scale = 1 / SECONDS[given]
        return f"{words} (as {unit_name(SECONDS[given])} since 1970: {_date(low, scale)} to {_date(high, scale)} UTC)"
    unit = unit_of(low)
    if unit is not None and unit == unit_of(high):
        scale = float(UNITS[unit])
        words += f" (as {unit} since 1970: {_date(low, scale)} to {_date(high, scale)} UTC)"
    return words


def choose_unit(given: TimeUnit, low: int, high: int, dated: int, rows: int) -> float | None:
    """Seconds of the unit of a log's times; None: it is not known.

    Args:
        given: `--time_unit`.
        low, high: oldest and newest time.
        dated: number of times that are date-times, and so seconds.
        rows: number of times.

    Raises:
        InputError: another unit than seconds is given for date-times.
    """
    if given != "auto":
        if dated and SECONDS[given] != 1:
            raise InputError(
                f"--time_unit {given}: {dated:,} of {rows:,} times are date-times, which become seconds; leave the "
                "option out" + ("" if dated == rows else ", and give the numbers in seconds")
            )
        return SECONDS[given]
    return 1.0 if dated == rows else guess_unit(low, high)


def describe_unit(given: TimeUnit, unit: float | None) -> str | None:
    """The unit of a log's times in words, where their range does not say it; None: it does."""
    if unit is None:
        return "not known: give --time_unit, if pretrain is to read the times (--time.use)"
    return None if given == "auto" else f"{unit_name(unit)} (--time_unit {given})"


def unit_of(number: float) -> str | None:
    """The unit in which a time since 1970 is likely given: of the years 1973 to 2286, or none."""
    return next((unit for unit, scale in UNITS.items() if 1e8 <= number / scale < 1e10), None)


def _date(time: int, scale: float) -> str:
    try:
        return datetime.fromtimestamp(math.floor(time / scale), UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return str(time)
