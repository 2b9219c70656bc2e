"""Figures over seeds, and tables of them in Markdown, for the reports of the pipelines."""

import json
import math
import statistics
from pathlib import Path
from typing import Any, TypeAlias

PROTOCOLS = {"masked": "items of the history do not compete", "unmasked": "every item competes"}
Row: TypeAlias = tuple[str, list[dict[str, Any] | None]]
"""Title of a row, and its figures, each with `mean` and `sd`; None: there is none."""


def mean_and_deviation(values: list[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (over n - 1; None for one value), and the values.

    Example: `mean_and_deviation([1.0, 3.0])` is `{"mean": 2.0, "sd": 1.414..., "values": [1.0, 3.0]}`.
    """
    if not values:
        raise ValueError("no value to take the mean of")
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": deviation, "values": values}


def over_seeds(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and deviation over seeds of every figure in the `results` of evaluations.

    Args:
        results: per seed, {PATH: {"masked": {"HR@5": ...}, "unmasked": {...}}}; paths that a seed lacks are left out.
    """
    paths = [path for path in results[0] if all(path in result for result in results)]
    return {
        path: {
            how: {
                metric: mean_and_deviation([result[path][how][metric] for result in results])
                for metric in results[0][path][how]
            }
            for how in results[0][path]
        }
        for path in paths
    }


def table(corner: str, columns: tuple[str, ...], rows: list[Row]) -> list[str]:
    """A Markdown table with the best of each column in bold. Rows may be short, or hold None."""
    best = [
        max((row[column]["mean"] for _, row in rows if column < len(row) and row[column]), default=math.nan)  # type: ignore[index]
        for column in range(len(columns))
    ]
    lines = [f"| {corner} | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for title, row in rows:
        shown = [
            "–" if figure is None else cell({**figure, "best": round(figure["mean"], 4) == round(best[column], 4)})
            for column, figure in enumerate(row)
        ]
        lines.append(f"| {title} | " + " | ".join(shown) + " |")
    return lines


def mark_best(figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures, with `best` in each."""
    best = max(figure["mean"] for figure in figures)
    return [{**figure, "best": figure["mean"] == best} for figure in figures]


def cell(figure: dict[str, Any], sign: str = "") -> str:
    """A mean, with its deviation if it has one."""
    text = f"{figure['mean']:{sign}.4f}"
    text = f"**{text}**" if figure.get("best") else text
    return text if figure["sd"] is None else f"{text} ± {figure['sd']:.4f}"


def read_json(path: Path) -> Any:
    """Contents of a JSON file; None if there is none."""
    return json.loads(path.read_text()) if path.exists() else None
