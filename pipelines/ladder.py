"""From the paper's own settings to ours, one choice at a time, over seeds: what each of our choices is worth.

    python pipelines/ladder.py --dataset beauty=../shared/data/Beauty.txt --output runs/ladder --seeds 5

Starts at configs/original.yaml and original_tune.yaml and ends at the data set's own configuration, or beauty.yaml.
Each rung takes some options of ours and keeps those of the rungs before it; pre-training first, then prompt-tuning,
which starts from the last rung of pre-training. OUTPUT/report.md and report.json have HR@10 and NDCG@10 on test of
every rung, its gain over the rung before, seed by seed, and the time to train; they are updated after each seed, and
the same command resumes an interrupted ladder. Test chooses nothing: each rung keeps its best epoch by validation.

What a choice is worth depends on those before it. `--without` also pre-trains ours without each choice by itself, and
says what the choice is worth beside all others.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipelines import experiment  # noqa: E402
from pipelines.experiment import config_file, from_root, read_datasets, words_of  # noqa: E402
from pipelines.ladder_rungs import ORIGINAL, PRETRAIN, STAGES, Step, climb, read_options  # noqa: E402
from pipelines.paper_report import read_training  # noqa: E402
from pipelines.seed_tables import Row, cell, mean_and_deviation, read_json, table  # noqa: E402
from pipelines.steps import ROOT, RecordedSteps, pipeline  # noqa: E402
from recgpt_torchrec import config  # noqa: E402
from recgpt_torchrec.config.command_line import values_of  # noqa: E402

METRICS = ("HR@10", "NDCG@10")
WITHOUT = "without"
Figures = dict[int, dict[str, float]]
"""Figures of a run by seed and metric."""


@dataclass(kw_only=True)
class Options(experiment.Options):
    """Options of this pipeline."""

    datasets: dict[str, str]
    """Raw file by name."""
    rungs: list[str]
    """Names of the rungs to measure; empty: all."""
    without: list[str]
    """Names of the rungs of pre-training that ours is measured without, each by itself."""
    epochs: int
    """Epochs of every rung; 0: each has its own."""


class Climb:
    """The rungs of one data set.

    Example: `Climb("beauty", options).measured("pretrain")`
    """

    def __init__(self, name: str, options: Options) -> None:
        self.name, self.options = name, options
        endings = {"pretrain": "", "prompt_tune": "_tune"}
        self.start = {stage: f"{options.configs}/{ORIGINAL}{ending}.yaml" for stage, ending in endings.items()}
        self.rungs = {
            stage: climb(kind, rungs, self.start[stage], self._ours(endings[stage]))
            for stage, (kind, rungs, _) in STAGES.items()
        }
        """By stage."""

    def _ours(self, ending: str) -> str:
        """The configuration file at the top; for one that leaves all options to the data, what these are for Beauty."""
        file = config_file(self.options.configs, self.name, ending)
        values = values_of(ROOT / file)
        if values == {"preset": "auto"}:
            return f"{self.options.configs}/beauty.yaml"
        if values.get("preset") == "auto" and not ending:
            raise SystemExit(f"ladder: {file} leaves options to the data beside those it names; write all of them down")
        return file  # what paper_tune.yaml leaves to the data is the stage's default on a log like Beauty

    @property
    def max_len(self) -> int:
        """Maximum length of a history of the model that is tuned, that of the last rung of pre-training."""
        options = read_options(config.Pretrain, self.start["pretrain"])
        for step in self.rungs["pretrain"]:
            options |= step.added
        return int(options["model.max_len"])

    @property
    def last(self) -> str:
        """Name of the last rung of pre-training, from which tuning starts."""
        return self.rungs["pretrain"][-1].rung.name

    def measured(self, stage: str) -> list[str]:
        """Names of the rungs of a stage that are measured: those that were asked for, and what tuning starts from."""
        names = [step.rung.name for step in self.rungs[stage]]
        if not self.options.rungs:
            return names
        wanted = {rung.partition(".")[2] for rung in self.options.rungs if rung.startswith(f"{stage}.")}
        if stage == "pretrain" and (self.measured("prompt_tune") or self.omitted):
            wanted.add(self.last)
        return [name for name in names if name in wanted]

    @property
    def omitted(self) -> list[Step]:
        """The rungs of pre-training that ours is measured without."""
        return [step for step in self.rungs["pretrain"] if step.rung.name in self.options.without]

    def ours_without(self, omitted: Step) -> dict[str, Any]:
        """What pre-training takes over the paper's settings, but for the options of one rung."""
        added = {name: value for step in self.rungs["pretrain"] for name, value in step.added.items()}
        options = {name: value for name, value in added.items() if name not in omitted.added}
        if "loss.candidates" in omitted.added and {"soft_targets", "neighbours.path"} & options.keys():
            raise SystemExit(
                f"ladder: {self.name} has soft targets, for which the paper's loss has no softmax; name the rungs of "
                "--without, but for loss"
            )
        return options

    def planned(self) -> list[str]:
        """The kind of every step, see `RecordedSteps`."""
        kinds = []
        for stage in STAGES:
            kinds += len(self.measured(stage)) * [f"{self.name} {stage}", f"{self.name} test"]
        kinds += len(self.omitted) * [f"{self.name} pretrain", f"{self.name} test"]
        kinds += [f"{self.name} generate"] * bool(self.measured("prompt_tune"))
        neighbours = [f"{self.name} neighbours"] * self.uses_neighbours
        return [f"{self.name} prepare", *neighbours, *kinds * self.options.seeds]

    @property
    def uses_neighbours(self) -> bool:
        """Whether a rung that is measured trains with neighbours."""
        path = "neighbours.path"
        added = {stage: [path in step.added for step in steps] for stage, steps in self.rungs.items()}
        names = {stage: [step.rung.name for step in steps] for stage, steps in self.rungs.items()}
        first = {stage: names[stage][added[stage].index(True) :] for stage in STAGES if any(added[stage])}
        trains = any(set(self.measured(stage)) & set(later) for stage, later in first.items())
        return trains or any(path in self.ours_without(step) for step in self.omitted)


class Ladder(experiment.Experiment):
    """All steps on one data set. Example: `Ladder("beauty", options, steps).run()`."""

    options: Options

    def __init__(self, name: str, options: Options, steps: RecordedSteps) -> None:
        super().__init__(name, options, steps)
        self.climb = Climb(name, options)

    def run(self) -> None:
        """Run every unfinished step; the report is written after each seed."""
        self._prepare("prepare", [self.options.datasets[self.name]], self.data)
        if self.climb.uses_neighbours:
            self._find_neighbours()
        for seed in range(self.options.seeds):
            self._train_rungs("pretrain", seed, self.data, ("prepare",))
            for step in self.climb.omitted:
                run, options = f"{WITHOUT}/{step.rung.name}", self.climb.ours_without(step)
                self._train_rung("pretrain", run, options, seed, self.data, ("prepare",))
            if self.climb.measured("prompt_tune"):
                last = f"seed{seed}/pretrain/{self.climb.last}"
                prompts = self._generate_prompts(f"seed{seed}", 1, last)
                more = ["--checkpoint", f"{self.folder}/{last}"]
                self._train_rungs("prompt_tune", seed, f"{self.folder}/{prompts}", (last, prompts), more)
            write_report(self.options)

    def _train_rungs(self, stage: str, seed: int, data: str, needs: tuple[str, ...], more: Sequence[str] = ()) -> None:
        added: dict[str, Any] = {}
        for step in self.climb.rungs[stage]:
            added |= step.added
            if step.rung.name in self.climb.measured(stage):
                self._train_rung(stage, f"{stage}/{step.rung.name}", added, seed, data, needs, more)

    def _train_rung(
        self,
        stage: str,
        run: str,
        added: dict[str, Any],
        seed: int,
        data: str,
        needs: tuple[str, ...],
        more: Sequence[str] = (),
    ) -> None:
        """Train and measure the run in a folder, from the paper's settings with the options `added`."""
        options = added | ({"train.epochs": self.options.epochs} if self.options.epochs else {})
        if stage == "prompt_tune" and {"batch.tokens", "batch.step_tokens"} & options.keys():
            # As many optimizer steps as without prompts.
            options |= self._equal_steps(data, max_len=self.climb.max_len)
        if "neighbours.path" in options:
            options["neighbours.path"], needs = self.neighbours, (*needs, "neighbours")
        words = [*more, *words_of(options)]
        self._train(f"seed{seed}/{run}", stage, stage, self.climb.start[stage], data, needs, seed, words)
        self._test(seed, run, data)


def main(arguments: list[str] | None = None) -> None:
    """Run every unfinished step, and write the report."""
    options = parse(arguments)
    planned = [kind for name in options.datasets for kind in Climb(name, options).planned()]
    with pipeline("ladder", options.output, planned) as steps:
        for name in options.datasets:
            Ladder(name, options, steps).run()


def parse(arguments: list[str] | None = None) -> Options:
    """Parse the command line; paths become relative to the project, where commands run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", nargs="+", required=True, metavar="NAME=FILE", help="raw files and their names")
    parser.add_argument("--output", default="runs/ladder", help="output folder (default: runs/ladder)")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to SEEDS - 1 (default: 5)")
    parser.add_argument("--ranks", type=int, default=2, help="processes of each stage (default: 2)")
    parser.add_argument("--configs", default="configs", help="folder of the configurations (default: configs)")
    names = [f"{stage}.{rung.name}" for stage, (_, rungs, _) in STAGES.items() for rung in rungs]
    parser.add_argument(
        "--rungs", nargs="+", default=[], metavar="RUNG", help=f"rungs to measure (default: all): {', '.join(names)}"
    )
    choices = [rung.name for rung in PRETRAIN[1:]]
    parser.add_argument(
        "--without",
        nargs="*",
        metavar="RUNG",
        help=f"measure ours without each of these rungs of pre-training too (without names: all): {', '.join(choices)}",
    )
    parser.add_argument("--epochs", type=int, default=0, help="epochs of every rung, for a try (default: its own)")
    given = parser.parse_args(arguments)
    if given.seeds < 1 or given.ranks < 1 or given.epochs < 0:
        parser.error("--seeds and --ranks must be at least 1, and --epochs at least 0")
    if unknown := set(given.rungs) - set(names):
        parser.error(f"--rungs {' '.join(sorted(unknown))}: choose among {', '.join(names)}")
    without = choices if given.without == [] else given.without or []
    if unknown := set(without) - set(choices):
        parser.error(f"--without {' '.join(sorted(unknown))}: choose among {', '.join(choices)}")
    return Options(
        datasets=read_datasets(parser, given.dataset, ("steps",)),
        output=from_root(given.output),
        seeds=given.seeds,
        ranks=given.ranks,
        configs=from_root(given.configs),
        rungs=given.rungs,
        without=without,
        epochs=given.epochs,
    )


def write_report(options: Options) -> None:
    """Write report.json and report.md of the seeds that are finished."""
    output = ROOT / options.output
    report = {name: collect(Climb(name, options)) for name in options.datasets}
    (output / "report.json").write_text(json.dumps(report, indent=1))
    (output / "report.md").write_text(markdown(report))


def collect(climbed: Climb) -> list[dict[str, Any]]:
    """The rungs of a data set in order, with their figures over seeds and their gains over the rung before; then ours
    without some of them, with what these gain."""
    rows, before, ours = [], Figures(), Figures()
    for stage, (_, _, paths) in STAGES.items():
        for step in climbed.rungs[stage]:
            row, figures = _read_row(climbed, stage, step, paths)
            if figures:
                rows.append({**row, "gain": _gain(figures, before)})
                before = figures
        if stage == "pretrain":
            ours = before
    for step in climbed.omitted:
        row, figures = _read_row(climbed, WITHOUT, step, ("pretrain",))
        if figures:
            rows.append({**row, "gain": _gain(ours, figures)})
    return rows


def _read_row(climbed: Climb, stage: str, step: Step, paths: tuple[str, ...]) -> tuple[dict[str, Any], Figures]:
    """A row of the report but for its gain, and the figures of its last path; both empty where no seed is finished."""
    folder = ROOT / climbed.options.output / climbed.name
    runs = {seed: folder / f"seed{seed}/{stage}/{step.rung.name}" for seed in range(climbed.options.seeds)}
    tests = {seed: read_json(run.with_name(f"{run.name}_test.json")) for seed, run in runs.items()}
    by_seed = {seed: test["results"] for seed, test in tests.items() if test}
    if not by_seed:
        return {}, {}
    training = [read_training(runs[seed]) for seed in by_seed]
    row = {
        "stage": stage,
        "rung": step.rung.name,
        "meaning": step.rung.meaning,
        "options": step.added,
        "results": {
            path: {m: mean_and_deviation([each[path]["masked"][m] for each in by_seed.values()]) for m in METRICS}
            for path in paths
        },
        "train_s": mean_and_deviation([each["train_s"] for each in training]),
        "best_epochs": [each["best_epoch"] for each in training],
    }
    return row, {seed: results[paths[-1]]["masked"] for seed, results in by_seed.items()}


def _gain(figures: Figures, over: Figures) -> dict[str, Any] | None:
    """What figures gain over others, seed by seed; None: they share no seed."""
    shared = [seed for seed in figures if seed in over]
    return {m: mean_and_deviation([figures[s][m] - over[s][m] for s in shared]) for m in METRICS} if shared else None


def markdown(report: dict[str, list[dict[str, Any]]]) -> str:
    """The report in Markdown."""
    about = (
        "Test, masked, ranked over the whole catalogue; ± is the sample standard deviation over seeds. The gain is "
        "over the rung before, seed by seed; of tuning that of two steps; of `without` that of ours over ours without "
        "the choice. Bold: best of its column."
    )
    lines = ["# From the paper's settings to ours", "", about]
    for name, rungs in report.items():
        rows: list[Row] = []
        ends = ["gain in NDCG@10 | best epochs | minutes |", "---|---|---|"]
        for rung in rungs:
            for path, figures in rung["results"].items():
                rows.append((f"`{rung['stage']}.{rung['rung']}` {path}: {rung['meaning']}", [*figures.values()]))
                has_gain = rung["gain"] and path == list(rung["results"])[-1]
                gain = cell(rung["gain"]["NDCG@10"], sign="+") if has_gain else ""
                epochs = ", ".join(map(str, rung["best_epochs"]))
                ends.append(f"{gain} | {epochs} | {rung['train_s']['mean'] / 60:.1f} |")
        made = table(name, METRICS, rows)
        lines += ["", *(f"{line} {end}" for line, end in zip(made, ends, strict=True))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
