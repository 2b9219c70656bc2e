"""Does what was shown and not clicked help as prompts? Against none, generated ones, and taking it for clicks.

    python pipelines/feedback.py --input ../shared/data/ml-100k.inter --output runs/feedback --seeds 3

Makes OUTPUT/report.md and report.json, brought up to date after each seed; the same command goes on where it was
stopped. Rows of the log whose --click_column is below --click_from were shown and not clicked; in MovieLens that is a
rating of 1 or 2. Everything starts from one pre-trained model a seed, which never saw them, and is tuned with the same
loss, epochs and, as batches of more entries are given more tokens, optimizer steps:

    without                     fine-tuning without prompts, the control
    exposed:K                   at most K shown items between two interactions, the newest
    both:K, generated:K         filled up with, or only, what the model answers there
    as_interactions             the other direction: shown rows are interactions like any other, in pre-training, too

`as_interactions` is trained on shown rows as targets, but held-out items and what is known before them are the same:
what was shown after a user's training part is left out. Its list, masked, cannot hold shown items; the others' can.
"""

import argparse
import csv
import json
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipelines import experiment, paper_report  # noqa: E402
from pipelines.experiment import from_root  # noqa: E402
from pipelines.paper_report import METRICS, PROTOCOLS, Row  # noqa: E402
from pipelines.steps import ROOT, RecordedSteps, pipeline  # noqa: E402
from recgpt_torchrec.data.dataset import Dataset, Part  # noqa: E402

CONTROL, OTHER = "without", "as_interactions"
PROMPTS = ["exposed:1", "exposed:2", "exposed:3", "both:1", "generated:1"]


@dataclass(kw_only=True)
class Options(experiment.Options):
    """What the user asked for."""

    input: str
    """The log."""
    name: str
    """Of the log; configs/NAME.yaml and configs/NAME_tune.yaml are its configurations."""
    prompts: list[str]
    """SOURCE:K of each kind of prompts."""
    click_column: str
    click_from: float

    @property
    def arms(self) -> list[str]:
        """What is compared, the control first."""
        return [CONTROL, *self.prompts, OTHER]

    def planned(self) -> list[str]:
        """The kind of every step."""
        seed = ["pretrain"] * 2 + ["generate"] * len(self.prompts) + ["tune", "test"] * len(self.arms) + ["test"]
        return [f"{self.name} {kind}" for kind in ["prepare"] * 2 + self.seeds * seed]


def main(arguments: list[str] | None = None) -> None:
    """Run every step that is not done, and write the report."""
    options = parse(arguments)
    with pipeline("feedback", options.output, options.planned()) as steps:
        Feedback(options, steps).run()


def parse(arguments: list[str] | None = None) -> Options:
    """The command line; paths become relative to the project, where commands run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="the log, in any format but sequences")
    parser.add_argument("--output", default="runs/feedback", help="folder for everything (default: runs/feedback)")
    parser.add_argument("--name", default="ml100k", help="of the configurations NAME.yaml, NAME_tune.yaml (ml100k)")
    parser.add_argument("--click_column", default="rating", help="as of the stage prepare (default: rating)")
    parser.add_argument("--click_from", type=float, default=3, help="as of the stage prepare (default: 3)")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, metavar="SOURCE:K", help=" ".join(PROMPTS))
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to SEEDS - 1 (default: 3)")
    parser.add_argument("--ranks", type=int, default=1, help="processes of each stage (default: 1)")
    parser.add_argument("--configs", default="configs", help="folder of the configurations (default: configs)")
    given = parser.parse_args(arguments)
    for prompts in given.prompts:
        if not re.fullmatch(r"(exposed|both|generated):[1-8]", prompts):
            parser.error(f"--prompts {prompts} is not SOURCE:K, with exposed, both or generated and K from 1 to 8")
    if len(set(given.prompts)) < len(given.prompts):
        parser.error(f"--prompts {' '.join(given.prompts)}: each kind once")
    if given.seeds < 1 or given.ranks < 1:
        parser.error("--seeds and --ranks must be at least 1")
    if not os.path.exists(given.input):
        parser.error(f"--input: there is no {given.input}")
    return Options(
        input=from_root(given.input),
        output=from_root(given.output),
        seeds=given.seeds,
        ranks=given.ranks,
        configs=from_root(given.configs),
        name=given.name,
        prompts=given.prompts,
        click_column=given.click_column,
        click_from=given.click_from,
    )


class Feedback(experiment.Experiment):
    """Every arm on one log. Example: `Feedback(options, steps).run()`."""

    options: Options

    def __init__(self, options: Options, steps: RecordedSteps) -> None:
        super().__init__(options.name, options, steps)
        self.other = f"{self.folder}/{OTHER}"

    def run(self) -> None:
        """Prepare both datasets, then seed by seed; the report is brought up to date after each seed."""
        clicks = ["--click_column", self.options.click_column, "--click_from", f"{self.options.click_from:g}"]
        self._prepare("prepare", [self.options.input, *clicks], self.data)
        write_as_interactions(Dataset.open(str(ROOT / self.data)), ROOT / f"{self.other}.csv")
        same_core = ["--time_column", "null", "--min_count", "1"]
        self._prepare(f"prepare_{OTHER}", [f"{self.other}.csv", *same_core], self.other)
        for seed in range(self.options.seeds):
            self._seed(seed)
            write(self.options, self.steps)

    def _seed(self, seed: int) -> None:
        start = f"seed{seed}/pretrain"
        self._train(start, "pretrain", "pretrain", self.config, self.data, ("prepare",), seed)
        self._test(seed, "pretrain", self.data, baselines=seed == 0)  # they have no seed
        self._tune(seed, CONTROL, self.data, start, "prepare")
        for arm in self.options.prompts:
            prompts = f"seed{seed}/{folder_of(arm)}_prompts"
            self._make_prompts(seed, arm, prompts)
            self._tune(seed, arm, f"{self.folder}/{prompts}", start, prompts)
        start, needs = f"seed{seed}/pretrain_{OTHER}", f"prepare_{OTHER}"
        self._train(start, "pretrain", "pretrain", self.config, self.other, (needs,), seed)
        self._tune(seed, OTHER, self.other, start, needs)

    def _make_prompts(self, seed: int, arm: str, title: str) -> None:
        source, k = arm.split(":")
        start, output = f"seed{seed}/pretrain", f"{self.folder}/{title}"
        arguments = ["--data", self.data, "--checkpoint", f"{self.folder}/{start}", "--output", output]
        self.steps.run(
            f"{self.name}/{title}",
            self._stage("generate_prompts", [*arguments, "--prompts.source", source, "--prompts.k", k]),
            kind=f"{self.name} generate",
            proof=f"{output}/manifest.json",
            needs=(f"{self.name}/prepare", f"{self.name}/{start}"),
        )

    def _tune(self, seed: int, arm: str, data: str, start: str, made_by: str) -> None:
        """Tune an arm from the run `start`, and measure it."""
        prompts = arm in self.options.prompts
        title = f"seed{seed}/{folder_of(arm)}"
        more = ["--checkpoint", f"{self.folder}/{start}", "--batch.tokens", str(self._tokens(data, prompts))]
        more += [] if prompts else ["--tuning.prompts", "false"]
        self._train(title, "tune", "prompt_tune", self.tune_config, data, (made_by, start), seed, more)
        self._test(seed, folder_of(arm), data)


def folder_of(arm: str) -> str:
    """What the files of an arm are called."""
    return arm.replace(":", "_")


def write_as_interactions(dataset: Dataset, log: Path) -> None:
    """A raw log in which what was shown in a user's training part is an interaction, and what was shown later is not.

    So it has the users, the items and the held-out items of the dataset, each with the same history before it but for
    what was shown in the training part. Not written where it is already.
    """
    if log.exists():
        return
    names = [keys_of(dataset, parts) for parts in (dataset.manifest.user_parts, dataset.manifest.item_parts)]
    unfinished = log.with_suffix(".tmp")
    with open(unfinished, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("user_id", "item_id"))
        for part in dataset.manifest.sequences:
            with dataset.open_part(part) as parquet:
                table = parquet.read(columns=["user_id", "item_ids", "segment_ids"]).to_pydict()
            for user, items, segments in zip(*table.values(), strict=True):
                real = [place for place, segment in enumerate(segments) if segment == 0]
                for place, item in enumerate(items):
                    if segments[place] == 0 or place < real[-3]:
                        writer.writerow((names[0][user], names[1][item]))
    unfinished.replace(log)


def keys_of(dataset: Dataset, parts: list[Part]) -> list[str]:
    """Raw keys by dense id."""
    keys: list[str] = []
    for part in parts:
        with dataset.open_part(part) as parquet:
            keys += parquet.read(columns=["key"])["key"].to_pylist()
    return keys


# --------------------------------------------------------------------------------------------------------- report


def write(options: Options, steps: RecordedSteps) -> None:
    """Bring report.json and report.md up to date with the seeds that are finished."""
    report = collect(options, steps)
    output = ROOT / options.output
    (output / "report.json").write_text(json.dumps(report, indent=1))
    (output / "report.md").write_text(markdown(report))


def collect(options: Options, steps: RecordedSteps) -> dict[str, Any]:
    """Everything the report says, as JSON values."""
    folder = ROOT / options.output / options.name
    runs = ["pretrain", *map(folder_of, options.arms)]
    each: dict[str, list[dict[str, Any]]] = {run: [] for run in runs}
    seeds = []
    for seed in range(options.seeds):
        found = {run: paper_report.read(folder / f"seed{seed}/{run}_test.json") for run in runs}
        if all(found.values()):
            seeds.append(seed)
            for run, answer in found.items():
                each[run].append(figures_of(answer, folder / f"seed{seed}/{run}"))
    results = {run: paper_report.over_seeds([found["results"] for found in each[run]]) for run in runs}
    manifest = json.loads((folder / "data/manifest.json").read_text())
    baselines = json.loads((folder / "seed0/pretrain_test.json").read_text())["results"]
    return {
        "made": time.strftime("%Y-%m-%d %H:%M:%S"),
        "name": options.name,
        "seeds": seeds,
        "versions": paper_report.versions(),
        **{what: manifest[what] for what in ("users", "items", "interactions")},
        "exposed": manifest["preparation"]["exposed"],
        "results": results,
        "baselines": {path: baselines[path] for path in paper_report.BASELINES},
        "differences": {
            split: {run: difference(results, run, split) for run in runs if run != CONTROL}
            for split in ("validation", "test one step", "test two steps")
        },
        "training": {run: [found["training"] for found in each[run]] for run in runs},
        "steps": steps.records(),
    }


def figures_of(answer: dict[str, Any], run: Path) -> dict[str, Any]:
    """What was measured of one run: on test, and on validation after its best epoch (one step, masked)."""
    one, two = list(answer["results"].values())[:2]  # baselines may follow
    trained = paper_report.trained(run)
    epochs = map(json.loads, (run / "history.jsonl").read_text().splitlines())
    (best,) = (epoch for epoch in epochs if epoch["epoch"] == trained["best_epoch"] and "NDCG@10" in epoch)
    validation = {"masked": {metric: best[metric] for metric in METRICS}}
    return {
        "results": {"validation": validation, "test one step": one, "test two steps": two},
        "training": {**trained, "m": answer["recall"]["m"]},
    }


def difference(results: dict[str, Any], run: str, split: str) -> dict[str, Any]:
    """NDCG@10, masked, of a run less that of the control with the same seed."""
    this, control = (results[name][split]["masked"]["NDCG@10"]["values"] for name in (run, CONTROL))
    return paper_report.mean_and_deviation([a - b for a, b in zip(this, control, strict=True)])


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    shown = report["exposed"]
    lines = [
        f"# {report['name']}: what was shown and not clicked, as prompts",
        "",
        f"{report['users']:,} users, {report['items']:,} items, {report['interactions']:,} interactions; "
        f"{shown['left']:,} of {shown['rows']:,} shown rows stand between two of them. {len(report['seeds'])} seeds; ± "
        "is the sample standard deviation over them. Leave one out, ranked over the whole catalogue. Bold: best of its "
        "column.",
        "",
        "`without`: fine-tuning without prompts, the control. `exposed`, `both`, `generated`: prompt-tuning, with at "
        f"most so many prompts between two items. `{OTHER}`: shown rows are interactions, for masking, too. All are "
        "tuned for the same number of steps. The best epoch, and m of the two-step list, are chosen on validation.",
        "",
        "## NDCG@10 less that of the control, masked, seed by seed",
        "",
    ]
    runs = [run for run in report["results"] if run != CONTROL]
    splits = list(report["differences"])
    lines += ["| | " + " | ".join(splits) + " |", "|---|" + "---|" * len(splits)]
    for run in runs:
        differences = (paper_report.cell(report["differences"][split][run], sign="+") for split in splits)
        lines.append(f"| {run} | " + " | ".join(differences) + " |")
    for split in splits:
        for how in PROTOCOLS:
            rows: list[Row] = [
                (run, [found[split][how][metric] for metric in METRICS])
                for run, found in report["results"].items()
                if how in found[split]
            ]
            if rows and split == "test one step":
                for path, figures in report["baselines"].items():
                    rows.append(
                        (paper_report.BASELINES[path], [{"mean": figures[how][m], "sd": None} for m in METRICS])
                    )
            if rows:
                lines += ["", f"## {split}, {how}", "", *paper_report.table("", METRICS, rows)]
    lines += ["", "## Training", "", "One figure a seed.", ""]
    lines += ["| run | optimizer steps | best epoch | m of the two-step list | minutes |", "|---|---|---|---|---|"]
    for run, trained in report["training"].items():
        columns = [", ".join(str(each[what]) for each in trained) for what in ("steps", "best_epoch", "m")]
        minutes = ", ".join(f"{each['train_s'] / 60:.1f}" for each in trained)
        lines.append(f"| {run} | " + " | ".join([*columns, minutes]) + " |")
    return "\n".join([*lines, "", *paper_report.origin(report)]) + "\n"


if __name__ == "__main__":
    main()
