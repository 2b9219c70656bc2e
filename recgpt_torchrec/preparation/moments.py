"""The time of the n-th interaction of a log, found by counting: no step sorts all times in one place."""

from typing import Any

import ibis
import ibis.expr.types as ir

from recgpt_torchrec.config.boundaries import Boundary
from recgpt_torchrec.preparation.engines.engine import Engine

RANGES = 2**16
"""Number of ranges that values are counted in at a time."""
FEW = 2**12
"""Number of rows that are sorted and returned as they are."""


def find_ends(engine: Engine, times: ir.Table) -> tuple[Boundary, Boundary]:
    """The earliest and the latest of `times`, columns `whole` int64 and `fraction` float64; there is at least one."""
    columns = ("whole", "fraction")
    first = times.order_by(*columns).limit(1)
    last = times.order_by(*map(ibis.desc, columns)).limit(1)
    return Boundary(**engine.row(first)), Boundary(**engine.row(last))


def find_moment(engine: Engine, times: ir.Table, place: int, ranges: int = RANGES, few: int = FEW) -> Boundary:
    """The time at a place, from 0, of the order of time.

    The range of values is cut into equal ones, and rows are counted in each; then the one that holds the place is cut
    again, until few rows or a single value are left. Times in seconds over years take three counts.

    Args:
        engine: that holds the times.
        times: columns `whole` int64 and `fraction` float64, more rows than `place`.
        place: of the time that is looked for.
        ranges: number of ranges that are counted at a time.
        few: maximum number of rows that are sorted.
    """
    for name in ("whole", "fraction"):
        found = engine.row(times.agg(low=times[name].min(), high=times[name].max(), n=times.count()))
        while found["n"] > few and found["low"] < found["high"]:
            number = number_range(times[name], found["low"], found["high"], ranges)
            counts = times.group_by(range=number).agg(low=times[name].min(), high=times[name].max(), n=times.count())
            for found in sorted(engine.rows(counts), key=lambda row: row["range"]):
                if place < found["n"]:
                    break
                place -= found["n"]
            times = times.filter(number == found["range"])
        if found["n"] <= few:
            break
    else:
        place = 0  # all rows that are left have the same time
    # Ibis writes an offset for Spark as a number of each row, in an order that may be another.
    first = engine.rows(times.order_by("whole", "fraction").limit(place + 1))
    return Boundary(**first[-1])


def number_range(value: Any, low: float, high: float, ranges: int) -> Any:
    """The number of the range that holds a value: rises with the value, 0 at `low` and `ranges` at `high`."""
    if isinstance(low, int) and high - low < 2**53:  # exact, where the values themselves may not be in floating point
        above, width = (value - low).cast("float64"), float(high - low)
    else:  # the difference of these may be beyond an int64
        above, width = value.cast("float64") - float(low), float(high) - float(low)
    return (above / width * float(ranges)).cast("int64")
