"""Common parts of the pipelines that train and measure: options, and steps on one data set."""

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pipelines.steps import ROOT, RecordedSteps
from recgpt_torchrec.config.command_line import values_of

if TYPE_CHECKING:
    from recgpt_torchrec.data.dataset import Dataset


@dataclass(kw_only=True)
class Options:
    """Options of every pipeline; paths are relative to the project, where commands run."""

    output: str
    seeds: int
    ranks: int
    configs: str
    """Folder of the configurations."""
    settings: str = "paper"
    """Configurations of data sets without one of their own; others than `paper` come before those."""


class Experiment:
    """Steps on one data set, in its own folder; a pipeline's subclass has `run`."""

    def __init__(self, name: str, options: Options, steps: RecordedSteps, configured_as: str | None = None) -> None:
        """
        Args:
            name: of the folder.
            options: of the pipeline.
            steps: that run.
            configured_as: the data set whose configurations it has; None: `name`.
        """
        self.name, self.options, self.steps = name, options, steps
        self.folder = f"{options.output}/{name}"
        self.data = f"{self.folder}/data"
        place = (options.configs, configured_as or name)
        self.config = config_file(*place, settings=options.settings)
        self.tune_config = config_file(*place, "_tune", options.settings)
        self.prompts_config = config_file(*place, "_prompts", options.settings)
        self.answers_config = config_file(*place, "_answers", options.settings)
        self.student_config = student_file(*place, options.settings)

    def _prepare(self, title: str, arguments: list[str], output: str, needs: tuple[str, ...] = ()) -> None:
        """Run the stage prepare; `arguments` begin with its input."""
        self.steps.run(
            f"{self.name}/{title}",
            ["python", "-m", "recgpt_torchrec.prepare", "--output", output, "--input", *arguments],
            kind=f"{self.name} prepare",
            proof=f"{output}/manifest.json",
            needs=tuple(f"{self.name}/{need}" for need in needs),
        )

    def _find_neighbours(self) -> None:
        """Find the neighbours of the dataset's items, for the configurations that train with them."""
        self.steps.run(
            f"{self.name}/neighbours",
            ["python", "-m", "recgpt_torchrec.find_neighbours", "--data", self.data, "--output", self.neighbours],
            kind=f"{self.name} neighbours",
            proof=f"{self.neighbours}/manifest.json",
            needs=(f"{self.name}/prepare",),
        )

    @property
    def neighbours(self) -> str:
        """Folder of the neighbours."""
        return self._place_of("neighbours")

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
        second: str | None = None,
    ) -> None:
        """Run a stage that trains; the configuration `second`, where there is one, replaces options of `config`."""
        output, more = f"{self.folder}/{title}", more or []
        configs = [config] if second is None else [config, second]
        arguments = [word for each in configs for word in ("--config", each)]
        arguments += ["--data", data, "--output", output, "--seed", str(seed), *more]
        if "--batch.users" not in more:
            arguments += self._share_users(config)
        if any(uses_neighbours(each) for each in configs):
            arguments += ["--neighbours.path", self.neighbours]
            needs = (*needs, "neighbours")
        self.steps.run(
            f"{self.name}/{title}",
            self._command(stage, arguments),
            kind=f"{self.name} {kind}",
            proof=f"{output}/best.json",
            needs=tuple(f"{self.name}/{need}" for need in needs),
            settings=self._settings_of(config) | ({} if second is None else {"second": values_of(ROOT / second)}),
        )

    def _generate_prompts(self, place: str, k: int, pretrained: str) -> str:
        """Generate prompts in the folder `place` from the run `pretrained`; returns the title of the step."""
        return self._generate_with(f"{place}/prompts", self.prompts_config, pretrained, ["--prompts.k", str(k)])

    def _train_teachers(self, seeds: range) -> None:
        """Pre-train teachers with these seeds; the answers in the folder of the first are the mean of all."""
        answers: list[str] = []
        for seed in reversed(seeds):
            teacher = f"seed{seed}/teacher"
            self._train(teacher, "pretrain", "pretrain", self.config, self.data, ("prepare",), seed)
            others = answers if seed == seeds[0] else []
            more = ["--averaged_with", *(f"{self.folder}/{other}" for other in others)] if others else []
            answers.append(self._generate_with(f"seed{seed}/answers", self.answers_config, teacher, more, others))

    def _generate_with(
        self, title: str, config: str, pretrained: str, more: list[str] | None = None, others: Sequence[str] = ()
    ) -> str:
        """Generate prompts or answers from the run `pretrained`, and what the steps `others` made; returns the title of
        the step."""
        output, needs = f"{self.folder}/{title}", ["prepare", pretrained, *others]
        arguments = ["--config", config, "--data", self.data, "--checkpoint", self._place_of(pretrained)]
        if uses_neighbours(config):
            arguments += ["--neighbours.path", self.neighbours]
            needs.append("neighbours")
        self.steps.run(
            f"{self.name}/{title}",
            self._command("generate_prompts", [*arguments, *(more or []), "--output", output]),
            kind=f"{self.name} generate",
            proof=f"{output}/manifest.json",
            needs=tuple(f"{self.name}/{need}" for need in needs),
            settings=self._settings_of(config),
        )
        return title

    def _settings_of(self, config: str) -> dict[str, Any]:
        """What a step reads beside its command and the steps it needs: the configuration."""
        return values_of(ROOT / config)

    def _place_of(self, title: str) -> str:
        """Folder of the result of a step."""
        return f"{self.folder}/{title}"

    def _share_users(self, config: str) -> list[str]:
        """The option that deals the users of a configuration's batches to the ranks; none where there is no such."""
        users = values_of(ROOT / config).get("batch", {}).get("users", 0)
        return ["--batch.users", str(-(-users // self.options.ranks))] if users and self.options.ranks > 1 else []

    def _test(self, seed: int, run: str, data: str, *, baselines: bool = False, lists: Sequence[int] = ()) -> None:
        """Measure a run on test in lists of some lengths (empty: the stage's own); the stage chooses m of the two-step
        list on validation."""
        title = f"seed{seed}/{run}_test"
        output = f"{self.folder}/{title}.json"
        arguments = ["--data", data, "--checkpoint", f"{self.folder}/seed{seed}/{run}", "--output", output]
        arguments += ["--baselines", str(baselines).lower(), *(["--ks", *map(str, lists)] if lists else [])]
        self.steps.run(
            f"{self.name}/{title}",
            self._command("evaluate", arguments),
            kind=f"{self.name} test",
            proof=output,
            needs=(f"{self.name}/seed{seed}/{run}",),
            repeatable=True,
        )

    def _command(self, name: str, arguments: list[str]) -> list[str]:
        if self.options.ranks == 1:
            return ["python", "-m", f"recgpt_torchrec.{name}", *arguments]
        # torchrun with threads that fit the machine; unlike torchx it needs no installed project and writes no logs.
        job = [
            "python",
            "-m",
            "recgpt_torchrec.launch.node",
            "--standalone",
            "--nproc-per-node",
            str(self.options.ranks),
        ]
        return [*job, "-m", f"recgpt_torchrec.{name}", *arguments]

    def _equal_steps(self, data: str, prompts: bool = True, max_len: int | None = None) -> dict[str, int | None]:
        """Options, and their values, with which tuning on `data`, with or without its prompts, takes as many optimizer
        steps per epoch as on the prepared dataset without prompts; empty where batches are as many users.

        With K prompts about 1 + K times as many tokens; fewer where long histories are cut to `max_len` entries (None:
        that of the configuration of pretrain).
        """
        from recgpt_torchrec import cli
        from recgpt_torchrec.config import Pretrain, PromptTune
        from recgpt_torchrec.config.defaults import tokens_of_rank
        from recgpt_torchrec.data.dataset import Dataset
        from recgpt_torchrec.data.reading.preset import apply_preset

        place = ["--data", str(ROOT / self.data), "--output", ""]
        if max_len is None:
            model = cli.parse(Pretrain, self.steps.name, ["--config", str(ROOT / self.config), *place])
            max_len = apply_preset(model)[0].model.max_len
        place += ["--checkpoint", ""]
        batch = cli.parse(PromptTune, self.steps.name, ["--config", str(ROOT / self.tune_config), *place]).batch
        tokens = batch.tokens
        if batch.step_tokens is not None:  # exact, however many: of step_tokens each rank takes 2,048 at most on a CPU
            tokens = tokens_of_rank(batch.step_tokens, self.options.ranks, max_len)
        if tokens == "auto" and batch.users:
            return {}  # as many users in each batch, however long their histories are
        if tokens == "auto":
            raise SystemExit(
                f"{self.tune_config}: batch.tokens or batch.step_tokens must be a number, so that both tunings have "
                "equal steps"
            )
        count, control = (
            inputs_of(Dataset.open(str(ROOT / path)), batch.long_histories, max_len, read)
            for path, read in ((data, prompts), (self.data, False))
        )
        return {"batch.step_tokens": None, "batch.tokens": round(tokens * count / max(control, 1))}


def words_of(options: dict[str, Any]) -> list[str]:
    """Options as words of a command line."""
    words = []
    for name, value in options.items():
        spelled = str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [spelled])]
    return words


def inputs_of(dataset: "Dataset", long_histories: Literal["newest", "windows"], max_len: int, prompts: bool) -> int:
    """Number of tokens in one epoch, with or without prompts, cut as in training."""
    import numpy as np

    from recgpt_torchrec.data.reading.histories import HistoryReader
    from recgpt_torchrec.data.windows import row_groups, windows_of

    reader = HistoryReader(
        dataset=dataset, split="training", max_len=max_len, long_histories=long_histories, prompts=prompts
    )
    windows = windows_of(row_groups(dataset), 0, 0, 4, shuffle=False)
    lengths = (reader.read(window.groups).lengths for window in windows)
    return sum(int(np.maximum(length - 1, 0).sum()) for length in lengths)


def uses_neighbours(config: str) -> bool:
    """Whether a configuration, by its file, trains with neighbours: it has their group, whose path pipelines give."""
    return "neighbours" in values_of(ROOT / config)


def student_file(folder: str, name: str, settings: str = "paper") -> str | None:
    """The file of what pretrain's configuration changes for a model that has a teacher; None: these settings have none.

    See `config_file` for the arguments.
    """
    file = config_file(folder, name, "_student", settings)
    is_of_settings = settings == "paper" or file == f"{folder}/{settings}_student.yaml"
    return file if is_of_settings and (ROOT / file).exists() else None


def config_file(folder: str, name: str, ending: str = "", settings: str = "paper") -> str:
    """Configuration file of a data set, or the common one, `paper`; other settings, where they have one, come first."""
    file = f"{folder}/{settings}{ending}.yaml"
    if settings == "paper" or not (ROOT / file).exists():
        file = f"{folder}/{name}{ending}.yaml"
    return file if (ROOT / file).exists() else f"{folder}/paper{ending}.yaml"


def for_several(file: str) -> str:
    """The file of a configuration for models that learn from several teachers: FILE_several.yaml where there is one."""
    several = f"{file.removesuffix('.yaml')}_several.yaml"
    return several if (ROOT / several).exists() else file


def read_datasets(parser: argparse.ArgumentParser, pairs: list[str], taken: Sequence[str]) -> dict[str, str]:
    """Read the words NAME=FILE of --dataset; ends the program where one is none.

    Args:
        parser: of the command line.
        pairs: the words.
        taken: names that the output folder has for other things.

    Returns:
        Files by name, relative to the project, or addresses.
    """
    datasets: dict[str, str] = {}
    for pair in pairs:
        name, _, path = pair.partition("=")
        if not path or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            parser.error(f"--dataset {pair} is not NAME=FILE, for example beauty=../shared/data/Beauty.txt")
        if name in (*datasets, *taken):
            parser.error(f"--dataset {pair}: choose another name than {name}, which is taken")
        if "://" not in path and not os.path.exists(path):
            parser.error(f"--dataset {pair}: there is no {path}")
        datasets[name] = path if "://" in path else from_root(path)
    return datasets


def from_root(path: str) -> str:
    """A path relative to the project's folder; absolute if it is far outside."""
    absolute = os.path.abspath(path)
    relative = os.path.relpath(absolute, ROOT)
    return relative if not relative.startswith("../..") else absolute
