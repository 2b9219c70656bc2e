"""Options of the runner of all stages: those of each stage, in a group of its name."""

from dataclasses import dataclass, field, fields
from typing import Any

from recgpt_torchrec.config.checks import at_least, within
from recgpt_torchrec.config.device import Device
from recgpt_torchrec.config.fields import LEADING, given_names, remember_given
from recgpt_torchrec.config.prepare import Prepare
from recgpt_torchrec.config.prompts import GeneratePrompts, PromptTune
from recgpt_torchrec.config.retrieval import INTERESTS, Evaluate, Export, Retrieve
from recgpt_torchrec.config.training import Pretrain

GIVEN = "-"
"""Value of the options that the runner fills in."""
SET_FOR_ALL = ("k", "interests", "device")
"""Options of stages that an option of the runner with the same name sets."""


@dataclass(kw_only=True)
class _Prepare(Prepare):
    """The stage prepare."""

    input: list[str] = field(default_factory=lambda: [GIVEN])
    """Filled in by run."""
    output: str = GIVEN
    """Filled in by run."""


@dataclass(kw_only=True)
class _Pretrain(Pretrain):
    """The stage pretrain."""

    data: str = GIVEN
    """Filled in by run."""
    output: str = GIVEN
    """Filled in by run."""


@dataclass(kw_only=True)
class _GeneratePrompts(GeneratePrompts):
    """The stage generate_prompts."""

    data: str = GIVEN
    """Filled in by run."""
    checkpoint: str = GIVEN
    """Filled in by run."""
    output: str = GIVEN
    """Filled in by run."""


@dataclass(kw_only=True)
class _PromptTune(PromptTune):
    """The stage prompt_tune."""

    data: str = GIVEN
    """Filled in by run."""
    checkpoint: str = GIVEN
    """Filled in by run."""
    output: str = GIVEN
    """Filled in by run."""


@dataclass(kw_only=True)
class _Evaluate(Evaluate):
    """The stage evaluate."""

    data: str = GIVEN
    """Filled in by run."""
    checkpoint: str = GIVEN
    """Filled in by run."""
    output: str = GIVEN
    """Filled in by run."""


@dataclass(kw_only=True)
class _Export(Export):
    """The stage export."""

    data: str = GIVEN
    """Filled in by run."""
    checkpoint: str = GIVEN
    """Filled in by run."""
    output: str = GIVEN
    """Filled in by run."""


@dataclass(kw_only=True)
class _Retrieve(Retrieve):
    """The stage retrieve."""

    export: str = GIVEN
    """Filled in by run."""
    data: str | None = GIVEN
    """Filled in by run."""
    output: str = GIVEN
    """Filled in by run."""


@dataclass(kw_only=True)
class RunAll:
    """Run the stages one after the other, from a log to lists: prepare, pretrain, evaluate, export, retrieve.

    What is there already is left as it is, and what was interrupted is resumed: give the same command again. Every
    option of a stage is here too, after the stage's name.

    Example: recgpt run log.csv --output runs/mine --prepare.min_count 1 --pretrain.train.epochs 10
    """

    output: str
    """Folder for the results: data, model, test.json, vectors and lists; with --second_stage also prompts, tuned and
    tuned_test.json."""
    input: list[str] = field(default_factory=list, metadata={LEADING: True})
    """Raw log: files, folders or patterns, as for prepare; may be given first, without the option."""
    second_stage: bool = False
    """Whether to generate prompts and tune on them (paper, section 4.3), and to export the tuned model."""
    k: int = 50
    """Length of the lists."""
    interests: int = 1
    """Number of interest vectors per user, 1 to 32."""
    device: Device = "auto"
    """Device to compute on, of every stage. auto: CUDA where torch sees a GPU, else the CPU."""
    prepare: _Prepare = field(default_factory=_Prepare)
    pretrain: _Pretrain = field(default_factory=_Pretrain)
    generate_prompts: _GeneratePrompts = field(default_factory=_GeneratePrompts)
    prompt_tune: _PromptTune = field(default_factory=_PromptTune)
    evaluate: _Evaluate = field(default_factory=_Evaluate)
    export: _Export = field(default_factory=_Export)
    retrieve: _Retrieve = field(default_factory=_Retrieve)

    def __post_init__(self) -> None:
        if not self.input:
            raise ValueError("--input is empty; name the raw log, as in recgpt run log.csv --output runs/mine")
        at_least("--k", self.k, 1)
        within("--interests", self.interests, 1, INTERESTS)
        filled = ("input", "output", "data", "checkpoint", "export")
        for group in GROUPS:
            step = getattr(self, group)
            for name in filled:
                if getattr(step, name, GIVEN) not in (GIVEN, [GIVEN]):
                    raise ValueError(f"--{group}.{name} is filled in by run; leave it out")
            for name in SET_FOR_ALL:
                default = type(step).__dataclass_fields__[name].default if hasattr(step, name) else None
                if hasattr(step, name) and getattr(step, name) != default:
                    raise ValueError(f"--{group}.{name} is set by --{name} for all stages; leave it out")
        if self.prepare.append:
            raise ValueError("--prepare.append adds a day to a folder of days; run prepare and pretrain for that")


GROUPS = ("prepare", "pretrain", "generate_prompts", "prompt_tune", "evaluate", "export", "retrieve")
"""The groups of `RunAll`, each a stage."""


def stage_config(config_class: type, config: RunAll, name: str, **filled: Any) -> Any:
    """The options of the stage `name`, from its group in `RunAll` and what the runner fills in."""
    group, prefix = getattr(config, name), f"{name}."
    values = {each.name: getattr(group, each.name) for each in fields(config_class)}
    given = {each.removeprefix(prefix) for each in given_names(config) if each.startswith(prefix)}
    return remember_given(config_class(**{**values, **filled}), given)
