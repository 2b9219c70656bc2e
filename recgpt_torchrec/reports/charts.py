"""Charts as inline SVG, readable at any width: positions are shares of the width, texts are not scaled."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from recgpt_torchrec.reports.markup import dot, escape, tag
from recgpt_torchrec.reports.values import Estimate, Points

TICKS = 4
"""About how many ticks an axis has."""
HEIGHT = 180
"""Of a line chart, in pixels."""


@dataclass(frozen=True)
class Scale:
    """From values to shares of a length, in percent."""

    low: float
    high: float

    @classmethod
    def around(cls, values: Sequence[float], zero: bool = False) -> "Scale":
        """One that holds all values, and 0 if asked for, with round ends."""
        finite = [value for value in values if math.isfinite(value)] or [0.0]
        low, high = min(finite), max(finite)
        if zero:
            low, high = min(low, 0.0), max(high, 0.0)
        if high == low:
            low, high = low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5
        step = _round_step((high - low) / TICKS)
        return cls(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step)

    def at(self, value: float) -> float:
        """The place of a value, in percent."""
        return 100 * (value - self.low) / (self.high - self.low)

    @property
    def ticks(self) -> list[float]:
        """Round values from end to end."""
        step = _round_step((self.high - self.low) / TICKS)
        first, last = round(self.low / step), round(self.high / step)
        return [number * step for number in range(first, last + 1)]


def _round_step(size: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is at least `size`."""
    power = 10.0 ** math.floor(math.log10(size))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= size * (1 - 1e-9))


def short(value: float) -> str:
    """A number for an axis: 12k, 3.5, 0.012.

    Example: `short(12_500)` is `"12.5k"`
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.3g}" if abs(value) >= 1e-12 else "0"


@dataclass(frozen=True)
class Mark:
    """An estimate in a row of an interval chart."""

    estimate: Estimate
    color: str
    """Class of its colour."""
    label: str
    """For the tooltip."""
    hollow: bool = False


def interval_track(marks: Sequence[Mark], scale: Scale, reference: float | None = None) -> str:
    """A row of an interval chart: a dot per mark with a line over its interval, and a line at the reference."""
    height = 22 if len(marks) == 1 else 14 + 9 * len(marks)
    parts = [
        f'<line class="grid" x1="{scale.at(each):.2f}%" x2="{scale.at(each):.2f}%" y1="0" y2="{height}"/>'
        for each in scale.ticks
    ]
    if reference is not None:
        place = f"{scale.at(reference):.2f}%"
        parts.append(f'<line class="zero" x1="{place}" x2="{place}" y1="0" y2="{height}"/>')
    for number, mark in enumerate(marks):
        y = height / 2 if len(marks) == 1 else 11.5 + 9 * number
        at = scale.at(mark.estimate.value)
        line = ""
        if mark.estimate.low is not None and mark.estimate.high is not None:
            low, high = scale.at(mark.estimate.low), scale.at(mark.estimate.high)
            line = f'<line class="span" x1="{low:.2f}%" x2="{high:.2f}%" y1="{y}" y2="{y}"/>'
        shape = f'<circle class="{"hollow" if mark.hollow else "full"}" cx="{at:.2f}%" cy="{y}" r="4.5"/>'
        parts.append(f'<g class="{mark.color}"><title>{escape(mark.label)}</title>{line}{shape}</g>')
    return f'<svg class="track" width="100%" height="{height}" role="img">{"".join(parts)}</svg>'


def interval_axis(scale: Scale) -> str:
    """The ticks below rows of an interval chart."""
    texts = []
    for number, each in enumerate(scale.ticks):
        anchor = "start" if number == 0 else "end" if number == len(scale.ticks) - 1 else "middle"
        texts.append(f'<text x="{scale.at(each):.2f}%" y="12" text-anchor="{anchor}">{escape(short(each))}</text>')
    return f'<svg class="axis" width="100%" height="16" aria-hidden="true">{"".join(texts)}</svg>'


def describe(estimate: Estimate, digits: int = 4, sign: bool = False) -> str:
    """An estimate in words: 0.0702 (0.0671 to 0.0733)."""
    form = f"{'+' if sign else ''}.{digits}f"
    if estimate.low is None or estimate.high is None:
        return format(estimate.value, form)
    return f"{estimate.value:{form}} ({estimate.low:{form}} to {estimate.high:{form}})"


@dataclass(frozen=True)
class Series:
    """A line of a line chart."""

    name: str
    color: str
    points: Points
    dots: bool = False
    """Whether each point is marked: there are few."""


def line_chart(
    title: str, series: Sequence[Series], unit: str = "step", percent: bool = False, zero: bool = False
) -> str:
    """A line chart with its title; empty where no series has a point.

    Args:
        title: what the values are.
        series: the lines.
        unit: of x.
        percent: whether values are shares.
        zero: whether the axis begins at 0.
    """
    series = [each for each in series if each.points]
    if not series:
        return ""
    across = [x for each in series for x, _ in each.points]
    # x ends where the data ends; y has round ends.
    x = Scale(min(across), max(across) if max(across) > min(across) else min(across) + 1)
    y = Scale.around([value for each in series for _, value in each.points], zero)
    grid, labels = [], []
    for tick in y.ticks:
        top = 100 - y.at(tick)
        grid.append(f'<line class="grid" x1="0" x2="100%" y1="{top:.2f}%" y2="{top:.2f}%"/>')
        text = f"{tick:.3g}%" if not percent else f"{100 * tick:.3g}%"
        labels.append(tag("span", escape(text if percent else short(tick)), style=f"top:{top:.2f}%"))
    lines, dots = [], []
    for each in series:
        path = " ".join(f"{10 * x.at(a):.1f},{10 * (100 - y.at(b)):.1f}" for a, b in each.points)
        lines.append(f'<polyline class="{each.color}" points="{path}"/>')
        if each.dots or len(each.points) == 1:
            for a, b in each.points:
                told = (
                    f"{each.name}: {unit} {a:,.0f}, {100 * b:.1f}%"
                    if percent
                    else f"{each.name}: {unit} {a:,.0f}, {b:.5g}"
                )
                dots.append(
                    f'<circle class="{each.color} full" cx="{x.at(a):.2f}%" cy="{100 - y.at(b):.2f}%" r="3">'
                    f"<title>{escape(told)}</title></circle>"
                )
    plot = (
        f'<svg class="plot" width="100%" height="{HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(grid)}'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" width="100%" height="100%">{"".join(lines)}</svg>'
        f"{''.join(dots)}</svg>"
    )
    ends = tag("span", f"{unit} {x.low:,.0f}") + tag("span", f"{x.high:,.0f}")
    body = tag("div", tag("div", *labels, class_="ys"), plot, class_="frame")
    return tag("figure", tag("figcaption", escape(title)), body, tag("div", ends, class_="xs"), class_="chart")


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """Names beside dots: pairs of name and colour class."""
    return tag("p", *(tag("span", dot(color), escape(name)) for name, color in entries), class_="legend")


def share_bar(parts: Sequence[tuple[str, float]]) -> str:
    """A bar of shares that add up to 1, with its legend."""
    total = sum(share for _, share in parts) or 1.0
    blocks, names = [], []
    for number, (name, share) in enumerate(parts):
        told = f"{name} {100 * share / total:.1f}%"
        blocks.append(tag("i", class_=f"p{number}", style=f"width:{100 * share / total:.2f}%", title=told))
        names.append((told, f"p{number}"))
    return tag("div", *blocks, class_="shares", role="img", aria_label="shares of a step") + legend(names)
