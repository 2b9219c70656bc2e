"""From raw files to the paper's tables: every recall path, several seeds, mean and standard deviation.

    python pipelines/paper.py --dataset beauty=../shared/data/Beauty.txt --output runs/paper --seeds 5 --k 1 2 3

Makes Table 2 (Pre-train, Fine-tuning, RecGPT_1, RecGPT), Table 3 (the ablation) and the sensitivity of K and m_n (Fig.
4 to 6) of RecGPT (arXiv 2404.08675): OUTPUT/report.md, report.json, figures/*.png, brought up to date after each seed.
The same command goes on where it was stopped. A data set NAME is trained with configs/NAME.yaml, given prompts with
configs/NAME_prompts.yaml and tuned with configs/NAME_tune.yaml; where there is none, with those of the name `paper`.

K is chosen on validation with the first seed, m_n on validation with each seed; test decides nothing. Fine-tuning is
prompt-tuning without prompts: the same loss, epochs and, as prompted batches are given more tokens, optimizer steps.
"""

import argparse
import json
import os
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipelines import paper_report  # noqa: E402
from pipelines.steps import ROOT, RecordedSteps  # noqa: E402

SPLITS = ("validation", "test")
LONGEST = 10
"""The longest list that is measured; m + n of the two-step list."""


@dataclass(kw_only=True)
class Options:
    """What the user asked for."""

    datasets: dict[str, str]
    """Raw file by name."""
    output: str
    seeds: int
    ranks: int
    ks: list[int]
    input_format: str
    configs: str
    test_grid: bool

    def planned(self) -> list[str]:
        """The kind of every step."""
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
    """Run every step that is not done, and write the report."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a step that runs is ended as well
    try:
        with RecordedSteps("paper", ROOT / options.output, options.planned()) as steps:
            for name in options.datasets:
                Experiment(name, options, steps).run()
            print(f"\n== Done: {steps.executed} of {steps.total} steps run now, the others before")
    except KeyboardInterrupt:
        print("\npaper: interrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    print(f"report        {options.output}/report.md, report.json\nfigures       {options.output}/figures/*.png")


def parse(arguments: list[str] | None = None) -> Options:
    """The command line; paths become relative to the project, where commands run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", nargs="+", required=True, metavar="NAME=FILE", help="raw files and their names")
    parser.add_argument("--output", default="runs/paper", help="folder for everything (default: runs/paper)")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to SEEDS - 1 (default: 5)")
    parser.add_argument("--ranks", type=int, default=2, help="processes of each stage (default: 2)")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 3], help="prompts an interval to try (1 2 3)")
    parser.add_argument("--input_format", default="auto", help="as of the stage prepare (default: auto)")
    parser.add_argument("--configs", default="configs", help="folder of the configurations (default: configs)")
    parser.add_argument("--test_grid", action="store_true", help="measure every m_n on test too, with the first seed")
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
    ks = sorted(set(given.k))
    if not 1 <= ks[0] <= ks[-1] <= 8:
        parser.error(f"--k {' '.join(map(str, given.k))}: between two items stand 1 to 8 prompts")
    return Options(
        datasets=datasets,
        output=from_root(given.output),
        seeds=given.seeds,
        ranks=given.ranks,
        ks=ks,
        input_format=given.input_format,
        configs=from_root(given.configs),
        test_grid=given.test_grid,
    )


class Experiment:
    """Everything about one data set. Example: `Experiment("beauty", options, steps).run()`."""

    def __init__(self, name: str, options: Options, steps: RecordedSteps) -> None:
        self.name, self.options, self.steps = name, options, steps
        self.folder = f"{options.output}/{name}"
        self.data = f"{self.folder}/data"
        self.config = config_file(options.configs, name)
        self.tune_config = config_file(options.configs, name, "_tune")
        self.k: int | None = None if len(options.ks) > 1 else options.ks[0]

    def run(self) -> None:
        """Prepare once, then seed by seed; the report is brought up to date after each seed."""
        prepare = ["--input", self.options.datasets[self.name], "--input_format", self.options.input_format]
        self.steps.run(
            f"{self.name}/prepare",
            ["python", "-m", "recgpt_torchrec.prepare", *prepare, "--output", self.data],
            kind=f"{self.name} prepare",
            proof=f"{self.data}/manifest.json",
        )
        for seed in range(self.options.seeds):
            self._seed(seed)
            paper_report.write(self.options, self.steps)
        if self.options.test_grid:
            for m in range(1, LONGEST):
                self._evaluate(0, f"k{self.k}/recgpt", f"test_{m}_{LONGEST - m}", "test", m)
            paper_report.write(self.options, self.steps)

    def _seed(self, seed: int) -> None:
        place = f"seed{seed}"
        self._train(f"{place}/pretrain", "pretrain", "pretrain", self.config, self.data, ("prepare",), seed)
        self._both_splits(seed, "pretrain")
        tuned = ["--checkpoint", f"{self.folder}/{place}/pretrain"]
        ks = self.options.ks if seed == 0 else [self.chosen_k()]
        for k in ks:
            self._generate(seed, k, tuned)
        self._train(
            f"{place}/fine_tuning",
            "fine_tuning",
            "prompt_tune",
            self.tune_config,
            f"{self.folder}/{place}/k{ks[0]}/prompts",  # for the answers in it: prompts are left out
            (f"{place}/pretrain", f"{place}/k{ks[0]}/prompts"),
            seed,
            [*tuned, "--tuning.prompts", "false"],
        )
        self._both_splits(seed, "fine_tuning")
        for k in ks:
            self._prompted(seed, k, tuned)
        if self.k is None:
            self.k = self.chosen_k()
            print(f"\n{self.name}: K = {self.k} is best on validation with the first seed")

    def _generate(self, seed: int, k: int, tuned: list[str]) -> None:
        place = f"seed{seed}/k{k}"
        prompts, config = f"{self.folder}/{place}/prompts", config_file(self.options.configs, self.name, "_prompts")
        arguments = ["--config", config, "--data", self.data, *tuned, "--prompts.k", str(k), "--output", prompts]
        self.steps.run(
            f"{self.name}/{place}/prompts",
            self._stage("generate_prompts", arguments),
            kind=f"{self.name} generate",
            proof=f"{prompts}/manifest.json",
            needs=(f"{self.name}/prepare", f"{self.name}/seed{seed}/pretrain"),
            settings=values_of(ROOT / config),
        )

    def _prompted(self, seed: int, k: int, tuned: list[str]) -> None:
        place = f"seed{seed}/k{k}"
        prompts = f"{self.folder}/{place}/prompts"
        tokens = ["--batch.tokens", str(self._tokens(prompts))]
        needs = (f"seed{seed}/pretrain", f"{place}/prompts")
        self._train(f"{place}/recgpt", "tune", "prompt_tune", self.tune_config, prompts, needs, seed, [*tuned, *tokens])
        self._both_splits(seed, f"k{k}/recgpt")

    def _train(
        self,
        title: str,
        kind: str,
        stage: str,
        config: str,
        data: str,
        needs: tuple[str, ...],
        seed: int,
        more: list[str] | None = None,
    ) -> None:
        output = f"{self.folder}/{title}"
        arguments = ["--config", config, "--data", data, "--output", output, "--seed", str(seed), *(more or [])]
        self.steps.run(
            f"{self.name}/{title}",
            self._stage(stage, arguments),
            kind=f"{self.name} {kind}",
            proof=f"{output}/best.json",
            needs=tuple(f"{self.name}/{need}" for need in needs),
            settings=values_of(ROOT / config),
        )

    def _both_splits(self, seed: int, run: str) -> None:
        """Measure a run on validation, which chooses m, and with that m on test."""
        self._evaluate(seed, run, "validation", "validation", 0)
        chosen = json.loads((ROOT / self.folder / f"seed{seed}/{run}_validation.json").read_text())["recall"]["m"]
        self._evaluate(seed, run, "test", "test", chosen)

    def _evaluate(self, seed: int, run: str, file: str, split: str, m: int) -> None:
        title = f"seed{seed}/{run}_{file}"
        prompted = run.endswith("recgpt")
        data = f"{self.folder}/seed{seed}/{run.removesuffix('recgpt')}prompts" if prompted else self.data
        baselines = "true" if seed == 0 and run == "pretrain" else "false"  # they have no seed
        output = f"{self.folder}/{title}.json"
        arguments = ["--data", data, "--checkpoint", f"{self.folder}/seed{seed}/{run}", "--output", output]
        arguments += ["--split", split, "--baselines", baselines] + (["--recall.m", str(m)] if m else [])
        self.steps.run(
            f"{self.name}/{title}",
            self._stage("evaluate", arguments),
            kind=f"{self.name} {split}",
            proof=output,
            needs=(f"{self.name}/seed{seed}/{run}",),
            repeatable=True,
        )

    def _prepare(self, title: str, arguments: list[str], output: str, needs: tuple[str, ...] = ()) -> None:
        """Make a dataset; `arguments` begin with its input."""
        self.steps.run(
            f"{self.name}/{title}",
            ["python", "-m", "recgpt_torchrec.prepare", "--output", output, "--input", *arguments],
            kind=f"{self.name} prepare",
            proof=f"{output}/manifest.json",
            needs=tuple(f"{self.name}/{need}" for need in needs),
        )

    def _test(self, seed: int, run: str, data: str, *, baselines: bool = False) -> None:
        """Measure a run on test; m of the two-step list is chosen on validation by the stage."""
        title = f"seed{seed}/{run}_test"
        output = f"{self.folder}/{title}.json"
        arguments = ["--data", data, "--checkpoint", f"{self.folder}/seed{seed}/{run}", "--output", output]
        self.steps.run(
            f"{self.name}/{title}",
            self._stage("evaluate", [*arguments, "--baselines", str(baselines).lower()]),
            kind=f"{self.name} test",
            proof=output,
            needs=(f"{self.name}/seed{seed}/{run}",),
            repeatable=True,
        )

    def _stage(self, name: str, arguments: list[str]) -> list[str]:
        if self.options.ranks == 1:
            return ["python", "-m", f"recgpt_torchrec.{name}", *arguments]
        # torchrun with threads that fit the machine; unlike torchx it needs no installed project and logs no files.
        job = ["python", "-m", "recgpt_torchrec.node", "--standalone", "--nproc-per-node", str(self.options.ranks)]
        return [*job, "-m", f"recgpt_torchrec.{name}", *arguments]

    def _tokens(self, prompts: str) -> int:
        """Tokens of a prompted batch that give as many optimizer steps an epoch as batches without prompts have.

        About 1 + K times as many: less where long histories are cut to `max_len` entries.
        """
        from recgpt_torchrec import cli
        from recgpt_torchrec.config import Pretrain, PromptTune

        model = cli.parse(Pretrain, "paper", ["--config", str(ROOT / self.config), "--data", "", "--output", ""]).model
        unused = ["--data", "", "--checkpoint", "", "--output", ""]
        tune = cli.parse(PromptTune, "paper", ["--config", str(ROOT / self.tune_config), *unused])
        entries = [trained_entries(str(ROOT / data), model.max_len) for data in (prompts, self.data)]
        return round(tune.batch.tokens * entries[0] / max(entries[1], 1))

    def chosen_k(self) -> int:
        """The K whose two-step list is best on validation with the first seed."""
        if self.k is not None:
            return self.k
        values = paper_report.k_on_validation(ROOT / self.folder, self.options.ks)
        return max(values, key=lambda k: (values[k], -k))


def trained_entries(data: str, max_len: int) -> int:
    """Entries of a dataset that one epoch reads as input, prompts included; histories cut to `max_len` as in
    training."""
    import numpy as np

    from recgpt_torchrec.data import split
    from recgpt_torchrec.data.dataset import Dataset

    dataset, total = Dataset.open(data), 0
    for part in dataset.manifest.sequences:
        with dataset.open_part(part) as file:
            columns = [n for n in ("item_ids", "segment_ids") if n in file.schema_arrow.names]
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=columns)
                offsets = split.item_lists(table["item_ids"]).offsets
                segments = split.item_lists(table["segment_ids"]).values if "segment_ids" in columns else None
                real = split.Interacted.among(offsets, segments)
                if not real.places.size:
                    continue
                begin, end = split.training(real.offsets)
                trained = end > begin
                inputs = real.entries(end[trained]) - offsets[:-1][trained] - 1
                total += int(np.minimum(inputs, max_len).sum())
    return total


def config_file(folder: str, name: str, ending: str = "") -> str:
    """The configuration of a data set, or the common one."""
    own = f"{folder}/{name}{ending}.yaml"
    return own if (ROOT / own).exists() else f"{folder}/paper{ending}.yaml"


def values_of(path: Path) -> dict[str, Any]:
    """The values of a configuration file and of the file that it names as `config`; a group (`model`, ...) that both
    have is the first one's alone, as for the stages."""
    values = yaml.safe_load(path.read_text()) or {}
    base = values.pop("config", None)
    return {**values_of(path.parent / base), **values} if base else values


def from_root(path: str) -> str:
    """A path as it is named in the project's folder."""
    absolute = os.path.abspath(path)
    relative = os.path.relpath(absolute, ROOT)
    return relative if not relative.startswith("../..") else absolute


if __name__ == "__main__":
    main()
