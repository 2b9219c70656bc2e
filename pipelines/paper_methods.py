"""The report of `pipelines/paper.py`, beyond lists of ten: longer ones, coverage, methods compared user by user."""

from pathlib import Path
from typing import Any

from pipelines import paper_baselines
from pipelines.paper_figures import RAISED, TABLE_2
from pipelines.seed_tables import PROTOCOLS, Row, over_seeds, read_json, table

MODELS = TABLE_2 | RAISED
NAMES = {**MODELS, "cooccurrence": "co-occurrence", "popularity": "popularity"}
"""Methods in words, by path."""
AGAINST = (
    ("recgpt", "recgpt_1"),
    ("recgpt_1", "fine_tuning"),
    ("recgpt", "fine_tuning"),
    ("fine_tuning", "pretrain"),
    ("recgpt", "pretrain"),
    ("recgpt", "cooccurrence"),
    ("pretrain", "cooccurrence"),
    ("pretrain", "popularity"),
    ("pretrain_neighbours", "pretrain"),
)
"""Pairs of methods that are compared."""


def runs_of(recgpt: str) -> dict[str, str]:
    """The run that each method is measured with, given the prompt-tuned one."""
    runs = {path: recgpt if path.startswith("recgpt") else path for path in TABLE_2}
    return {path: runs.get(path.removesuffix("_neighbours"), "pretrain") for path in NAMES}


def collect_methods(folder: Path, seeds: list[int], recgpt: str, lists: list[int]) -> dict[str, Any]:
    """What the report shows beside lists of ten.

    Args:
        folder: of the data set.
        seeds: that are finished.
        recgpt: the prompt-tuned run, such as `k1/recgpt`.
        lists: lengths of further lists that were measured.

    Returns:
        lists: {path: {"masked": {"HR@5": mean and deviation over seeds, ...}, "unmasked": {...}}}.
        quality: {path: {length: {"coverage": ..., "novelty": ...}}}, first seed.
        paired: [{"path", "other", "metric", "value", "other_value", "difference", "low", "high", ...}], first seed.
    """
    files = {length: f"_{length}" for length in lists}
    by_seed = []
    for seed in seeds:
        figures: dict[str, Any] = {}
        for path, run in runs_of(recgpt).items():
            for ending in ("", *files.values()):
                results = (read_json(folder / f"seed{seed}/{run}_test{ending}.json") or {}).get("results", {})
                for how, values in results.get(path, {}).items():
                    figures.setdefault(path, {}).setdefault(how, {}).update(values)
        by_seed.append(figures)
    baselines = {path: figures for path, figures in by_seed[0].items() if path not in MODELS}
    over = over_seeds([{path: figures for path, figures in each.items() if path in MODELS} for each in by_seed])
    quality: dict[str, dict[int, Any]] = {}
    for path, run in runs_of(recgpt).items():
        for length, ending in {10: "", **files}.items():
            told = (read_json(folder / f"seed0/{run}_test{ending}.json") or {}).get("lists", {})
            if path in told.get("paths", {}):
                quality.setdefault(path, {})[length] = told["paths"][path]
    for name, result in paper_baselines.read_baselines(folder).items():
        baselines[name] = {how: result[how] for how in PROTOCOLS}
    return {
        "lists": over | over_seeds([baselines]),
        "quality": quality,
        "paired": [row for ending in ("", *files.values()) for row in compare_methods(folder, recgpt, ending)],
    }


def compare_methods(folder: Path, recgpt: str, ending: str) -> list[dict[str, Any]]:
    """Differences of methods over the same users with the first seed, with intervals by paired bootstrap."""
    from recgpt_torchrec.evaluation.comparing.comparison import Evaluation, compare

    runs = runs_of(recgpt)
    opened: dict[str, Evaluation] = {}
    for run in dict.fromkeys(runs.values()):
        if (file := folder / f"seed0/{run}_test{ending}.json").exists():
            opened[run] = Evaluation.open(str(file))
    rows = []
    for path, other in AGAINST:
        first, second = opened.get(runs[path]), opened.get(runs[other])
        if first is None or second is None:
            continue
        if path not in first.results.record.paths or other not in second.results.record.paths:
            continue
        for each in compare(first, second, pairs=[(path, other)]):
            sides = {"metric": each.metric, "value": each.value, "other_value": each.other_value}
            rows.append({"path": path, "other": other, **sides, **each.to_json()})
    return rows


def sections(report: dict[str, Any]) -> list[str]:
    """Sections: lists of every length, what they hold, and the methods compared user by user."""
    lines = ["## Lists of every length", ""]
    lines += [
        "Each user has one held-out item, so Recall@k is HR@k. Two-step lists of each length have their own m.",
        "",
    ]
    for name, measured in report["datasets"].items():
        columns = tuple(next(iter(measured["lists"].values()))["masked"])
        for how in PROTOCOLS:
            rows: list[Row] = [
                (NAMES.get(path, path), [figures[how].get(metric) for metric in columns])
                for path, figures in measured["lists"].items()
            ]
            lines += [f"### {name}, test, {how}", "", *table("", columns, rows), ""]
        lines += [*_quality(measured), *_paired(measured)]
    return lines


def _quality(measured: dict[str, Any]) -> list[str]:
    lengths = sorted({length for by_length in measured["quality"].values() for length in by_length}, key=int)
    heads = [f"{what}@{length}" for length in lengths for what in ("coverage", "novelty")]
    lines = [
        "Masked lists of up to 8,192 users, first seed. Coverage: share of the catalogue that is in a list. Novelty:"
    ]
    lines += ["mean of -log2 of the items' shares of the training interactions; less is nearer to what is popular.", ""]
    lines += ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for path, by_length in measured["quality"].items():
        cells = []
        for length in lengths:
            told = by_length.get(length)
            cells += ["–", "–"] if told is None else [f"{100 * told['coverage']:.1f}%", f"{told['novelty']:.2f}"]
        lines.append(f"| {NAMES[path]} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _paired(measured: dict[str, Any]) -> list[str]:
    lines = ["Differences over the same users, masked, first seed: 95% intervals by paired bootstrap.", ""]
    lines += ["| | metric | | | difference | interval | |", "|---|---|---|---|---|---|---|"]
    for row in measured["paired"]:
        sides = f"{row['value']:.4f} | {row['other_value']:.4f} | {row['difference']:+.4f}"
        interval = f"{row['low']:+.4f} to {row['high']:+.4f} | {'beyond chance' if row['beyond_chance'] else ''}"
        names = f"{NAMES[row['path']]} - {NAMES[row['other']]}"
        lines.append(f"| {names} | {row['metric']} | {sides} | {interval} |")
    return [*lines, ""]
