"""From raw files to the paper's tables: every recall path, over several seeds, with mean and standard deviation.

    python pipelines/paper.py --dataset beauty=../shared/data/Beauty.txt --output runs/paper --seeds 5 --k 1 2 3

Writes Table 2 (Pre-train, Fine-tuning, RecGPT_1, RecGPT), Table 3 (the ablation) and the sensitivity of K and m_n (Fig.
4 to 6) of RecGPT (arXiv 2404.08675): OUTPUT/report.md, report.json, figures/*.png, updated after each seed. The
same command resumes an interrupted pipeline. A data set NAME is pre-trained with configs/NAME.yaml, gets prompts with
configs/NAME_prompts.yaml and is tuned with configs/NAME_tune.yaml; a missing file is replaced by that of `paper`.

K is chosen on validation with the first seed, m_n on validation with each seed; test chooses nothing. Fine-tuning is
prompt-tuning without prompts: the same loss, epochs and optimizer steps, for which prompted batches have more tokens.
"""

import argparse
import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipelines import experiment, paper_report  # noqa: E402
from pipelines.experiment import config_file, from_root  # noqa: E402
from pipelines.steps import ROOT, RecordedSteps, pipeline  # noqa: E402
from recgpt_torchrec.config.command_line import values_of  # noqa: E402

SPLITS = ("validation", "test")
LONGEST = 10
"""Length of the longest list that is measured; m + n of the two-step list."""


@dataclass(kw_only=True)
class Options(experiment.Options):
    """Options of this pipeline."""

    datasets: dict[str, str]
    """Raw file by name."""
    ks: list[int]
    input_format: str
    test_grid: bool
    hold_out: list[str] = field(default_factory=list)
    """Options of the stage prepare on what is held out; empty: the last two items of each user."""

    def planned(self) -> list[str]:
        """The kind of every step, see `RecordedSteps`."""
        kinds = []
        for name in self.datasets:
            kinds.append(f"{name} prepare")
            for seed in range(self.seeds):
                ks = len(self.ks) if seed == 0 else 1
                kinds += [f"{name} pretrain", f"{name} fine_tuning"] + ks * [f"{name} generate", f"{name} tune"]
                kinds += (2 + ks) * [f"{name} {split}" for split in SPLITS]
            kinds += [f"{name} test"] * (LONGEST - 1) * self.test_grid
        return kinds


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
    parser.add_argument("--input_format", default="auto", help="as in the stage prepare (default: auto)")
    parser.add_argument("--configs", default="configs", help="folder of the configurations (default: configs)")
    parser.add_argument("--test_grid", action="store_true", help="measure every m_n on test too, with the first seed")
    parser.add_argument(
        "--hold_out", choices=["last", "time"], default="last", help="as in the stage prepare (default: last)"
    )
    parser.add_argument("--test_from", help="as in the stage prepare, with --hold_out time")
    parser.add_argument("--validation_from", help="as in the stage prepare, with --hold_out time")
    given = parser.parse_args(arguments)
    datasets: dict[str, str] = {}
    for pair in given.dataset:
        name, _, path = pair.partition("=")
        if not path or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            parser.error(f"--dataset {pair} is not NAME=FILE, for example beauty=../shared/data/Beauty.txt")
        if name in datasets or name in ("steps", "figures"):
            parser.error(f"--dataset {pair}: choose another name than {name}, which is taken")
        if "://" not in path and not os.path.exists(path):
            parser.error(f"--dataset {pair}: there is no {path}")
        datasets[name] = path if "://" in path else from_root(path)
    if given.seeds < 1 or given.ranks < 1:
        parser.error("--seeds and --ranks must be at least 1")
    hold_out = [] if given.hold_out == "last" else ["--hold_out", given.hold_out]
    for name in ("test_from", "validation_from"):
        if (value := getattr(given, name)) is not None:
            hold_out += [f"--{name}", value]
    if (given.test_from is None) == (given.hold_out == "time") or (given.validation_from and given.hold_out == "last"):
        parser.error("--hold_out time takes --test_from, and may take --validation_from; both belong to it")
    ks = sorted(set(given.k))
    if not 1 <= ks[0] <= ks[-1] <= 8:
        parser.error(f"--k {' '.join(map(str, given.k))}: K must be 1 to 8 prompts")
    return Options(
        datasets=datasets,
        output=from_root(given.output),
        seeds=given.seeds,
        ranks=given.ranks,
        ks=ks,
        input_format=given.input_format,
        configs=from_root(given.configs),
        test_grid=given.test_grid,
        hold_out=hold_out,
    )


class Paper(experiment.Experiment):
    """All steps on one data set. Example: `Paper("beauty", options, steps).run()`."""

    options: Options

    def __init__(self, name: str, options: Options, steps: RecordedSteps) -> None:
        super().__init__(name, options, steps)
        self.k: int | None = None if len(options.ks) > 1 else options.ks[0]

    def run(self) -> None:
        """Prepare once, then run seed by seed; updates the report after each seed."""
        prepare = ["--input", self.options.datasets[self.name], "--input_format", self.options.input_format]
        prepare += self.options.hold_out
        self.steps.run(
            f"{self.name}/prepare",
            ["python", "-m", "recgpt_torchrec.prepare", *prepare, "--output", self.data],
            kind=f"{self.name} prepare",
            proof=f"{self.data}/manifest.json",
        )
        for seed in range(self.options.seeds):
            self._run_seed(seed)
            paper_report.write_report(self.options, self.steps)
        if self.options.test_grid:
            for m in range(1, LONGEST):
                self._evaluate(0, f"k{self.k}/recgpt", f"test_{m}_{LONGEST - m}", "test", m)
            paper_report.write_report(self.options, self.steps)

    def _run_seed(self, seed: int) -> None:
        folder = f"seed{seed}"
        self._train(f"{folder}/pretrain", "pretrain", "pretrain", self.config, self.data, ("prepare",), seed)
        self._measure(seed, "pretrain")
        tuned = ["--checkpoint", f"{self.folder}/{folder}/pretrain"]
        ks = self.options.ks if seed == 0 else [self.chosen_k()]
        for k in ks:
            self._generate(seed, k, tuned)
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

    def _generate(self, seed: int, k: int, tuned: list[str]) -> None:
        place = f"seed{seed}/k{k}"
        prompts, config = f"{self.folder}/{place}/prompts", config_file(self.options.configs, self.name, "_prompts")
        arguments = ["--config", config, "--data", self.data, *tuned, "--prompts.k", str(k), "--output", prompts]
        self.steps.run(
            f"{self.name}/{place}/prompts",
            self._command("generate_prompts", arguments),
            kind=f"{self.name} generate",
            proof=f"{prompts}/manifest.json",
            needs=(f"{self.name}/prepare", f"{self.name}/seed{seed}/pretrain"),
            settings=values_of(ROOT / config),
        )

    def _tune(self, seed: int, k: int, tuned: list[str]) -> None:
        place = f"seed{seed}/k{k}"
        prompts = f"{self.folder}/{place}/prompts"
        tokens = ["--batch.tokens", str(self._equal_step_tokens(prompts))]
        needs = (f"seed{seed}/pretrain", f"{place}/prompts")
        self._train(f"{place}/recgpt", "tune", "prompt_tune", self.tune_config, prompts, needs, seed, [*tuned, *tokens])
        self._measure(seed, f"k{k}/recgpt")

    def _measure(self, seed: int, run: str) -> None:
        """Measure a run on validation, which chooses m, then with that m on test."""
        self._evaluate(seed, run, "validation", "validation", 0)
        chosen = json.loads((ROOT / self.folder / f"seed{seed}/{run}_validation.json").read_text())["recall"]["m"]
        self._evaluate(seed, run, "test", "test", chosen)

    def _evaluate(self, seed: int, run: str, file: str, split: str, m: int) -> None:
        title = f"seed{seed}/{run}_{file}"
        prompted = run.endswith("recgpt")
        data = f"{self.folder}/seed{seed}/{run.removesuffix('recgpt')}prompts" if prompted else self.data
        baselines = "true" if seed == 0 and run == "pretrain" else "false"  # baselines have no seed
        output = f"{self.folder}/{title}.json"
        arguments = ["--data", data, "--checkpoint", f"{self.folder}/seed{seed}/{run}", "--output", output]
        arguments += ["--split", split, "--baselines", baselines] + (["--recall.m", str(m)] if m else [])
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
        values = paper_report.k_on_validation(ROOT / self.folder, self.options.ks)
        return max(values, key=lambda k: (values[k], -k))


if __name__ == "__main__":
    main()
