"""Sections about training: curves, where a step's time goes, tables and sharding, options."""

import math
from collections.abc import Sequence

from recgpt_torchrec.reports.charts import Series, legend, line_chart, share_bar
from recgpt_torchrec.reports.markup import chip, details, dot, escape, section, table, tag
from recgpt_torchrec.reports.values import Points, RunValues

CURVES = (
    ("loss", "Loss (nats per target)", False, False),
    ("targets_per_s", "Targets per second", False, True),
    ("data_wait", "Wait for data (share of the time)", True, True),
    ("lr_share", "Learning rate (share of its peak)", True, True),
)
"""Curves by step: name, title, whether they are shares, and whether the axis begins at 0."""
METRICS = ("NDCG@10", "HR@10")
"""Validation figures that are drawn, beside those that decided which checkpoint is best."""


def curves_section(runs: Sequence[RunValues], colors: dict[str, str]) -> str:
    """Loss, validation, throughput and data wait by step."""
    charts = []
    for name, title, percent, zero in CURVES:
        series = [Series(run.name, colors[run.name], curve_of(run, name)) for run in runs]
        charts.append(line_chart(title, series, percent=percent, zero=zero))
    of_validation = []
    decided = [value for run in runs for name, value, _ in run.options if name == "train.metric"]
    for metric in dict.fromkeys((*METRICS, *decided)):
        series = [Series(run.name, colors[run.name], epoch_curve(run, metric), dots=True) for run in runs]
        of_validation.append(line_chart(f"Validation {metric}", series))
    shown = [chart for chart in (charts[0], *of_validation, *charts[1:]) if chart]
    bars = []
    for run in runs:
        split = next((line["split"] for line in reversed(run.epochs) if isinstance(line.get("split"), dict)), None)
        if split:
            shares = [
                (str(name), s) for name, s in split.items() if isinstance(s, float) and math.isfinite(s) and s >= 0
            ]
            name = tag("span", dot(colors[run.name]), escape(run.name))
            bars.append(tag("div", tag("p", name, class_="legend"), share_bar(shares)))
    if not shown and not bars:
        return ""
    parts = [legend([(run.name, colors[run.name]) for run in runs])] if len(runs) > 1 else []
    parts.append(tag("div", *shown, class_="charts"))
    if bars:
        parts += [tag("h3", "What a step's time goes into (rank 0, last epoch)"), *bars]
    return section("training", "Training", "By optimizer step.", *parts)


def curve_of(run: RunValues, name: str) -> Points:
    """A curve by step: of the steps where they are recorded, else of the epochs."""
    return run.steps.get(name) or epoch_curve(run, name)


def epoch_curve(run: RunValues, name: str) -> Points:
    """A figure of the lines of history.jsonl, by step."""
    points = [(line["step"], line.get(name)) for line in run.epochs]
    return [(float(step), y) for step, y in points if isinstance(y, float) and math.isfinite(y)]


def tables_section(runs: Sequence[RunValues], colors: dict[str, str]) -> str:
    """Sizes and sharding of every run's tables."""
    parts = []
    for run in runs:
        if run.tables:
            rows = [
                [
                    escape(each.table),
                    f"{each.rows:,} x {each.dim}",
                    escape(each.dtype),
                    escape(each.sharding),
                    escape(each.kernel),
                    f"{each.ranks:,}",
                    f"{each.bytes_per_rank / 2**20:,.1f}",
                ]
                for each in run.tables
            ]
            heading = ["Table", "Rows x dim", "Type", "Sharding", "Kernel", "Ranks", "MiB per rank"]
            parts.append(tag("h3", dot(colors[run.name]), escape(run.name)))
            parts.append(table(heading, rows, {1, 5, 6}, name=f"tables of {run.name}"))
    lead = "Weights and optimizer moments, on the rank that holds most of each table."
    return section("tables", "Tables and sharding", lead, *parts) if parts else ""


def runs_section(runs: Sequence[RunValues], colors: dict[str, str]) -> str:
    """What was run on what, and with which options."""
    parts = []
    for run in runs:
        state = chip(run.state, "good" if run.finished else "warn")
        facts = [("Folder", run.folder), ("Kind", run.kind), *run.facts]
        listed = [tag("dt", escape(name)) + tag("dd", escape(value)) for name, value in facts]
        changed = [
            tag("tr", tag("td", tag("code", escape(n))), tag("td", escape(v))) for n, v, is_new in run.options if is_new
        ]
        others = [
            tag("tr", tag("td", tag("code", escape(n))), tag("td", escape(v)))
            for n, v, is_new in run.options
            if not is_new
        ]
        parts += [
            tag("h3", dot(colors[run.name]), escape(run.name), " ", state),
            tag("dl", *listed),
            details(f"{len(changed)} options that are not the default", _options(changed)),
            details(f"{len(others)} options at their default", _options(others)),
        ]
    return section("runs", "What was run", "", *parts)


def _options(rows: Sequence[str]) -> str:
    return tag("div", tag("table", tag("tbody", *rows)), class_="scroll")
