"""Features of time: gaps in buckets, hour and weekday of the request. Knows nothing of files.

A token knows its own time and that of its request, the next interaction in training, never the item there. Gaps are in
seconds times the unit that `Inputs` records; hour and weekday are UTC plus its offset.
"""

from typing import TYPE_CHECKING

import numpy as np

from recgpt_torchrec.data.inputs.spec import UNITS, Inputs
from recgpt_torchrec.data.ragged import Int64

if TYPE_CHECKING:
    from recgpt_torchrec.data.inputs.features import Entries

NAMES = dict(zip(UNITS, ("seconds", "milliseconds", "microseconds", "nanoseconds", "minutes", "days"), strict=True))
DAY, HOUR = 86_400, 3_600
"""In seconds."""
OLDEST, NEWEST = 631_152_000, 4_102_444_800
"""Seconds from 1970 to the begin of 1990 and of 2100: times of a log lie between."""
EDGES = 2.0 ** (np.arange(57) / 2)
"""[57] float64 seconds: lower edges of the buckets of gaps but for the first, two per octave up to 8.5 years."""
VALUES = {"past_gap": EDGES.size + 2, "next_gap": EDGES.size + 2, "hour": 25, "weekday": 8}
"""Number of values of each feature. All have 0 where the time is unknown; 1 is a gap below a second, the hour from
midnight on, or Monday."""


def unit_name(seconds: float) -> str:
    """The word for a unit of so many seconds."""
    return next(NAMES[name] for name, length in UNITS.items() if length == seconds)


def guess_unit(oldest: int, newest: int) -> float | None:
    """Seconds of the unit in which times since 1970 lie in the years 1990 to 2099; None: no unit, or a rare one.

    Seconds, milliseconds, microseconds and nanoseconds are told apart; minutes and days could be small counters.
    """
    for name in ("s", "ms", "us", "ns"):
        per_second = round(1 / UNITS[name])
        if OLDEST * per_second <= oldest and newest < NEWEST * per_second:
            return UNITS[name]
    return None


def bucket_gaps(gaps: Int64, unit: float) -> Int64:
    """Buckets of gaps, [n] int64 from 1 on: 1 below a second, then two per octave; the last has no end.

    Args:
        gaps: [n] int64; negative ones count as 0.
        unit: seconds of a unit of the gaps.
    """
    return np.searchsorted(edges_of_gaps(unit), gaps, side="right") + 1


def edges_of_gaps(unit: float) -> Int64:
    """Lower edges of the buckets from the second on, ascending, in a unit of so many seconds."""
    edges = EDGES * round(1 / unit) if unit < 1 else EDGES / unit
    return np.ceil(edges).astype(np.int64)


def past_gaps(entries: "Entries") -> Int64:
    """Bucket of the time from the interaction before each token to the token, [tokens] int64; 0: it is the first."""
    times, before = _times_of(entries), entries.preceding
    gaps = bucket_gaps(times[entries.tokens] - times[np.maximum(before, 0)], entries.inputs.time_unit)
    return np.where(before >= 0, gaps, 0)


def next_gaps(entries: "Entries") -> Int64:
    """Bucket of the time from each token to its request, [tokens] int64; 0: the time of the request is unknown."""
    requests, known = request_times(entries)
    gaps = bucket_gaps(requests - _times_of(entries)[entries.tokens], entries.inputs.time_unit)
    return np.where(known, gaps, 0)


def hours(entries: "Entries") -> Int64:
    """Hour of the day of each token's request, [tokens] int64 from 1 (midnight) to 24; 0: its time is unknown."""
    requests, known = request_times(entries)
    of_day = _local(requests, entries) % units_of(DAY, entries.inputs)
    return np.where(known, of_day * 24 // units_of(DAY, entries.inputs) + 1, 0)


def weekdays(entries: "Entries") -> Int64:
    """Day of the week of each token's request, [tokens] int64 from 1 (Monday) to 7; 0: its time is unknown."""
    requests, known = request_times(entries)
    day = _local(requests, entries) // units_of(DAY, entries.inputs)
    return np.where(known, (day + 3) % 7 + 1, 0)  # 1970 began on a Thursday


def request_times(entries: "Entries") -> tuple[Int64, "np.ndarray"]:
    """The time of the request after each token, [tokens] int64, and whether it is known, [tokens] bool."""
    of_sequences = entries.histories.request_times
    known = np.full(entries.tokens.size, True) if of_sequences is not None else entries.following >= 0
    if of_sequences is None:
        of_sequences = np.zeros(entries.histories.users.size, np.int64)
    return entries.of_request(_times_of(entries), of_sequences), known


def _times_of(entries: "Entries") -> Int64:
    times = entries.histories.times
    assert times is not None, "histories without times"
    return times


def _local(times: Int64, entries: "Entries") -> Int64:
    return times + offset_of_zone(entries.inputs)


def units_of(seconds: int, inputs: Inputs) -> int:
    """So many seconds in units of the times."""
    return max(round(seconds / inputs.time_unit), 1)


def offset_of_zone(inputs: Inputs) -> int:
    """What is added to times for hour and weekday, in their unit; a day of a log in days has no zone."""
    return 0 if inputs.time_unit >= DAY else round(inputs.utc_offset_hours * HOUR / inputs.time_unit)
