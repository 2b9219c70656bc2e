"""Buckets of numbers: edges at quantiles, and the bucket of each number."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import ibis
import ibis.expr.types as ir

from recgpt_torchrec.preparation.engines.engine import Engine
from recgpt_torchrec.preparation.moments import find_moment

FEW = 2**12
"""Number of distinct numbers that are returned as they are."""
LARGE = 2.0**1000
"""From here on differences of numbers may be infinite: quantiles are looked for among the numbers divided by four,
which loses digits of those below 1e-300 alone."""


def find_edges(engine: Engine, numbers: ir.Table, buckets: int) -> list[float]:
    """The upper edges of quantile buckets, rising, without the last: bucket b holds numbers from edge b - 1 up to, and
    without, edge b.

    Infinite numbers have no part in it; they fall into the first and the last bucket. Equal numbers are in one bucket,
    so there may be fewer than asked for: one, where all are equal.

    Args:
        engine: that holds the numbers.
        numbers: column `number` float64, without NaN.
        buckets: maximum number of buckets.
    """
    finite = numbers.filter(~numbers.number.isinf()).select("number")
    ends = engine.row(finite.agg(n=finite.count(), low=finite.number.min(), high=finite.number.max()))
    count = int(ends["n"])
    if not count or ends["low"] == ends["high"]:
        return []
    places = [number * count // buckets for number in range(1, buckets)]
    by_number = finite.group_by("number").agg(n=finite.count())
    if engine.count(by_number) <= FEW:
        found = _find_few(engine.rows(by_number.order_by("number")), places)
    else:
        scale = 4.0 if max(abs(ends["low"]), abs(ends["high"])) >= LARGE else 1.0
        moments = finite.select(whole=ibis.literal(0, "int64"), fraction=finite.number / scale)
        found = [find_moment(engine, moments, place).fraction * scale for place in dict.fromkeys(places)]
    return [edge + 0.0 for edge in sorted(set(found)) if edge > ends["low"]]


def _find_few(rows: Sequence[dict[str, Any]], places: Sequence[int]) -> list[float]:
    """The numbers at places of the sorted numbers, given each distinct one and its count, in order."""
    found, below, remaining = [], 0, list(places)
    for row in rows:
        below += row["n"]
        while remaining and remaining[0] < below:
            found.append(row["number"])
            remaining.pop(0)
    return found


def number_bucket(number: Any, edges: Sequence[float]) -> Any:
    """The bucket of a number: how many edges are at or below it, int32."""
    # As text, which every engine reads as the very same number; a literal may be a decimal to it.
    terms: list[Any] = [(ibis.literal(repr(edge)).cast("float64") <= number).cast("int32") for edge in edges]
    while len(terms) > 1:  # in pairs: a sum of hundreds of terms is nested too deeply for an engine
        terms = [sum(terms[place + 1 : place + 2], terms[place]) for place in range(0, len(terms), 2)]
    return (terms[0] if terms else ibis.literal(0)).cast("int32")


def fingerprint_edges(entity: str, name: str, edges: Sequence[float]) -> str:
    """32 hex digits that identify the buckets of an attribute."""
    assert all(map(math.isfinite, edges))
    return hashlib.sha256(f"{entity}-{name}:{','.join(map(repr, edges))}".encode()).hexdigest()[:32]
