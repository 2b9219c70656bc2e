"""The report of `pipelines/paper.py`: the paper's baselines beside ours, with quality and time to train."""

from pathlib import Path
from typing import Any

from pipelines.paper_figures import TABLE_2, TEACHER
from pipelines.seed_tables import PROTOCOLS, Row, read_json, table

METRICS = ("HR@5", "NDCG@5", "HR@10", "NDCG@10")
OWN = {"pretrain": ("pretrain",), "fine_tuning": ("pretrain", "fine_tuning"), "recgpt": ("pretrain", "recgpt")}
"""Our paths in the table, and the runs that each takes the training of."""


def read_baselines(folder: Path) -> dict[str, Any]:
    """Results of `tools/compare_recbole.py` by model, given the folder of the data set; empty if it has not run."""
    return (read_json(folder / "baselines/report.json") or {}).get("models", {})


def section(report: dict[str, Any]) -> list[str]:
    """Section: figures on test and minutes of training, of every baseline that was trained and of ours."""
    measured = {name: each for name, each in report["datasets"].items() if each["trained_baselines"]}
    if not measured:
        return []
    lines = ["## The paper's baselines", ""]
    lines += ["Each was trained for some minutes at most, with seed 0, and chosen by NDCG@10 (masked) of validation"]
    lines += ["items (`tools/compare_recbole.py`). Its scores of all items are ranked as ours are. Our rows: mean over"]
    lines += ["seeds; minutes of the first seed, of teachers too, from the first step on, without validations.", ""]
    for name, each in measured.items():
        for how in PROTOCOLS:
            rows: list[Row] = [
                (title, [{"mean": result[how][metric], "sd": None} for metric in METRICS])
                for title, result in each["trained_baselines"].items()
            ]
            for path in OWN:
                rows.append((TABLE_2[path], [each["results"]["test"][path][how][metric] for metric in METRICS]))
            lines += [f"### {name}, test, {how}", "", *table("", METRICS, rows), ""]
        lines += [f"### {name}, time to train", "", *effort(each), ""]
    return lines


def effort(measured: dict[str, Any]) -> list[str]:
    """Rows of Markdown: minutes of training, to the best validation and in all."""
    heads = ("to the best, minutes", "without validations", "trained, minutes", "budget", "validation NDCG@10", "ended")
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for name, result in measured["trained_baselines"].items():
        best, settings = result["best"], result["settings"]
        seconds = (best["seconds"], best["train_s"], result["seconds"])
        cells = [f"{each / 60:.1f}" for each in seconds] + [f"{settings['minutes']:g}", f"{best['masked']:.4f}"]
        ended = "no better any more" if result["stopped"] == "early" else "time over"
        lines.append(f"| {name}, {settings['threads']} threads | " + " | ".join([*cells, ended]) + " |")
    runs = {run.partition("/")[2] or run: effort for run, effort in measured["training"][0].items()}
    teachers = [run for run in runs if run.startswith(TEACHER)]
    for path, parts in OWN.items():
        minutes = sum(runs[part]["train_s"] for part in (*teachers, *parts)) / 60
        figure = measured["results"]["validation"][path]["masked"]["NDCG@10"]["values"][0]
        lines.append(f"| {TABLE_2[path]} |  |  | {minutes:.1f} |  | {figure:.4f} |  |")
    return lines
