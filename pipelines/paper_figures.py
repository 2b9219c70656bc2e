"""The figures of the report of `pipelines/paper.py`: the paper's Fig. 4 to 6, and all paths side by side."""

from pathlib import Path
from typing import Any

TEACHER = "teacher"
"""The run whose answers the pre-trained model learns."""
TABLE_2 = {"pretrain": "Pre-train", "fine_tuning": "Fine-tuning", "recgpt_1": "RecGPT_1", "recgpt": "RecGPT"}
"""Recall paths, and their names in the paper's Table 2."""
RAISED = {
    f"{path}_neighbours": f"{TABLE_2[path]}, neighbours raised" for path in ("pretrain", "fine_tuning", "recgpt_1")
}
"""One-step paths whose scores neighbours raise (`evaluate --neighbours.path`), where a data set has neighbours."""
SMALLEST_M = 5
"""The figure of m_n goes from 10_0 to 5_5, as the paper's."""


def draw_figures(report: dict[str, Any], output: Path) -> dict[str, list[str]]:
    """Draw the figures of each data set; returns their paths in `output`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    paths: dict[str, list[str]] = {}
    (output / "figures").mkdir(exist_ok=True)

    def save(name: str, kind: str, figure: Any) -> None:
        path = f"figures/{name}_{kind}.png"
        figure.tight_layout()
        figure.savefig(output / path, dpi=150)
        pyplot.close(figure)
        paths.setdefault(name, []).append(path)

    for name, measured in report["datasets"].items():
        save(name, "paths", draw_paths(pyplot, name, measured, report))
        if len(measured["k"]["validation"]) > 1:
            save(name, "k", draw_k(pyplot, name, measured))
        if measured["m_n"]["validation"]:
            save(name, "m_n", draw_m_n(pyplot, name, measured))
    return paths


def draw_paths(pyplot: Any, name: str, measured: dict[str, Any], report: dict[str, Any]) -> Any:
    """Plot NDCG@10 of every path on test, with the best published."""
    figure, axes = pyplot.subplots(figsize=(6, 4))
    values = [measured["results"]["test"][path]["masked"]["NDCG@10"] for path in TABLE_2]
    means = [value["mean"] for value in values]
    axes.bar(list(TABLE_2.values()), means, yerr=[value["sd"] or 0 for value in values], capsize=4, color="#4c72b0")
    for at, value in enumerate(means):
        axes.annotate(f"{value:.4f}", (at, value / 2), ha="center", color="white")
    best = next((r[name.lower()][3] for r in report["published"]["table_2"][::-1] if name.lower() in r), None)
    if best:
        axes.axhline(best, color="#c44e52", linestyle="--", label=f"highest published, {best:.4f}")
        axes.legend(loc="lower right")
    axes.set(ylabel="NDCG@10 (test, masked)", title=f"{name}: recall paths, {describe_seeds(measured)}")
    return figure


def draw_k(pyplot: Any, name: str, measured: dict[str, Any]) -> Any:
    """Plot NDCG@10 by K."""
    figure, axes = pyplot.subplots(figsize=(6, 4))
    k = measured["k"]
    values = list(k["validation"])
    axes.plot(values, list(k["validation"].values()), marker="o", label="validation, RecGPT")
    for path, title in (("recgpt", "test, RecGPT"), ("recgpt_1", "test, RecGPT_1")):
        axes.plot(values, [k["test"][value][path]["NDCG@10"] for value in values], marker="s", label=title)
    axes.set(
        xlabel="K, prompts between two items", ylabel="NDCG@10 (masked)", title=f"{name}: number of prompts, one seed"
    )
    axes.set_xticks(values)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def draw_m_n(pyplot: Any, name: str, measured: dict[str, Any]) -> Any:
    """Plot NDCG@10 by m_n on validation, and on test if measured."""
    figure, axes = pyplot.subplots(figsize=(6, 4))
    grid, on_test = (
        {m: figure for m, figure in measured["m_n"][what].items() if int(m.partition("_")[0]) >= SMALLEST_M}
        for what in ("validation", "test_first_seed")
    )
    errors = [value["sd"] or 0 for value in grid.values()]
    means = [value["mean"] for value in grid.values()]
    axes.errorbar(
        list(grid), means, yerr=errors, marker="o", capsize=3, label=f"validation, {describe_seeds(measured)}"
    )
    if on_test:
        axes.plot(list(on_test), [v["NDCG@10"] for v in on_test.values()], marker="s", label="test, first seed")
    axes.set(
        xlabel="m_n: items of the first and of the second vector",
        ylabel="NDCG@10 (masked)",
        title=f"{name}: the two-step list, K = {measured['k']['chosen']}",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def describe_seeds(measured: dict[str, Any]) -> str:
    """The number of seeds in words."""
    count = len(measured["seeds"])
    return "one seed" if count == 1 else f"mean of {count} seeds"
