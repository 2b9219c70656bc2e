"""Which prompts pay: prompt-tuning on prompts of several kinds, with loss and steps held fixed, over seeds.

    python pipelines/prompt_kinds.py --paper runs/paper --dataset beauty --output runs/kinds --seeds 5

Starts from the pre-trained models that `pipelines/paper.py` left in runs/paper, with the configurations that it had.
Each kind of prompts is tuned on with the soft targets of NAME_tune.yaml and without (hard), and each beside its
control, which has the same targets, as many optimizer steps, and no prompts. Soft targets are answers that were made
beside the prompts, so drawn prompts have a control of their own; kinds whose soft targets would have other rules or
other shares have hard ones alone.

Of each kind the report also says how often the next item is among the prompts before it. A model that is tuned on
histories which it has learnt sees prompts there that are right more often than any later.

OUTPUT/report.md and report.json have validation and test and the gain over the control, seed by seed; they are updated
after each seed, and the same command resumes an interrupted run. Test chooses nothing.
"""

import argparse
import json
import shlex
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
GAINS = ("NDCG@10", "HR@10", "HR@50")
"""Metrics whose gain over the control is told."""
LISTS = (10, 50)
PATHS = {True: "recgpt_1", False: "fine_tuning"}
"""The recall path that is measured, of models with and without prompts: the user's vector, one step."""
LOSSES: dict[str, dict[str, Any]] = {"soft": {}, "hard": {"tuning.soft_targets": 0.0}}
"""Options of tuning, beside those of its configuration."""
PARTS = ("training", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of prompts, and how a model is tuned on them."""

    name: str
    meaning: str
    losses: tuple[str, ...] = ("hard",)
    """Those that it is tuned with."""
    prompts: dict[str, Any] = field(default_factory=dict)
    """Options of `generate_prompts`."""
    tuning: dict[str, Any] = field(default_factory=dict)
    """Options of `prompt_tune`."""
    made_as: str = BEST
    """The kind whose prompts it has."""
    by_teacher: bool = False
    """Whether the teacher of the pre-trained model makes them."""
    soft_control: str | None = CONTROL
    """The kind that it is compared with when tuned with soft targets; None: it is a control."""

    def control(self, loss: str) -> str | None:
        """Name of the kind that it is compared with; None: it is a control."""
        return None if self.soft_control is None else self.soft_control if loss == "soft" else CONTROL


NO_PROMPTS = {"tuning.prompts": False}
KINDS = (
    Kind(name=CONTROL, meaning="no prompts", losses=("soft", "hard"), tuning=NO_PROMPTS, soft_control=None),
    Kind(name=BEST, meaning="the model's best item, as in the paper", losses=("soft", "hard")),
    Kind(
        name="none_drawn",
        meaning="no prompts, with the answers made beside drawn ones",
        losses=("soft",),
        tuning=NO_PROMPTS,
        made_as="drawn",
        soft_control=None,
    ),
    Kind(
        name="drawn",
        meaning="drawn among its 50 best by their softmax",
        losses=("soft", "hard"),
        prompts={"prompts.temperature": 1.0},
        made_as="drawn",
        soft_control="none_drawn",
    ),
    Kind(
        name="noise",
        meaning="drawn among its 1,000 best, each as likely",
        prompts={"prompts.temperature": 1e6, "prompts.top_k": 1000},
        made_as="noise",
    ),
    Kind(
        name="seen",
        meaning="its best item, which may be one of the history",
        prompts={"prompts.exclude_seen": False},
        made_as="seen",
    ),
    Kind(name="teacher", meaning="the best item of its teacher, an earlier model", made_as="teacher", by_teacher=True),
    Kind(name="last", meaning="its best item; the prompt predicts", tuning={"tuning.predict_from": "last"}),
    Kind(name="every", meaning="its best item; item and prompt predict", tuning={"tuning.predict_from": "every"}),
)
BY_NAME = {kind.name: kind for kind in KINDS}


@dataclass(kw_only=True)
class Options(experiment.Options):
    """Options of this pipeline."""

    paper: str
    """Output folder of `pipelines/paper.py`."""
    runs: dict[str, list[tuple[str, Kind]]]
    """By data set, each loss and kind that is tuned with it, in order."""
    k: int

    def planned(self) -> list[str]:
        """The kind of every step, see `RecordedSteps`."""
        steps = []
        for name, runs in self.runs.items():
            steps += [f"{name} generate"] * len({kind.made_as for _, kind in runs}) * self.seeds
            steps += [f"{name} tune", f"{name} test"] * len(runs) * self.seeds
        return steps


def main(arguments: list[str] | None = None) -> None:
    """Run every unfinished step, and write the report."""
    options = parse(arguments)
    with pipeline("prompt_kinds", options.output, options.planned()) as steps:
        finished: dict[str, int] = {}
        for name in options.runs:
            each = PromptKinds(name, options, steps)
            for seed in range(options.seeds):
                each.run(seed)
                finished[name] = seed + 1
                write_report(options, finished)


def parse(arguments: list[str] | None = None) -> Options:
    """Parse the command line; paths become relative to the project, where commands run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", default="runs/paper", help="output of pipelines/paper.py (default: runs/paper)")
    parser.add_argument("--dataset", nargs="+", required=True, metavar="NAME", help="data sets of --paper")
    parser.add_argument("--output", default="runs/kinds", help="output folder (default: runs/kinds)")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to SEEDS - 1 (default: 5)")
    parser.add_argument("--ranks", type=int, default=2, help="processes of each stage (default: 2)")
    names = [kind.name for kind in KINDS if kind.soft_control is not None]
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=names,
        default=names,
        metavar="KIND",
        help=f"kinds to tune on, beside their controls (default: all): {', '.join(names)}",
    )
    parser.add_argument("--losses", nargs="+", choices=[*LOSSES], default=[*LOSSES], help="(default: both)")
    parser.add_argument("--k", type=int, default=1, help="prompts per interval, 1 to 8 (default: 1)")
    given = parser.parse_args(arguments)
    if given.seeds < 1 or given.ranks < 1 or not 1 <= given.k <= 8:
        parser.error("--seeds and --ranks must be at least 1, and --k from 1 to 8")
    paper = from_root(given.paper)
    runs: dict[str, list[tuple[str, Kind]]] = {}
    for name in given.dataset:
        had, models = Had(ROOT / paper, name), [f"seed{seed}/pretrain" for seed in range(given.seeds)]
        if missing := had.find_missing([*models, "seed0/fine_tuning"]):
            parser.error(
                f"--dataset {name}: {given.paper} has no finished {name}/{missing}; run pipelines/paper.py with "
                f"--output {given.paper} and --seeds {given.seeds}, or give fewer --seeds"
            )
        runs[name] = runs_of(given.kinds, given.losses, had, given.seeds)
        if all(kind.control(loss) is None for loss, kind in runs[name]):
            parser.error(
                f"--dataset {name}: nothing is left of --kinds {' '.join(given.kinds)} with --losses "
                f"{' '.join(given.losses)}; teacher needs one in --paper, and soft needs soft targets there"
            )
    return Options(
        paper=paper,
        runs=runs,
        output=from_root(given.output),
        seeds=given.seeds,
        ranks=given.ranks,
        configs="",
        k=given.k,
    )


class Had:
    """What `pipelines/paper.py` left of a data set. Example: `Had(Path("runs/paper"), "beauty").config("pretrain")`"""

    def __init__(self, paper: Path, name: str) -> None:
        self.paper, self.name = paper, name

    def find_missing(self, runs: list[str]) -> str | None:
        """The first of some runs that is not finished; None: all are."""
        return next((run for run in runs if not (self.paper / self.name / run / "best.json").exists()), None)

    def config(self, step: str) -> str:
        """The configuration file that a step of the first seed had, relative to the project.

        Raises:
            SystemExit: the file has changed since.
        """
        record = self._record(step)
        words = shlex.split(record["command"])
        file = words[words.index("--config") + 1]
        settings = {name: value for name, value in record["settings"].items() if name != "second"}
        if not (ROOT / file).exists() or values_of(ROOT / file) != settings:
            raise SystemExit(
                f"prompt_kinds: {file} has changed since {self.name}/seed0/{step} was made with it; restore it, or run "
                "pipelines/paper.py anew with another --output"
            )
        return file

    @property
    def prompts_step(self) -> str:
        """The step that made the prompts of the fine-tuned model's dataset."""
        return next(need for need in self._record("fine_tuning")["needs"] if need.endswith("/prompts")).partition(
            f"{self.name}/seed0/"
        )[2]

    def _record(self, step: str) -> dict[str, Any]:
        record: dict[str, Any] = read_json(self.paper / "steps" / self.name / f"seed0/{step}.json")
        return record


def runs_of(kinds: list[str], losses: list[str], had: Had, seeds: int) -> list[tuple[str, Kind]]:
    """Each loss and kind that is tuned with it, with their controls, in order.

    Args:
        kinds, losses: names that were asked for.
        had: whose models are tuned; without teachers there are none of their prompts, and without soft targets in the
            configuration only hard ones.
        seeds: number of seeds.
    """
    tuning = values_of(ROOT / had.config("fine_tuning")).get("tuning", {})
    has_teachers = had.find_missing([f"seed{seed}/teacher" for seed in range(seeds)]) is None
    chosen: set[tuple[str, str]] = set()
    for loss in losses if tuning.get("soft_targets") else {"hard"}.intersection(losses):
        for kind in (BY_NAME[name] for name in kinds):
            control = kind.control(loss)
            if loss in kind.losses and control is not None and (has_teachers or not kind.by_teacher):
                chosen |= {(loss, kind.name), (loss, control)}
    return [(loss, kind) for loss in LOSSES for kind in KINDS if (loss, kind.name) in chosen]


class PromptKinds(experiment.Experiment):
    """All steps on one data set. Example: `PromptKinds("beauty", options, steps).run(seed=0)`."""

    options: Options

    def __init__(self, name: str, options: Options, steps: RecordedSteps) -> None:
        super().__init__(name, options, steps)
        had = Had(ROOT / options.paper, name)
        self.config, self.tune_config = had.config("pretrain"), had.config("fine_tuning")
        self.prompts_config = had.config(had.prompts_step)
        self.paper = f"{options.paper}/{name}"
        self.data = f"{self.paper}/data"
        self.models: dict[str, Any] = {}
        """Of the seed that runs, what its models are."""

    def run(self, seed: int) -> None:
        """Run every unfinished step of a seed."""
        names = (f"seed{seed}/{model}" for model in ("pretrain", "teacher"))
        self.models = {name: read_json(ROOT / self.paper / name / "best.json") for name in names}
        made: dict[str, str] = {}
        for loss, kind in self.options.runs[self.name]:
            if kind.made_as not in made:
                made[kind.made_as] = self._make_prompts(seed, BY_NAME[kind.made_as])
            self._tune(seed, kind, loss, made[kind.made_as])

    def _make_prompts(self, seed: int, kind: Kind) -> str:
        """Generate the prompts of a kind; returns the title of the step."""
        drawing = {"prompts.seed": seed} if "prompts.temperature" in kind.prompts else {}
        words = words_of({"prompts.k": self.options.k, **kind.prompts, **drawing})
        model = f"seed{seed}/{'teacher' if kind.by_teacher else 'pretrain'}"
        return self._generate_with(f"seed{seed}/{kind.name}/prompts", self.prompts_config, model, words)

    def _tune(self, seed: int, kind: Kind, loss: str, prompts: str) -> None:
        data, run = f"{self.folder}/{prompts}", f"{kind.name}/{loss}"
        has_prompts = kind.tuning != NO_PROMPTS
        options = {"tuning.predict_from": "interacted", "train.patience": 0, **LOSSES[loss], **kind.tuning}
        if has_prompts:
            options |= self._equal_steps(data)
        words = ["--checkpoint", f"{self.paper}/seed{seed}/pretrain", *words_of(options)]
        self._train(f"seed{seed}/{run}", "tune", "prompt_tune", self.tune_config, data, (prompts,), seed, words)
        self._test(seed, run, data if has_prompts else self.data, lists=LISTS)

    def _settings_of(self, config: str) -> dict[str, Any]:
        return {**super()._settings_of(config), "models": self.models}

    def _place_of(self, title: str) -> str:
        is_of_paper = title in self.models or title == "neighbours"
        return f"{self.paper}/{title}" if is_of_paper else super()._place_of(title)


def write_report(options: Options, finished: dict[str, int]) -> None:
    """Write report.json and report.md of the seeds that are finished; `finished` is their number by data set."""
    output = ROOT / options.output
    report = {name: collect(output / name, options.runs[name], range(seeds)) for name, seeds in finished.items()}
    (output / "report.json").write_text(json.dumps(report, indent=1))
    (output / "report.md").write_text(markdown(report))


def collect(folder: Path, runs: list[tuple[str, Kind]], seeds: range) -> list[dict[str, Any]]:
    """A row for each loss and kind: figures over seeds, and gains over the control of the same seed.

    Args:
        folder: of the data set.
        runs: each loss and kind.
        seeds: that are finished.
    """
    told = {name: foretold(folder / f"seed0/{name}/prompts") for name in {kind.made_as for _, kind in runs}}

    def measured(name: str, loss: str) -> list[dict[str, float]]:
        path = PATHS[BY_NAME[name].tuning != NO_PROMPTS]
        files = [folder / f"seed{seed}/{name}/{loss}_test.json" for seed in seeds]
        return [read_json(file)["results"][path]["masked"] for file in files]

    rows = []
    for loss, kind in runs:
        figures, control = measured(kind.name, loss), kind.control(loss)
        gain = None
        if control is not None:
            pairs = list(zip(figures, measured(control, loss), strict=True))
            gain = {m: mean_and_deviation([own[m] - other[m] for own, other in pairs]) for m in METRICS}
        bests = [read_json(folder / f"seed{seed}/{kind.name}/{loss}/best.json")["value"] for seed in seeds]
        rows.append(
            {
                "loss": loss,
                "kind": kind.name,
                "meaning": kind.meaning,
                "control": control,
                "foretold": told[kind.made_as] if control is not None else None,
                "validation": mean_and_deviation(bests),
                "results": {m: mean_and_deviation([each[m] for each in figures]) for m in METRICS},
                "gain": gain,
            }
        )
    return rows


def foretold(prompts: Path) -> dict[str, float | None]:
    """Of the interactions with prompts before them the share that is among these prompts, by the part of the history
    that they are in; None: a part has none."""
    dataset = Dataset.open(str(prompts))
    record, hold_out = dataset.manifest.settings[RECORD], dataset.manifest.hold_out
    counts = np.zeros((len(PARTS), 2), np.int64)
    for group in row_groups(dataset):
        rows = read_rows(dataset, group)
        histories = intervals_of(rows, record["k"], record["max_len"], PROMPTS, record["answers"])
        counts += count_foretold(histories, Starts.of(histories.lengths, hold_out, histories.starts))
    return {part: hits / count if count else None for part, (count, hits) in zip(PARTS, counts.tolist(), strict=True)}


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
        "Masked, ranked over the whole catalogue, one step; ± is the sample standard deviation over seeds; gains are "
        "over the control, seed by seed. Foretold: of the interactions of training, validation and test "
        "that have prompts before them, the share that is among these, first seed. Bold: best of its column."
    )
    lines = ["# Kinds of prompts", "", about]
    for name, rows in report.items():
        for loss in dict.fromkeys(row["loss"] for row in rows):
            of_loss = [row for row in rows if row["loss"] == loss]
            figures: list[Row] = []
            ends = [" | ".join([*(f"gain in {metric}" for metric in GAINS), "foretold |"]), "---|" * (len(GAINS) + 1)]
            for row in of_loss:
                measured = [row["validation"], *(row["results"][metric] for metric in METRICS)]
                figures.append((f"`{row['kind']}`: {row['meaning']}", measured))
                gains = (cell(row["gain"][metric], sign="+") if row["gain"] else "" for metric in GAINS)
                shares = (row["foretold"] or {}).values()
                told = ", ".join("–" if share is None else f"{share:.3f}" for share in shares)
                ends.append(" | ".join([*gains, f"{told} |"]))
            made = table(f"{name}, {loss}", ("validation, NDCG@10", *METRICS), figures)
            lines += ["", *(f"{line} {end}" for line, end in zip(made, ends, strict=True))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
