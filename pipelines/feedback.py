"""Do shown and not clicked items help as prompts? Compared with no prompts, generated ones, and shown items as clicks.

    python pipelines/feedback.py --input ../shared/data/ml-100k.inter --output runs/feedback --seeds 3

Writes OUTPUT/report.md and report.json, updated after each seed; the same command resumes an interrupted pipeline. Rows
of the log whose --click_column is below --click_from were shown and not clicked; in MovieLens a rating of 1 or 2. Per
seed, all arms start from one pre-trained model that never saw those rows. They are tuned with the same loss, epochs and
optimizer steps, for which prompted batches have more tokens:

    without                     fine-tuning without prompts, the control
    exposed:K                   the newest shown items between two interactions, at most K
    both:K, generated:K         shown items filled up to K with generated ones, or generated ones alone
    places:K                    like exposed, and the model reads each item's place in its list (--position_column)
    collapsed:K                 like exposed, with dislikes and skips as if they had only been shown
    as_interactions             the opposite: shown rows are interactions, in pre-training too

`as_interactions` has shown rows as targets, but the same held-out items with the same interactions before them: rows
shown after a user's training part are left out. Its masked lists cannot hold shown items; those of other arms can.
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

from pipelines import experiment, paper_report, seed_tables  # noqa: E402
from pipelines.experiment import from_root, words_of  # noqa: E402
from pipelines.paper_report import METRICS  # noqa: E402
from pipelines.seed_tables import PROTOCOLS, Row  # noqa: E402
from pipelines.steps import ROOT, RecordedSteps, pipeline  # noqa: E402
from recgpt_torchrec.data.dataset import Dataset, Part  # noqa: E402

CONTROL, OTHER = "without", "as_interactions"
KINDS = ("dislike_values", "skip_values", "dislike_to", "skip_to")
"""Options of prepare that tell kinds of feedback apart."""
PROMPTS = ["exposed:1", "exposed:2", "exposed:3", "both:1", "generated:1"]


@dataclass(kw_only=True)
class Options(experiment.Options):
    """Options of this pipeline."""

    input: str
    """The log."""
    name: str
    """configs/NAME.yaml and configs/NAME_tune.yaml are the configurations."""
    prompts: list[str]
    """Arms with prompts, as SOURCE:K."""
    clicks: list[str]
    """Options of prepare that tell clicked rows from others."""
    kinds: list[str]
    """Those that tell dislikes and skips apart."""
    counts: list[str]
    """The option of prepare with the minimum number of interactions."""
    position_column: str | None

    @property
    def arms(self) -> list[str]:
        """The arms of the comparison, the control first."""
        return [CONTROL, *self.prompts, OTHER]

    @property
    def collapses(self) -> bool:
        """Whether an arm reads all feedback as one kind."""
        return any(arm.startswith("collapsed:") for arm in self.prompts)

    def planned(self) -> list[str]:
        """The kind of every step, see `RecordedSteps`."""
        prepare = ["prepare"] * (2 + self.collapses)
        seed = ["pretrain"] * 2 + ["generate"] * len(self.prompts) + ["tune", "test"] * len(self.arms) + ["test"]
        return [f"{self.name} {kind}" for kind in prepare + self.seeds * seed]


def main(arguments: list[str] | None = None) -> None:
    """Run every unfinished step, and write the report."""
    options = parse(arguments)
    with pipeline("feedback", options.output, options.planned()) as steps:
        Feedback(options, steps).run()


def parse(arguments: list[str] | None = None) -> Options:
    """Parse the command line; paths become relative to the project, where commands run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="the log, in any format of prepare except sequences")
    parser.add_argument("--output", default="runs/feedback", help="output folder (default: runs/feedback)")
    parser.add_argument(
        "--name", default="ml100k", help="name of the configurations NAME.yaml, NAME_tune.yaml (default: ml100k)"
    )
    parser.add_argument("--click_column", default="rating", help="as in the stage prepare (default: rating)")
    parser.add_argument("--click_from", type=float, default=3, help="as in the stage prepare (default: 3)")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, metavar="SOURCE:K", help=" ".join(PROMPTS))
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to SEEDS - 1 (default: 3)")
    parser.add_argument("--click_values", help="words of --click_column that are clicks, instead of --click_from")
    for name in KINDS:
        parser.add_argument(f"--{name}", help="as in prepare: which rows are dislikes or skips (default: none)")
    parser.add_argument("--position_column", help="column with an item's place in its list (default: none)")
    parser.add_argument("--min_count", type=int, help="as in prepare (default: that of prepare)")
    parser.add_argument("--ranks", type=int, default=1, help="processes of each stage (default: 1)")
    parser.add_argument("--configs", default="configs", help="folder of the configurations (default: configs)")
    given = parser.parse_args(arguments)
    for prompts in given.prompts:
        if not re.fullmatch(r"(exposed|places|collapsed|both|generated):[1-8]", prompts):
            parser.error(
                f"--prompts {prompts} is not SOURCE:K, with exposed, places, collapsed, both or "
                "generated and K from 1 to 8"
            )
    if len(set(given.prompts)) < len(given.prompts):
        parser.error(f"--prompts {' '.join(given.prompts)}: each kind once")
    kinds = [word for name in KINDS if (value := getattr(given, name)) for word in (f"--{name}", value)]
    if not kinds and any(prompts.startswith("collapsed") for prompts in given.prompts):
        parser.error("--prompts collapsed: there is one kind of feedback only; name others, such as --dislike_to 2")
    if not given.position_column and any(prompts.startswith("places") for prompts in given.prompts):
        parser.error("--prompts places: name the column with the places, --position_column")
    if given.seeds < 1 or given.ranks < 1:
        parser.error("--seeds and --ranks must be at least 1")
    if not os.path.exists(given.input):
        parser.error(f"--input: there is no {given.input}")
    clicks = ["--click_from", f"{given.click_from:g}"]
    if given.click_values:
        clicks = ["--click_values", given.click_values]
    return Options(
        input=from_root(given.input),
        output=from_root(given.output),
        seeds=given.seeds,
        ranks=given.ranks,
        configs=from_root(given.configs),
        name=given.name,
        prompts=given.prompts,
        clicks=["--click_column", given.click_column, *clicks],
        kinds=kinds,
        counts=[] if given.min_count is None else ["--min_count", str(given.min_count)],
        position_column=given.position_column,
    )


class Feedback(experiment.Experiment):
    """All arms on one log. Example: `Feedback(options, steps).run()`."""

    options: Options

    def __init__(self, options: Options, steps: RecordedSteps) -> None:
        super().__init__(options.name, options, steps)
        self.other = f"{self.folder}/{OTHER}"

    def run(self) -> None:
        """Prepare both datasets, then run seed by seed; updates the report after each seed."""
        options = self.options
        plain = [options.input, *options.clicks, *options.counts]
        plain += ["--position_column", options.position_column] if options.position_column else []
        self._prepare("prepare", [*plain, *options.kinds], self.data)
        if options.collapses:
            self._prepare("prepare_collapsed", plain, f"{self.data}_collapsed")
        write_as_interactions(Dataset.open(str(ROOT / self.data)), ROOT / f"{self.other}.csv")
        same_core = ["--time_column", "null", "--min_count", "1"]
        self._prepare(f"prepare_{OTHER}", [f"{self.other}.csv", *same_core], self.other)
        for seed in range(self.options.seeds):
            self._run_seed(seed)
            write_report(self.options, self.steps)

    def _run_seed(self, seed: int) -> None:
        start = f"seed{seed}/pretrain"
        self._train(start, "pretrain", "pretrain", self.config, self.data, ("prepare",), seed)
        self._test(seed, "pretrain", self.data, baselines=seed == 0)  # baselines have no seed
        self._tune(seed, CONTROL, self.data, start, "prepare")
        for arm in self.options.prompts:
            prompts = f"seed{seed}/{folder_of(arm)}_prompts"
            self._generate(seed, arm, prompts)
            self._tune(seed, arm, f"{self.folder}/{prompts}", start, prompts)
        start, needs = f"seed{seed}/pretrain_{OTHER}", f"prepare_{OTHER}"
        self._train(start, "pretrain", "pretrain", self.config, self.other, (needs,), seed)
        self._tune(seed, OTHER, self.other, start, needs)

    def _generate(self, seed: int, arm: str, title: str) -> None:
        arm, k = arm.split(":")
        source = "exposed" if arm in ("places", "collapsed") else arm
        data, prepare = (
            (f"{self.data}_collapsed", "prepare_collapsed") if arm == "collapsed" else (self.data, "prepare")
        )
        start, output = f"seed{seed}/pretrain", f"{self.folder}/{title}"
        arguments = ["--data", data, "--checkpoint", f"{self.folder}/{start}", "--output", output]
        self.steps.run(
            f"{self.name}/{title}",
            self._command("generate_prompts", [*arguments, "--prompts.source", source, "--prompts.k", k]),
            kind=f"{self.name} generate",
            proof=f"{output}/manifest.json",
            needs=(f"{self.name}/{prepare}", f"{self.name}/{start}"),
        )

    def _tune(self, seed: int, arm: str, data: str, start: str, made_by: str) -> None:
        """Tune an arm from the run `start`, on `data` of the step `made_by`, and measure it."""
        prompts = arm in self.options.prompts
        title = f"seed{seed}/{folder_of(arm)}"
        more = ["--checkpoint", f"{self.folder}/{start}", *words_of(self._equal_steps(data, prompts))]
        more += [] if prompts else ["--tuning.prompts", "false"]
        more += ["--tuning.places", "true"] if arm.startswith("places:") else []
        self._train(title, "tune", "prompt_tune", self.tune_config, data, (made_by, start), seed, more)
        self._test(seed, folder_of(arm), data)


def folder_of(arm: str) -> str:
    """Name of an arm in file names."""
    return arm.replace(":", "_")


def write_as_interactions(dataset: Dataset, log: Path) -> None:
    """Write a raw log in which rows shown in a user's training part are interactions; later shown rows are left out.

    So users, items and held-out items are those of the dataset, and histories differ only by the shown rows of the
    training part. An existing log is kept.
    """
    if log.exists():
        return
    user_keys, item_keys = (
        keys_of(dataset, parts) for parts in (dataset.manifest.user_parts, dataset.manifest.item_parts)
    )
    unfinished = log.with_suffix(".tmp")
    with open(unfinished, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("user_id", "item_id"))
        for part in dataset.manifest.sequences:
            with dataset.open_part(part) as parquet:
                table = parquet.read(columns=["user_id", "item_ids", "segment_ids"]).to_pydict()
            for user, items, segments in zip(*table.values(), strict=True):
                interacted = [place for place, segment in enumerate(segments) if segment == 0]
                for place, item in enumerate(items):
                    if segments[place] == 0 or place < interacted[-3]:
                        writer.writerow((user_keys[user], item_keys[item]))
    unfinished.replace(log)


def keys_of(dataset: Dataset, parts: list[Part]) -> list[str]:
    """Raw keys by dense id."""
    keys: list[str] = []
    for part in parts:
        with dataset.open_part(part) as parquet:
            keys += parquet.read(columns=["key"])["key"].to_pylist()
    return keys


# --------------------------------------------------------------------------------------------------------- report


def write_report(options: Options, steps: RecordedSteps) -> None:
    """Write report.json and report.md of the seeds that are finished."""
    report = collect_report(options, steps)
    output = ROOT / options.output
    (output / "report.json").write_text(json.dumps(report, indent=1))
    (output / "report.md").write_text(markdown(report))


def collect_report(options: Options, steps: RecordedSteps) -> dict[str, Any]:
    """The contents of the report, as JSON values."""
    folder = ROOT / options.output / options.name
    runs = ["pretrain", *map(folder_of, options.arms)]
    measured: dict[str, list[dict[str, Any]]] = {run: [] for run in runs}
    seeds = []
    for seed in range(options.seeds):
        evaluations = {run: seed_tables.read_json(folder / f"seed{seed}/{run}_test.json") for run in runs}
        if all(evaluations.values()):
            seeds.append(seed)
            for run, evaluation in evaluations.items():
                measured[run].append(read_results(evaluation, folder / f"seed{seed}/{run}"))
    results = {run: seed_tables.over_seeds([result["results"] for result in measured[run]]) for run in runs}
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
        "training": {run: [result["training"] for result in measured[run]] for run in runs},
        "steps": steps.records(),
    }


def read_results(evaluation: dict[str, Any], run: Path) -> dict[str, Any]:
    """Results of one run: on test, and on validation in its best epoch (one step, masked); and its training."""
    one, two = list(evaluation["results"].values())[:2]  # baselines may follow
    training = paper_report.read_training(run)
    lines = map(json.loads, (run / "history.jsonl").read_text().splitlines())
    of_epoch = [line for line in lines if line["epoch"] == training["best_epoch"] and "NDCG@10" in line]
    best = max(of_epoch, key=lambda line: line["NDCG@10"])  # an epoch may have validations within it
    validation = {"masked": {metric: best[metric] for metric in METRICS}}
    return {
        "results": {"validation": validation, "test one step": one, "test two steps": two},
        "training": {**training, "m": evaluation["recall"]["m"]},
    }


def difference(results: dict[str, Any], run: str, split: str) -> dict[str, Any]:
    """Masked NDCG@10 of a run minus that of the control, seed by seed."""
    values, control = (results[name][split]["masked"]["NDCG@10"]["values"] for name in (run, CONTROL))
    return seed_tables.mean_and_deviation([a - b for a, b in zip(values, control, strict=True)])


def markdown(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    exposed = report["exposed"]
    lines = [
        f"# {report['name']}: shown and not clicked items as prompts",
        "",
        f"{report['users']:,} users, {report['items']:,} items, {report['interactions']:,} interactions; "
        f"{exposed['left']:,} of {exposed['rows']:,} shown rows are between two of them. {len(report['seeds'])} seeds; "
        "± is the sample standard deviation over them. Leave-one-out, ranked over the whole catalogue. Bold: best of "
        "its column.",
        "",
        "`without`: fine-tuning without prompts, the control. `exposed`, `both`, `generated`: prompt-tuning, with at "
        f"most K prompts between two items. `{OTHER}`: shown rows are interactions, also for masking. All arms are "
        "tuned for the same number of steps. The best epoch and m of the two-step list are chosen on validation.",
        "",
        "## NDCG@10 minus that of the control, masked, seed by seed",
        "",
    ]
    runs = [run for run in report["results"] if run != CONTROL]
    splits = list(report["differences"])
    lines += ["| | " + " | ".join(splits) + " |", "|---|" + "---|" * len(splits)]
    for run in runs:
        differences = (seed_tables.cell(report["differences"][split][run], sign="+") for split in splits)
        lines.append(f"| {run} | " + " | ".join(differences) + " |")
    for split in splits:
        for how in PROTOCOLS:
            rows: list[Row] = [
                (run, [result[split][how][metric] for metric in METRICS])
                for run, result in report["results"].items()
                if how in result[split]
            ]
            if rows and split == "test one step":
                for path, figures in report["baselines"].items():
                    rows.append(
                        (paper_report.BASELINES[path], [{"mean": figures[how][m], "sd": None} for m in METRICS])
                    )
            if rows:
                lines += ["", f"## {split}, {how}", "", *seed_tables.table("", METRICS, rows)]
    lines += ["", "## Training", "", "One figure per seed.", ""]
    lines += ["| run | optimizer steps | best epoch | m of the two-step list | minutes |", "|---|---|---|---|---|"]
    for run, trainings in report["training"].items():
        columns = [", ".join(str(each[what]) for each in trainings) for what in ("steps", "best_epoch", "m")]
        minutes = ", ".join(f"{each['train_s'] / 60:.1f}" for each in trainings)
        lines.append(f"| {run} | " + " | ".join([*columns, minutes]) + " |")
    return "\n".join([*lines, "", *paper_report.origin(report)]) + "\n"


if __name__ == "__main__":
    main()
