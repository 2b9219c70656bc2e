"""Which prompts pay: prompt-tuning on prompts of several kinds, with loss and steps held fixed, over seeds.

    python pipelines/prompt_kinds.py --paper runs/paper --dataset beauty --output runs/kinds --seeds 5

Starts from the pre-trained models that `pipelines/paper.py` left in runs/paper, with the configurations that it had.
Each kind of prompts is tuned on with soft targets, as NAME_tune.yaml says, and without them (hard); every tuning has as
many optimizer steps as the control, which has the same targets and no prompts. Soft targets are the answers of the
model that made the prompts, after it has read them; prompts of another model, or of items that are no answers, are
tuned on without them alone.

Of each kind the report also says how often the next item is among the prompts before it. A model that is tuned on
histories which it has learnt sees prompts there that are right more often than any later.

OUTPUT/report.md and report.json have validation and test and the gain over the control, seed by seed; they are updated
after each seed, and the same command resumes an interrupted run. Test chooses nothing.
"""

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipelines import experiment  # noqa: E402
from pipelines.experiment import from_root, words_of  # noqa: E402
from pipelines.seed_tables import Row, cell, mean_and_deviation, read_json, table  # noqa: E402
from pipelines.steps import ROOT, RecordedSteps, pipeline  # noqa: E402
from recgpt_torchrec.config.command_line import values_of  # noqa: E402
from recgpt_torchrec.data.dataset import Dataset  # noqa: E402
from recgpt_torchrec.data.split import Starts  # noqa: E402
from recgpt_torchrec.data.windows import row_groups  # noqa: E402
from recgpt_torchrec.prompts.intervals import Intervals, intervals_of  # noqa: E402
from recgpt_torchrec.prompts.prompt_dataset import PROMPTS, RECORD, read_rows  # noqa: E402

CONTROL, BEST = "none", "best"
METRICS = ("HR@10", "NDCG@10", "HR@50", "NDCG@50")
LISTS = (10, 50)
PATHS = {True: "recgpt_1", False: "fine_tuning"}
"""The recall path that is measured, of models with and without prompts: the user's vector, one step."""
LOSSES: dict[str, dict[str, Any]] = {"soft": {}, "hard": {"tuning.soft_targets": 0.0}}
"""Options of tuning, beside those of its configuration."""
PARTS = ("training", "validation", "test")


@dataclass(frozen=True)
class Kind:
    """A kind of prompts, and how a model is tuned on them."""

    name: str
    meaning: str
    prompts: dict[str, Any] = field(default_factory=dict)
    """Options of `generate_prompts`; those of a kind without any are the prompts of the kind `best`."""
    tuning: dict[str, Any] = field(default_factory=dict)
    """Options of `prompt_tune`."""
    by_teacher: bool = False
    """Whether the teacher of the pre-trained model makes them."""
    losses: tuple[str, ...] = tuple(LOSSES)
    """Those whose targets are the control's."""

    @property
    def made_as(self) -> str:
        """Name of the kind whose prompts it has."""
        return self.name if self.prompts or self.by_teacher else BEST


KINDS = (
    Kind(CONTROL, "no prompts, the control", tuning={"tuning.prompts": False}),
    Kind(BEST, "the model's best item (the paper's)"),
    Kind("drawn", "drawn among its 50 best by their softmax", {"prompts.temperature": 1.0}),
    Kind("noise", "drawn among its 1,000 best, all alike", {"prompts.temperature": 1e6, "prompts.top_k": 1000}),
    Kind("seen", "its best item, also of the history", {"prompts.exclude_seen": False}, losses=("hard",)),
    Kind("teacher", "the best item of its teacher, an earlier model", by_teacher=True, losses=("hard",)),
    Kind("last", "its best item; the last entry predicts", tuning={"tuning.predict_from": "last"}),
    Kind("every", "its best item; every entry predicts", tuning={"tuning.predict_from": "every"}),
)


@dataclass(kw_only=True)
class Options(experiment.Options):
    """Options of this pipeline."""

    paper: str
    """Output folder of `pipelines/paper.py`."""
    datasets: list[str]
    kinds: list[Kind]
    losses: list[str]
    k: int

    def kinds_of(self, name: str) -> list[Kind]:
        """The kinds that are tuned on with a data set: a model without a teacher has none of its prompts."""
        has_teacher = (ROOT / self.paper / name / "seed0/teacher/best.json").exists()
        return [kind for kind in self.kinds if has_teacher or not kind.by_teacher]

    def losses_of(self, kind: Kind) -> list[str]:
        """The losses that a kind is tuned with."""
        return [loss for loss in self.losses if loss in kind.losses]

    def planned(self) -> list[str]:
        """The kind of every step, see `RecordedSteps`."""
        steps = []
        for name in self.datasets:
            kinds = [kind for kind in self.kinds_of(name) if self.losses_of(kind)]
            steps += [f"{name} generate"] * len({kind.made_as for kind in kinds}) * self.seeds
            tunings = sum(len(self.losses_of(kind)) for kind in kinds)
            steps += [f"{name} tune", f"{name} test"] * tunings * self.seeds
        return steps


def main(arguments: list[str] | None = None) -> None:
    """Run every unfinished step, and write the report."""
    options = parse(arguments)
    with pipeline("prompt_kinds", options.output, options.planned()) as steps:
        for name in options.datasets:
            PromptKinds(name, options, steps).run()


def parse(arguments: list[str] | None = None) -> Options:
    """Parse the command line; paths become relative to the project, where commands run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", default="runs/paper", help="output of pipelines/paper.py (default: runs/paper)")
    parser.add_argument("--dataset", nargs="+", required=True, metavar="NAME", help="data sets of --paper")
    parser.add_argument("--output", default="runs/kinds", help="output folder (default: runs/kinds)")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to SEEDS - 1 (default: 5)")
    parser.add_argument("--ranks", type=int, default=2, help="processes of each stage (default: 2)")
    parser.add_argument("--configs", default="configs", help="folder of the configurations (default: configs)")
    names = [kind.name for kind in KINDS]
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=names,
        default=names,
        metavar="KIND",
        help=f"kinds to tune on, beside the control (default: all): {', '.join(names)}",
    )
    parser.add_argument("--losses", nargs="+", choices=[*LOSSES], default=[*LOSSES], help="(default: both)")
    parser.add_argument("--k", type=int, default=1, help="prompts per interval, 1 to 8 (default: 1)")
    given = parser.parse_args(arguments)
    if given.seeds < 1 or given.ranks < 1 or not 1 <= given.k <= 8:
        parser.error("--seeds and --ranks must be at least 1, and --k from 1 to 8")
    paper = from_root(given.paper)
    for name in given.dataset:
        for seed in range(given.seeds):
            if not (ROOT / paper / name / f"seed{seed}/pretrain/best.json").exists():
                parser.error(
                    f"--dataset {name}: {given.paper}/{name}/seed{seed} has no finished model; run pipelines/paper.py "
                    f"with --output {given.paper} and --seeds {given.seeds}, or give fewer --seeds"
                )
    return Options(
        paper=paper,
        datasets=list(dict.fromkeys(given.dataset)),
        output=from_root(given.output),
        seeds=given.seeds,
        ranks=given.ranks,
        configs=from_root(given.configs),
        kinds=[kind for kind in KINDS if kind.name in (CONTROL, *given.kinds)],
        losses=[loss for loss in LOSSES if loss in given.losses],
        k=given.k,
    )


class PromptKinds(experiment.Experiment):
    """All steps on one data set. Example: `PromptKinds("beauty", options, steps).run()`."""

    options: Options

    def __init__(self, name: str, options: Options, steps: RecordedSteps) -> None:
        super().__init__(name, options, steps)
        self.paper = f"{options.paper}/{name}"
        self.data = f"{self.paper}/data"

    @property
    def neighbours(self) -> str:
        """Folder of the neighbours."""
        return f"{self.paper}/neighbours"

    def run(self) -> None:
        """Run every unfinished step; the report is written after each seed."""
        for seed in range(self.options.seeds):
            made: dict[str, str] = {}
            for kind in self.options.kinds_of(self.name):
                for loss in self.options.losses_of(kind):
                    if kind.made_as not in made:
                        made[kind.made_as] = self._make_prompts(seed, kind.made_as)
                    self._tune(seed, kind, loss, made[kind.made_as])
            write_report(self.options)

    def _make_prompts(self, seed: int, name: str) -> str:
        """Generate the prompts of a kind; returns the title of the step."""
        kind = next(kind for kind in KINDS if kind.name == name)
        title, model = f"seed{seed}/{name}/prompts", "teacher" if kind.by_teacher else "pretrain"
        checkpoint, output = f"{self.paper}/seed{seed}/{model}", f"{self.folder}/{title}"
        arguments = ["--config", self.prompts_config, "--data", self.data, "--checkpoint", checkpoint]
        arguments += words_of({"prompts.k": self.options.k, **kind.prompts})
        self.steps.run(
            f"{self.name}/{title}",
            self._command("generate_prompts", [*arguments, "--output", output]),
            kind=f"{self.name} generate",
            proof=f"{output}/manifest.json",
            settings={**values_of(ROOT / self.prompts_config), "model": read_json(ROOT / checkpoint / "best.json")},
        )
        return title

    def _tune(self, seed: int, kind: Kind, loss: str, prompts: str) -> None:
        data, run = f"{self.folder}/{prompts}", f"{kind.name}/{loss}"
        words = ["--checkpoint", f"{self.paper}/seed{seed}/pretrain", *words_of({**LOSSES[loss], **kind.tuning})]
        if kind.name != CONTROL:
            words += words_of(self._equal_steps(data))
        self._train(f"seed{seed}/{run}", "tune", "prompt_tune", self.tune_config, data, (prompts,), seed, words)
        self._test(seed, run, self.data if kind.name == CONTROL else data, lists=LISTS)


def write_report(options: Options) -> None:
    """Write report.json and report.md of the seeds that are finished."""
    output = ROOT / options.output
    report = {name: collect(options, name) for name in options.datasets}
    (output / "report.json").write_text(json.dumps(report, indent=1))
    (output / "report.md").write_text(markdown(report))


def collect(options: Options, name: str) -> list[dict[str, Any]]:
    """A row for each loss and kind of a data set: figures over seeds, and gains over the control of the same seed."""
    folder, rows = ROOT / options.output / name, []
    seeds = range(options.seeds)
    told = {kind.made_as: foretold(folder / f"seed0/{kind.made_as}/prompts") for kind in options.kinds_of(name)}
    for loss in options.losses:
        control: dict[int, dict[str, float]] = {}
        for kind in options.kinds_of(name):
            runs = {seed: folder / f"seed{seed}/{kind.name}/{loss}" for seed in seeds}
            tests = {seed: read_json(run.with_name(f"{run.name}_test.json")) for seed, run in runs.items()}
            path = PATHS[kind.name != CONTROL]
            by_seed = {seed: test["results"][path]["masked"] for seed, test in tests.items() if test}
            if not by_seed:
                continue
            control = control or by_seed
            validation = [read_json(runs[seed] / "best.json")["value"] for seed in by_seed]
            gains = {m: [by_seed[seed][m] - control[seed][m] for seed in by_seed if seed in control] for m in METRICS}
            rows.append(
                {
                    "loss": loss,
                    "kind": kind.name,
                    "meaning": kind.meaning,
                    "foretold": None if kind.name == CONTROL else told[kind.made_as],
                    "validation": mean_and_deviation(validation),
                    "results": {m: mean_and_deviation([each[m] for each in by_seed.values()]) for m in METRICS},
                    "gain": None if kind.name == CONTROL else {m: mean_and_deviation(gains[m]) for m in METRICS},
                }
            )
    return rows


def foretold(prompts: Path) -> dict[str, float] | None:
    """Share of the interactions with prompts before them that are among these prompts, by the part of the history that
    they are in; None: there is no such dataset."""
    if not (prompts / "manifest.json").exists():
        return None
    dataset = Dataset.open(str(prompts))
    record, hold_out = dataset.manifest.settings[RECORD], dataset.manifest.hold_out
    counts = np.zeros((len(PARTS), 2))
    for group in row_groups(dataset):
        rows = read_rows(dataset, group)
        histories = intervals_of(rows, record["k"], record["max_len"], PROMPTS, record["answers"])
        starts = Starts.of(histories.lengths, hold_out, histories.starts)
        counts += count_foretold(histories, starts)
    return {part: float(hits / max(all_, 1)) for part, (all_, hits) in zip(PARTS, counts, strict=True)}


def count_foretold(histories: Intervals, starts: Starts) -> np.ndarray:
    """[parts, 2] number of interactions with prompts before them, in each part, and of those among their prompts."""
    place = np.arange(histories.items.size) - np.repeat(histories.offsets[:-1], histories.lengths)
    starts_of = [np.repeat(each, histories.lengths) for each in (starts.validation, starts.test)]
    part = np.sum([place >= start for start in starts_of], axis=0)
    before = histories.prompts[np.flatnonzero(place > 0) - 1]
    items, part = histories.items[place > 0], part[place > 0]
    has_prompts = (before >= 0).any(1)
    is_hit = (before == items[:, None]).any(1)
    return np.stack([np.bincount(part[which], minlength=len(PARTS)) for which in (has_prompts, is_hit)], axis=1)


def markdown(report: dict[str, list[dict[str, Any]]]) -> str:
    """The report in Markdown."""
    about = (
        "Masked, ranked over the whole catalogue, one step; ± is the sample standard deviation over seeds; the gain in "
        "NDCG@10 is over the control of the same loss, seed by seed. Foretold: share of the interactions of training, "
        "validation and test that are among the prompts before them, first seed. Bold: best of its column."
    )
    lines = ["# Kinds of prompts", "", about]
    for name, rows in report.items():
        for loss in dict.fromkeys(row["loss"] for row in rows):
            of_loss = [row for row in rows if row["loss"] == loss]
            figures: list[Row] = []
            ends = ["gain | foretold |", "---|---|"]
            for row in of_loss:
                measured = [row["validation"], *(row["results"][metric] for metric in METRICS)]
                figures.append((f"`{row['kind']}`: {row['meaning']}", measured))
                gain = cell(row["gain"]["NDCG@10"], sign="+") if row["gain"] else ""
                told = ", ".join(f"{share:.3f}" for share in (row["foretold"] or {}).values())
                ends.append(f"{gain} | {told} |")
            made = table(f"{name}, {loss}", ("validation, NDCG@10", *METRICS), figures)
            lines += ["", *(f"{line} {end}" for line, end in zip(made, ends, strict=True))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
