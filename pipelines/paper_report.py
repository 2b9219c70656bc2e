"""The report of `pipelines/paper.py`: report.json, report.md and figures. Only reads files; runs nothing."""

import json
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import paper_baselines, paper_methods
from pipelines.paper_figures import RAISED, TABLE_2, TEACHER, draw_figures
from pipelines.seed_tables import PROTOCOLS, Row, cell, mark_best, mean_and_deviation, over_seeds, read_json, table
from pipelines.steps import ROOT, RecordedSteps, clock

if TYPE_CHECKING:
    from pipelines.paper import Options

METRICS = ("HR@5", "NDCG@5", "HR@10", "NDCG@10")
TABLE_3 = {
    "recgpt": "RecGPT: prompt-tuned, two-step recall (`recgpt`)",
    "pretrain_two_step": "Variant_1: without prompt-tuning, two-step recall (`pretrain_two_step`)",
    "recgpt_1": "Variant_2: RecGPT_1, prompt-tuned, one-step recall (`recgpt_1`)",
    "pretrain": "Variant_3: Pre-train, one-step recall (`pretrain`)",
    "fine_tuning": "not in the paper: tuned without prompts, one-step recall (`fine_tuning`)",
}
"""The paper's ablation variants, and our control."""
BASELINES = {"cooccurrence": "co-occurrence (measured here)", "popularity": "popularity (measured here)"}
CONTROL = {"recgpt_1": "fine_tuning", "recgpt": "fine_tuning_two_step"}
"""The paths of K = 0, fine-tuning, that stand for those with prompts."""
STEPS_UP = (
    ("recgpt", "recgpt_1"),
    ("recgpt_1", "fine_tuning"),
    ("fine_tuning", "pretrain"),
    ("pretrain", TEACHER),
    ("pretrain_neighbours", "pretrain"),
    ("recgpt_1_neighbours", "recgpt_1"),
)


def k_on_validation(folder: Path, ks: list[int]) -> dict[int, float]:
    """Masked NDCG@10 of the two-step list on validation with the first seed, by each K that was measured."""
    return {k: figures["recgpt"]["NDCG@10"] for k, figures in read_each_k(folder, ks, "validation").items()}


def write_report(options: "Options", steps: RecordedSteps) -> None:
    """Write report.json, report.md and the figures of the seeds that are finished."""
    output = ROOT / options.output
    report = collect_report(options, steps)
    report["figures"] = draw_figures(report, output)
    (output / "report.json").write_text(json.dumps(report, indent=1))
    (output / "report.md").write_text(markdown(report))


def collect_report(options: "Options", steps: RecordedSteps) -> dict[str, Any]:
    """The contents of the report, as JSON values, without seeds and data sets that are not measured yet."""
    datasets = {name: collect_dataset(options, name) for name in options.datasets}
    published = json.loads((Path(__file__).parent / "published.json").read_text())
    return {
        "made": time.strftime("%Y-%m-%d %H:%M:%S"),
        "seeds": options.seeds,
        "ranks": options.ranks,
        "ks": options.ks,
        "teachers": options.teachers,
        "versions": versions(),
        "datasets": {name: measured for name, measured in datasets.items() if measured},
        "published": published,
        "steps": steps.records(),
    }


def collect_dataset(options: "Options", name: str) -> dict[str, Any] | None:
    """The results on one data set; None if no seed is finished."""
    folder = ROOT / options.output / name
    by_k = k_on_validation(folder, options.ks)
    if len(by_k) < len(options.ks):
        return None
    k = max(options.prompted_ks, key=lambda k: (by_k[k], -k))
    runs = (*[TEACHER] * options.has_teacher(name), "pretrain", "fine_tuning", f"k{k}/recgpt")
    seeds, evaluations, trainings = [], [], []
    for seed in range(options.seeds):
        by_run = {
            (run, split): read_json(folder / f"seed{seed}/{run}_{split}.json")
            for run in runs
            for split in ("validation", "test")
        }
        if all(by_run.values()):
            seeds.append(seed)
            evaluations.append(by_run)
            others = [each for each in options.teachers_of(seed) if each != seed] * options.has_teacher(name)
            places = {f"{TEACHER}_{number}": f"seed{each}/{TEACHER}" for number, each in enumerate(others, 2)}
            places |= {run: f"seed{seed}/{run}" for run in runs}
            trainings.append({run: read_training(folder / place) for run, place in places.items()})
    if not seeds:
        return None
    results = {}
    for split in ("test", "validation"):
        by_seed = []
        for by_run in evaluations:
            figures = {p: each for run in runs if run != TEACHER for p, each in by_run[run, split]["results"].items()}
            if TEACHER in runs:
                figures = {TEACHER: by_run[TEACHER, split]["results"]["pretrain"]} | figures
            by_seed.append(figures)
        results[split] = over_seeds(by_seed)
    baselines = evaluations[0]["pretrain", "test"]["results"]
    manifest = json.loads((folder / "data/manifest.json").read_text())
    recalls = [by_run[f"k{k}/recgpt", "validation"]["recall"] for by_run in evaluations]
    grids = [m_n_grid(by_run[f"k{k}/recgpt", "validation"]) for by_run in evaluations]
    tests = {m: read_json(folder / f"seed0/k{k}/recgpt_test_{m}.json") for m in grids[0]}
    on_test = {m: a["results"]["recgpt"]["masked"] for m, a in tests.items() if a}
    if on_test:
        one_step = evaluations[0][f"k{k}/recgpt", "test"]["results"]["recgpt_1"]["masked"]
        on_test = {m: one_step for m in grids[0] if m.endswith("_0")} | on_test
    return {
        "hold_out": options.datasets[name].hold_out,
        **{what: manifest[what] for what in ("users", "items", "interactions")},
        "seeds": seeds,
        "k": {"chosen": k, "validation": by_k, "test": read_each_k(folder, options.ks)},
        "m_n": {
            "chosen": [f"{recall['m']}_{recall['n']}" for recall in recalls],
            "validation": {m: mean_and_deviation([grid[m] for grid in grids]) for m in grids[0]},
            "test_first_seed": on_test,
        },
        "results": results,
        "baselines": {path: baselines[path] for path in BASELINES if path in baselines},
        "differences": {
            f"{better} - {worse}": mean_and_deviation(
                [
                    a - b
                    for a, b in zip(
                        results["test"][better]["masked"]["NDCG@10"]["values"],
                        results["test"][worse]["masked"]["NDCG@10"]["values"],
                        strict=True,
                    )
                ]
            )
            for better, worse in STEPS_UP
            if {better, worse} <= results["test"].keys()
        },
        "training": trainings,
        "trained_baselines": paper_baselines.read_baselines(folder),
        **paper_methods.collect_methods(folder, seeds, f"k{k}/recgpt", options.lists),
    }


def read_each_k(folder: Path, ks: list[int], split: str = "test") -> dict[int, dict[str, dict[str, float]]]:
    """Masked figures of both prompt-tuned paths with the first seed, by each K that was measured."""
    found = {}
    for k in ks:
        evaluation = read_json(folder / f"seed0/{f'k{k}/recgpt' if k else 'fine_tuning'}_{split}.json")
        if evaluation:
            found[k] = {p: evaluation["results"][p if k else control]["masked"] for p, control in CONTROL.items()}
    return found


def m_n_grid(evaluation: dict[str, Any]) -> dict[str, float]:
    """NDCG@10 on validation by m_n, from 10_0, which is one step, to the smallest m; empty if it was not measured."""
    grid = evaluation["recall"].get("validation", {})
    if not grid:
        return {}
    of_one_step = evaluation["results"]["recgpt_1"]["masked"]["NDCG@10"]
    return {"10_0": of_one_step} | dict(sorted(grid.items(), key=lambda pair: -int(pair[0].partition("_")[0])))


def read_training(run: Path) -> dict[str, Any]:
    """Effort of a run: optimizer steps, epochs, seconds, and the epoch that was best on validation."""
    history = run / "history.jsonl"
    epochs = [json.loads(line) for line in history.read_text().splitlines()] if history.exists() else []
    best = read_json(run / "best.json") or {}
    return {
        "steps": max((epoch["step"] for epoch in epochs), default=0),
        "epochs": max((epoch["epoch"] for epoch in epochs), default=0),
        "best_epoch": best.get("epoch"),
        "train_s": sum(epoch.get("train_s", 0.0) for epoch in epochs),
    }


def versions() -> dict[str, Any]:
    """Versions of the machine, the commit and the packages."""
    packages = {}
    for name in ("recgpt-torchrec", "torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "torchx", "numpy"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "commit": git.stdout.strip() or None,
        **packages,
    }


# ------------------------------------------------------------------------------------------------------- Markdown


def describe_protocol(hold_out: list[str]) -> str:
    """What was held out, given the options of the stage prepare."""
    if not hold_out:
        return "Leave-one-out (the last item is test, the one before it validation)"
    return f"Split by time (`{' '.join(hold_out)}`: each user's first item after a moment, from the history before it)"


def markdown(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    lines = ["# RecGPT (arXiv 2404.08675): the paper's tables, measured", ""]
    if not report["datasets"]:
        return "\n".join([*lines, "No seed is finished yet.", ""])
    protocols: dict[str, list[str]] = {}
    for name, measured in report["datasets"].items():
        protocols.setdefault(describe_protocol(measured["hold_out"]), []).append(name)
    held_out = "; ".join(
        text if len(protocols) == 1 else f"{', '.join(names)}: {text}" for text, names in protocols.items()
    )
    lines += [
        f"{held_out}, ranked over the whole catalogue. "
        "± is the sample standard deviation over seeds. Bold: best of its column. All choices were made on validation.",
        "",
        *shared_teachers(report["teachers"]),
        "Fine-tuning and prompt-tuning start from the same pre-trained model and have the same loss and epochs. "
        "Prompted histories hold more entries, so prompted batches have more tokens: optimizer steps are equal.",
        "",
        *choices(report),
        *table_2(report),
        *table_3(report),
        *sensitivity(report),
        *paper_baselines.section(report),
        *paper_methods.sections(report),
        *effort(report),
        *origin(report),
    ]
    return "\n".join(lines) + "\n"


def shared_teachers(teachers: int) -> list[str]:
    """What several teachers, which a group of seeds shares, mean for the figures."""
    if teachers == 1:
        return []
    text = (
        f"The models of a group of {teachers} seeds learn the mean answers of the group's {teachers} teachers: ± of "
        "the rows after the teacher's is that of the students alone."
    )
    return [text, ""]


def choices(report: dict[str, Any]) -> list[str]:
    """Section: the data sets, and K and m_n chosen on each."""
    lines = [
        "| data set | users | items | interactions | seeds | K | m_n of each seed |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, measured in report["datasets"].items():
        counts = " | ".join(f"{measured[what]:,}" for what in ("users", "items", "interactions"))
        seeds = f"{len(measured['seeds'])} of {report['seeds']}"
        lines.append(
            f"| {name} | {counts} | {seeds} | {measured['k']['chosen']} | {', '.join(measured['m_n']['chosen'])} |"
        )
    tried = ", ".join(map(str, report["ks"]))
    tried = f"K was chosen among {tried} with the first seed, by the two-step list's NDCG@10 (masked)."
    return [*lines, "", tried + (" K = 0 is Fine-tuning, and never chosen." if 0 in report["ks"] else ""), ""]


def table_2(report: dict[str, Any]) -> list[str]:
    """Section: every path on each data set, masked with published figures, and unmasked."""
    lines = ["## Table 2: recall paths", ""]
    for name, measured in report["datasets"].items():
        for how, meaning in PROTOCOLS.items():
            tested = measured["results"]["test"]
            titles = ({TEACHER: "the teacher of Pre-train"} if TEACHER in tested else {}) | TABLE_2
            titles |= {path: title for path, title in RAISED.items() if path in tested}
            rows: list[Row] = [(title, [tested[path][how][m] for m in METRICS]) for path, title in titles.items()]
            for path, figures in measured["baselines"].items():
                rows.append((BASELINES[path], [{"mean": figures[how][m], "sd": None} for m in METRICS]))
            if how == "masked":
                for row in report["published"]["table_2"]:
                    cells = [value and {"mean": value, "sd": None} for value in row.get(name.lower(), [])]
                    if cells:
                        rows.append((f"*{row['name']}*", cells))
            lines += [f"### {name}, test, {how} ({meaning})", "", *table("", METRICS, rows), ""]
    sources = "; ".join(f"*{row['name']}*: {row['source']}" for row in report["published"]["table_2"])
    return [*lines, f"Rows in italics were published elsewhere. {report['published']['about']} {sources}.", ""]


def table_3(report: dict[str, Any]) -> list[str]:
    """Section: the ablation, and what each step of the method adds."""
    lines = ["## Table 3: ablation", ""]
    for name, measured in report["datasets"].items():
        rows: list[Row] = [
            (title, [measured["results"]["test"][path]["masked"][m] for m in METRICS])
            for path, title in TABLE_3.items()
        ]
        lines += [f"### {name}, test, masked", "", *table("", METRICS, rows), ""]
        published = report["published"]["table_3"].get(name.lower())
        if published:
            names = {**TABLE_2, "pretrain_two_step": "Pre-train, two-step"}
            figures = ", ".join(f"{names[path]} {value:.4f}" for path, value in published.items())
            lines += [f"Published ({report['published']['table_3']['source']}): {figures}.", ""]
    lines += ["What each step adds to NDCG@10 (test, masked), seed by seed:", ""]
    pairs = [f"{better} - {worse}" for better, worse in STEPS_UP]
    lines += ["| | " + " | ".join(pairs) + " |", "|---|" + "---|" * len(pairs)]
    for name, measured in report["datasets"].items():
        steps = measured["differences"]
        lines.append(f"| {name} | " + " | ".join(cell(steps[n], sign="+") if n in steps else "–" for n in pairs) + " |")
    return [*lines, ""]


def sensitivity(report: dict[str, Any]) -> list[str]:
    """Section: NDCG@10 by K and by m_n."""
    lines = ["## Sensitivity of K and m_n", ""]
    for name, measured in report["datasets"].items():
        k = measured["k"]
        lines += [f"### {name}", "", "NDCG@10, masked, first seed; K is the number of prompts between two items.", ""]
        lines += ["| K | RecGPT, validation | RecGPT, test | RecGPT_1, test |", "|---|---|---|---|"]
        for value, figure in k["validation"].items():
            test = k["test"][value]
            cells = f"{figure:.4f} | {test['recgpt']['NDCG@10']:.4f} | {test['recgpt_1']['NDCG@10']:.4f}"
            lines.append(f"| {value}{' (chosen)' if value == k['chosen'] else ''} | {cells} |")
        grid, on_test = measured["m_n"]["validation"], measured["m_n"]["test_first_seed"]
        if grid:
            lines += ["", f"NDCG@10, masked, K = {k['chosen']}; m items of the first vector, n of the second.", ""]
            lines += ["| m_n | " + " | ".join(grid) + " |", "|---|" + "---|" * len(grid)]
            lines.append("| validation | " + " | ".join(map(cell, mark_best(list(grid.values())))) + " |")
        if on_test:
            tested = (f"{on_test[m]['NDCG@10']:.4f}" if m in on_test else "" for m in grid)
            lines.append("| test, first seed | " + " | ".join(tested) + " |")
        for file in report["figures"].get(name, []):
            lines += ["", f"![{Path(file).stem.replace('_', ' ')}]({file})"]
        lines.append("")
    return lines


def effort(report: dict[str, Any]) -> list[str]:
    """Section: optimizer steps and time of every training run."""
    lines = ["## Training", "", f"Ranks of each run: {report['ranks']}.", ""]
    lines += ["| data set | run | optimizer steps | best epoch | minutes |", "|---|---|---|---|---|"]
    for name, measured in report["datasets"].items():
        for run in measured["training"][0]:
            runs = [each[run] for each in measured["training"]]
            steps, best = (", ".join(str(each[what]) for each in runs) for what in ("steps", "best_epoch"))
            minutes = ", ".join(f"{each['train_s'] / 60:.1f}" for each in runs)
            lines.append(f"| {name} | {run} | {steps} | {best} | {minutes} |")
    shared = f" The {report['teachers']} teachers are those of a group of seeds." * (report["teachers"] > 1)
    return [*lines, "", f"One figure per seed.{shared}", ""]


def origin(report: dict[str, Any]) -> list[str]:
    """Section: versions and the exact commands."""
    names = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = ["## How to reproduce", "", f"{report['made']}; {names}.", "", "```"]
    spent = 0.0
    for title, record in report["steps"].items():
        state = clock(record["seconds"]) if record.get("id") else "not finished"
        lines += [f"# {title}: {state}", record["command"]]
        spent += record["seconds"]
    return [*lines, "```", "", f"All steps together: {clock(spent)}."]
