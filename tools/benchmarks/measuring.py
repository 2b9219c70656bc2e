"""Compares ways of doing one thing within one run: in turn, in rounds, with medians and spread.

Other work on a machine slows all ways alike if they take turns, so a ratio is formed within each round, and the median
of the rounds' ratios counts. This file knows nothing of what is measured.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

Figures = dict[str, float]
"""What one turn of one way gives, by name: rates end in `_s`, seconds in `seconds`, milliseconds in `ms`."""


CONTEXT = ("seconds", "cores", "calls", "flops_s")
"""Figures of a turn that the table leaves out."""


class Ratio(NamedTuple):
    """A ratio of two figures of one round."""

    over: tuple[str, str]
    """Way and figure."""
    under: tuple[str, str]
    """Way and figure."""
    goal: float | None = None
    """What it is meant to reach at least; None: it is only shown."""


@dataclass
class Kind:
    """Something to measure: several ways that take turns."""

    ways: dict[str, Callable[[], Figures]]
    """One turn of each way, by name."""
    ratios: dict[str, Ratio] = field(default_factory=dict)
    """By the words that the table shows."""
    shown: tuple[str, ...] = ()
    """Figures that the table shows; the JSON file has all. None named: all but the context of a turn."""


@dataclass
class Measured:
    """The figures of a kind so far."""

    kind: Kind
    turns: dict[str, list[Figures]] = field(default_factory=dict)
    """By way, one per round."""

    def ratio(self, ratio: Ratio) -> list[float]:
        """The ratio of each round."""
        over, under = ([turn[figure] for turn in self.turns.get(way, [])] for way, figure in (ratio.over, ratio.under))
        return [a / b for a, b in zip(over, under, strict=False) if b]

    def to_json(self) -> dict[str, Any]:
        """Figures and ratios as JSON values: median, smallest, largest, and the value of each round."""
        ways = {
            way: {name: summary([turn[name] for turn in turns]) for name in turns[0]}
            for way, turns in self.turns.items()
        }
        ratios = {
            name: {**summary(self.ratio(ratio)), "goal": ratio.goal}
            for name, ratio in self.kind.ratios.items()
            if self.ratio(ratio)
        }
        return {"ways": ways, "ratios": ratios}


def summary(values: list[float]) -> dict[str, Any]:
    """Median, smallest and largest of values, and the values."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": values}


def take_turns(measured: dict[str, Measured], round_number: int, say: Callable[[str], None]) -> None:
    """One round: one turn of each way of each kind, each time beginning with another one.

    Args:
        measured: kinds by name; the figures are added to them.
        round_number: from 0.
        say: called with the name of what is measured next.
    """
    for name in rotated(list(measured), round_number):
        of_kind = measured[name]
        for way in rotated(list(of_kind.kind.ways), round_number):
            say(f"round {round_number + 1}: {name}, {way}")
            of_kind.turns.setdefault(way, []).append(of_kind.kind.ways[way]())


def rotated(names: list[str], by: int) -> list[str]:
    """The names in the same cyclic order, beginning with another one: a b c, b c a, c a b."""
    first = by % max(1, len(names))
    return names[first:] + names[:first]


@contextmanager
def stopwatch() -> Iterator[Figures]:
    """Fill in `seconds` and `cores`, the processor time of this process per second, of what runs within the `with`."""
    figures: Figures = {}
    since, used = time.perf_counter(), time.process_time()
    yield figures
    figures["seconds"] = time.perf_counter() - since
    figures["cores"] = (time.process_time() - used) / figures["seconds"]


def repeat(function: Callable[[], float], seconds: float) -> Figures:
    """Call a function until some seconds are over; `rate_s` is the sum of what it returned, per second."""
    total, calls = 0.0, 0
    with stopwatch() as figures:
        since = time.perf_counter()
        while not calls or time.perf_counter() - since < seconds:
            total += function()
            calls += 1
    return {"rate_s": total / figures["seconds"], "calls": calls, **figures}


def table(measured: dict[str, Measured]) -> str:
    """All figures and ratios as text: median and, in brackets, smallest and largest."""
    lines = []
    for name, of_kind in measured.items():
        lines.append(f"\n{name}")
        values = of_kind.to_json()
        width = max(map(len, values["ways"]), default=0)
        for way, figures in values["ways"].items():
            names = of_kind.kind.shown or [figure for figure in figures if figure not in CONTEXT]
            shown = ", ".join(f"{figure} {_shown(figures[figure])}" for figure in names if figure in figures)
            lines.append(f"  {way:<{width}}  {shown}")
        for ratio, value in values["ratios"].items():
            goal = "" if value["goal"] is None else f"; goal {value['goal']:g}"
            lines.append(f"  = {ratio}: {value['median']:.2f} ({value['min']:.2f}-{value['max']:.2f}{goal})")
    return "\n".join(lines)


def _shown(value: dict[str, Any]) -> str:
    median = value["median"]
    return f"{_number(median)} ({_number(value['min'])}-{_number(value['max'])})"


def _number(value: float) -> str:
    if value >= 1e9:
        return f"{value / 1e9:,.1f}G"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "device": name,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write(path: str, measured: dict[str, Measured], settings: dict[str, Any]) -> None:
    """Write all that is measured so far as JSON; the file is whole at any moment."""
    kinds = {name: of_kind.to_json() for name, of_kind in measured.items() if of_kind.turns}
    text = json.dumps({"machine": machine(), "settings": settings, "kinds": kinds}, indent=1)
    with open(f"{path}.tmp", "w") as file:
        file.write(text + "\n")
    os.replace(f"{path}.tmp", path)
