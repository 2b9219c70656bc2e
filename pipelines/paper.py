"""From raw files to the paper's tables: every recall path, over several seeds, with mean and standard deviation.

    python pipelines/paper.py --dataset beauty=../shared/data/Beauty.txt --output runs/paper --seeds 5 --k 0 1 2 3

Writes Table 2 (Pre-train, Fine-tuning, RecGPT_1, RecGPT), Table 3 (the ablation) and the sensitivity of K and m_n (Fig.
4 to 6) of RecGPT (arXiv 2404.08675), longer lists, coverage and differences between methods: OUTPUT/report.md,
report.json, figures/*.png, updated after each seed. The same command resumes an interrupted pipeline. A data set NAME
is pre-trained with configs/NAME.yaml, gets prompts with configs/NAME_prompts.yaml and is tuned with
configs/NAME_tune.yaml; a missing file is replaced by that of `paper`. `--settings original` has the paper's own.

Where there is a NAME_student.yaml, the pre-trained model learns from the answers of a teacher, which is trained with
the same options before it; NAME_answers.yaml says how the answers are made. With --teachers 5 the seeds are taken in
groups of five, whose models all learn the mean answers of the group's five teachers, by NAME_answers_several.yaml and
NAME_student_several.yaml where there are such files: five teachers for five seeds, as without it. The deviation over
the seeds of a group is then that of the students alone.

Where a data set has neighbours, each model is also measured with the scores of neighbours raised (`evaluate
--neighbours.path`), in rows of their own.

K is chosen on validation with the first seed, m_n on validation with each seed; test chooses nothing. K = 0 is drawn
beside the others and never chosen: it is Fine-tuning, which is prompt-tuning without prompts: the same loss, epochs and
optimizer steps, for which prompted batches have more tokens.
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipelines import experiment, paper_report  # noqa: E402
from pipelines.experiment import config_file, for_several, from_root, read_datasets, words_of  # noqa: E402
from pipelines.steps import ROOT, RecordedSteps, pipeline  # noqa: E402

SPLITS = ("validation", "test")
RECBOLE = ".venv-recbole/bin/python"
LONGEST = 10
"""Length of the longest list that is measured; m + n of the two-step list."""


@dataclass(kw_only=True)
class Options(experiment.Options):
    """Options of this pipeline."""

    datasets: dict[str, "Source"]
    """By name."""
    ks: list[int]
    input_format: str
    test_grid: bool
    lists: list[int] = field(default_factory=list)
    """Lengths of further lists to measure on test, beside 5 and 10."""
    teachers: int = 1
    """Number of teachers of each pre-trained model, where a data set's models have any; seeds in groups share them."""
    baseline_minutes: float = 0
    """Minutes of training of each of the paper's baselines; 0: they are not trained."""
    items: dict[str, str] = field(default_factory=dict)
    """By data set: table of its items, for the baseline that needs an attribute of items."""
    item_attribute: str = ""

    @property
    def prompted_ks(self) -> list[int]:
        """Numbers of prompts that are tuned on; K = 0 is fine-tuning."""
        return [k for k in self.ks if k]

    def teachers_of(self, seed: int) -> range:
        """Seeds of the teachers of a seed's pre-trained model: its group, which shares them."""
        first = seed - seed % self.teachers
        return range(first, first + self.teachers)

    def uses_neighbours(self, name: str) -> bool:
        """Whether a data set is trained with neighbours, in either stage."""
        endings = ["", "_tune", "_prompts", *["_answers", "_student"] * self.has_teacher(name)]
        return any(experiment.uses_neighbours(self._config_of(name, ending)) for ending in endings)

    def has_teacher(self, name: str) -> bool:
        """Whether a data set's model learns from the answers of a teacher."""
        place = (self.configs, self.datasets[name].configured_as)
        return experiment.student_file(*place, self.settings) is not None

    def _config_of(self, name: str, ending: str = "") -> str:
        return config_file(self.configs, self.datasets[name].configured_as, ending, self.settings)

    def planned(self) -> list[str]:
        """The kind of every step, see `RecordedSteps`."""
        kinds = []
        for name in self.datasets:
            kinds.append(f"{name} prepare")
            if self.baseline_minutes:
                kinds += [f"{name} prepare"] * (self.datasets[name].configured_as in self.items) + [f"{name} baselines"]
            kinds += [f"{name} neighbours"] * self.uses_neighbours(name)
            for seed in range(self.seeds):
                ks = len(self.prompted_ks) if seed == 0 else 1
                if self.has_teacher(name):
                    teachers = self.teachers * (seed == self.teachers_of(seed)[0])
                    kinds += [f"{name} {kind}" for kind in (*teachers * ("pretrain", "generate"), *SPLITS)]
                kinds += [f"{name} pretrain", f"{name} fine_tuning"] + ks * [f"{name} generate", f"{name} tune"]
                kinds += (2 + ks) * [f"{name} {split}" for split in SPLITS]
                kinds += 3 * len(self.lists) * [f"{name} test"]
            kinds += [f"{name} test"] * (LONGEST - 1) * self.test_grid
        return kinds


@dataclass(frozen=True, kw_only=True)
class Source:
    """A raw file, and what is held out of it."""

    file: str
    configured_as: str
    """The data set whose configurations it has."""
    hold_out: list[str]
    """Options of the stage prepare; empty: the last two items of each user."""


def main(arguments: list[str] | None = None) -> None:
    """Run every unfinished step, and write the report."""
    options = parse(arguments)
    with pipeline("paper", options.output, options.planned()) as steps:
        for name in options.datasets:
            Paper(name, options, steps).run()
    print(f"figures       {options.output}/figures/*.png")


def parse(arguments: list[str] | None = None) -> Options:
    """Parse the command line; paths become relative to the project, where commands run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", nargs="+", required=True, metavar="NAME=FILE", help="raw files and their names")
    parser.add_argument("--output", default="runs/paper", help="output folder (default: runs/paper)")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to SEEDS - 1 (default: 5)")
    parser.add_argument("--ranks", type=int, default=2, help="processes of each stage (default: 2)")
    parser.add_argument(
        "--k", type=int, nargs="+", default=[1, 2, 3], help="numbers of prompts per interval to try (default: 1 2 3)"
    )
    parser.add_argument(
        "--lists",
        type=int,
        nargs="*",
        default=[],
        help="further lists to measure on test, such as 20 50 100",
    )
    parser.add_argument(
        "--baselines",
        choices=["own", "all"],
        default="own",
        help="own: popularity and co-occurrence; all: the paper's too, see tools/compare_recbole.py (default: own)",
    )
    parser.add_argument("--minutes", type=float, default=30, help="of training per baseline (default: 30)")
    parser.add_argument(
        "--items", nargs="+", default=[], metavar="NAME=FILE", help="tables of items, for the baseline S3-Rec alone"
    )
    parser.add_argument("--item_attribute", default="class", help="column of --items (default: class)")
    parser.add_argument("--input_format", default="auto", help="as in the stage prepare (default: auto)")
    parser.add_argument("--configs", default="configs", help="folder of the configurations (default: configs)")
    parser.add_argument(
        "--settings", choices=["paper", "original"], default="paper", help="ours, or the paper's own (default: paper)"
    )
    parser.add_argument(
        "--teachers",
        type=int,
        default=1,
        metavar="N",
        help="models whose mean answers a pre-trained model learns, where it has a teacher; N seeds share them "
        "(default: 1)",
    )
    parser.add_argument("--test_grid", action="store_true", help="measure every m_n on test too, with the first seed")
    parser.add_argument(
        "--hold_out",
        nargs="+",
        choices=["last", "time"],
        default=["last"],
        help="as in the stage prepare; with both, NAME_time is the data set split by time (default: last)",
    )
    parser.add_argument("--test_from", help="as in the stage prepare, with --hold_out time")
    parser.add_argument("--validation_from", help="as in the stage prepare, with --hold_out time")
    given = parser.parse_args(arguments)
    if min(given.seeds, given.ranks, given.teachers) < 1 or given.minutes <= 0:
        parser.error("--seeds, --ranks and --teachers must be at least 1, and --minutes more than 0")
    if given.baselines == "all" and not (ROOT / RECBOLE).exists():
        parser.error(f"--baselines all: there is no {RECBOLE}; run make recbole")
    boundaries = []
    for name in ("test_from", "validation_from"):
        if (value := getattr(given, name)) is not None:
            boundaries += [f"--{name}", value]
    by_time = "time" in given.hold_out
    if (given.test_from is None) == by_time or (given.validation_from and not by_time):
        parser.error("--hold_out time takes --test_from, and may take --validation_from; both belong to it")
    datasets: dict[str, Source] = {}
    for name, file in read_datasets(parser, given.dataset, ("steps", "figures")).items():
        for kind in dict.fromkeys(given.hold_out):
            title = f"{name}_{kind}" if kind == "time" and "last" in given.hold_out else name
            if title in datasets:
                parser.error(f"--dataset {name}={file}: choose another name than {name}, {title} is taken")
            hold_out = ["--hold_out", kind, *boundaries] if kind == "time" else []
            datasets[title] = Source(file=file, configured_as=name, hold_out=hold_out)
    ks = sorted(set(given.k))
    if not 0 <= ks[0] <= ks[-1] <= 8 or ks == [0]:
        parser.error(f"--k {' '.join(map(str, given.k))}: K must be 0 to 8 prompts, and one of them at least 1")
    if any(length <= LONGEST for length in given.lists):
        parser.error(f"--lists {' '.join(map(str, given.lists))}: lists of 5 and {LONGEST} are always measured")
    items = {}
    for pair in given.items:
        name, _, path = pair.partition("=")
        if given.baselines != "all" or name not in {source.configured_as for source in datasets.values()}:
            parser.error(f"--items {pair}: it must begin with a data set's name, and takes --baselines all")
        if "://" not in path and not os.path.exists(path):
            parser.error(f"--items {pair}: there is no {path}")
        items[name] = path if "://" in path else from_root(path)
    return Options(
        datasets=datasets,
        output=from_root(given.output),
        seeds=given.seeds,
        ranks=given.ranks,
        ks=ks,
        input_format=given.input_format,
        configs=from_root(given.configs),
        settings=given.settings,
        test_grid=given.test_grid,
        lists=sorted(set(given.lists)),
        teachers=given.teachers,
        baseline_minutes=given.minutes if given.baselines == "all" else 0,
        items=items,
        item_attribute=given.item_attribute,
    )


class Paper(experiment.Experiment):
    """All steps on one data set. Example: `Paper("beauty", options, steps).run()`."""

    options: Options

    def __init__(self, name: str, options: Options, steps: RecordedSteps) -> None:
        super().__init__(name, options, steps, options.datasets[name].configured_as)
        if options.teachers > 1 and self.student_config is not None:
            self.answers_config, self.student_config = map(for_several, (self.answers_config, self.student_config))
        self.k: int | None = None if len(options.prompted_ks) > 1 else options.prompted_ks[0]

    def run(self) -> None:
        """Prepare once, then run seed by seed; updates the report after each seed."""
        self._prepare_source("prepare", self.data)
        if self.options.baseline_minutes:
            self._train_baselines()
        if self.options.uses_neighbours(self.name):
            self._find_neighbours()
        for seed in range(self.options.seeds):
            self._run_seed(seed)
            paper_report.write_report(self.options, self.steps)
        if self.options.test_grid:
            for m in range(1, LONGEST):
                self._evaluate(0, f"k{self.k}/recgpt", f"test_{m}_{LONGEST - m}", "test", m)
            paper_report.write_report(self.options, self.steps)

    def _run_seed(self, seed: int) -> None:
        folder = f"seed{seed}"
        data, needs = self.data, "prepare"
        if self.student_config is not None:
            teachers = self.options.teachers_of(seed)
            needs = f"seed{teachers[0]}/answers"
            if seed == teachers[0]:
                self._train_teachers(teachers)
            data = f"{self.folder}/{needs}"
            self._measure(seed, "teacher")
        run = f"{folder}/pretrain"
        self._train(run, "pretrain", "pretrain", self.config, data, (needs,), seed, second=self.student_config)
        self._measure(seed, "pretrain")
        tuned = ["--checkpoint", f"{self.folder}/{folder}/pretrain"]
        ks = self.options.prompted_ks if seed == 0 else [self.chosen_k()]
        for k in ks:
            self._generate_prompts(f"{folder}/k{k}", k, f"{folder}/pretrain")
        self._train(
            f"{folder}/fine_tuning",
            "fine_tuning",
            "prompt_tune",
            self.tune_config,
            f"{self.folder}/{folder}/k{ks[0]}/prompts",  # for its answers; prompts are ignored
            (f"{folder}/pretrain", f"{folder}/k{ks[0]}/prompts"),
            seed,
            [*tuned, "--tuning.prompts", "false"],
        )
        self._measure(seed, "fine_tuning")
        for k in ks:
            self._tune(seed, k, tuned)
        if self.k is None:
            self.k = self.chosen_k()
            print(f"\n{self.name}: K = {self.k} is best on validation with the first seed")
        for length in self.options.lists:
            for run in ("pretrain", "fine_tuning", f"k{self.k}/recgpt"):
                self._evaluate(seed, run, f"test_{length}", "test", 0, length)

    def _prepare_source(self, title: str, output: str, more: list[str] | None = None) -> None:
        source = self.options.datasets[self.name]
        arguments = ["--input", source.file, "--input_format", self.options.input_format, *source.hold_out]
        self.steps.run(
            f"{self.name}/{title}",
            ["python", "-m", "recgpt_torchrec.prepare", *arguments, *(more or []), "--output", output],
            kind=f"{self.name} prepare",
            proof=f"{output}/manifest.json",
        )

    def _train_baselines(self) -> None:
        data, output, needs = self.data, f"{self.folder}/baselines", "prepare"
        table = self.options.items.get(self.options.datasets[self.name].configured_as)
        if table:  # beside ours, whose model would read the attribute; ids and split are the same
            data, needs = f"{self.folder}/data_items", "prepare_items"
            self._prepare_source(needs, data, ["--items", table, "--item_attributes", self.options.item_attribute])
        arguments = ["--data", data, "--output", output, "--minutes", str(self.options.baseline_minutes)]
        self.steps.run(
            f"{self.name}/baselines",
            ["python", "-m", "tools.compare_recbole", *arguments],
            kind=f"{self.name} baselines",
            proof=f"{output}/report.json",
            needs=(f"{self.name}/{needs}",),
        )

    def _tune(self, seed: int, k: int, tuned: list[str]) -> None:
        place = f"seed{seed}/k{k}"
        prompts = f"{self.folder}/{place}/prompts"
        tokens = words_of(self._equal_steps(prompts))
        needs = (f"seed{seed}/pretrain", f"{place}/prompts")
        self._train(f"{place}/recgpt", "tune", "prompt_tune", self.tune_config, prompts, needs, seed, [*tuned, *tokens])
        self._measure(seed, f"k{k}/recgpt")

    def _measure(self, seed: int, run: str) -> None:
        """Measure a run on validation, which chooses m, then with that m on test."""
        self._evaluate(seed, run, "validation", "validation", 0)
        chosen = json.loads((ROOT / self.folder / f"seed{seed}/{run}_validation.json").read_text())["recall"]["m"]
        self._evaluate(seed, run, "test", "test", chosen)

    def _evaluate(self, seed: int, run: str, file: str, split: str, m: int, length: int = LONGEST) -> None:
        title = f"seed{seed}/{run}_{file}"
        prompted = run.endswith("recgpt")
        data = f"{self.folder}/seed{seed}/{run.removesuffix('recgpt')}prompts" if prompted else self.data
        baselines = "true" if seed == 0 and run == "pretrain" else "false"  # baselines have no seed
        output = f"{self.folder}/{title}.json"
        arguments = ["--data", data, "--checkpoint", f"{self.folder}/seed{seed}/{run}", "--output", output]
        arguments += ["--split", split, "--baselines", baselines] + (["--recall.m", str(m)] if m else [])
        arguments += ["--ks", str(length)] if length != LONGEST else []
        arguments += ["--neighbours.path", self.neighbours] if self.options.uses_neighbours(self.name) else []
        self.steps.run(
            f"{self.name}/{title}",
            self._command("evaluate", arguments),
            kind=f"{self.name} {split}",
            proof=output,
            needs=(f"{self.name}/seed{seed}/{run}",),
            repeatable=True,
        )

    def chosen_k(self) -> int:
        """The K whose two-step list is best on validation with the first seed."""
        if self.k is not None:
            return self.k
        values = paper_report.k_on_validation(ROOT / self.folder, self.options.prompted_ks)
        return max(values, key=lambda k: (values[k], -k))


if __name__ == "__main__":
    main()
