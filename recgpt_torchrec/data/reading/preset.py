"""Applies `--preset auto`: the statistics that a manifest records, and options below those that the user gave."""

from dataclasses import replace
from typing import TypeVar

from recgpt_torchrec.config import Pretrain, PromptTune
from recgpt_torchrec.config.fields import given_names, option_value, with_options
from recgpt_torchrec.config.preset.rule import Choice, Statistics, choose
from recgpt_torchrec.data.dataset import Manifest
from recgpt_torchrec.data.days.opening import find_manifest, read_days
from recgpt_torchrec.data.days.records import Days
from recgpt_torchrec.errors import InputError

Config = TypeVar("Config", bound=Pretrain | PromptTune)
PREFIX = "preset auto: "


def apply_preset(config: Config) -> tuple[Config, list[str]]:
    """Put the options that `--preset auto` chooses below those that were given; without a preset, nothing is read.

    Of a folder of days the first day is read, since all days have the same model and length.

    Args:
        config: of a training stage, made from a command line or by `cli.make_config`, and not yet replaced.

    Returns:
        The configuration, and a line for each option that is chosen or would be.

    Raises:
        InputError: there is no dataset or it is damaged, or what is chosen does not fit an option that was given.
    """
    if config.preset == "none":
        return config, []
    if config.data is None:
        raise InputError("--preset auto follows a dataset's statistics; give --data DIR, or leave it out")
    days = Days.read(config.data)
    manifest = find_manifest(config.data)[0] if days is None else read_days(config.data, days)[0]
    tuned = isinstance(config, PromptTune)
    statistics = statistics_of(manifest, prompts=isinstance(config, PromptTune) and config.tuning.prompts)
    given, chosen = given_names(config), {}
    epochs = config.train.epochs if "train.epochs" in given else None
    max_len = config.model.max_len if "model.max_len" in given and config.model is not None else None
    lines = [] if days is None else [f"{PREFIX}statistics of day 1 of {config.data}, for all of its days"]
    lines += [f"{PREFIX}model options are those of the checkpoint"] if tuned and config.model is None else []
    for choice in choose(statistics, tuned, epochs, max_len):
        if manifest.day is not None and choice.name == "batch.long_histories":
            continue  # days are trained in windows anyway
        if manifest.day is not None and choice.name == "model.max_len" and choice.value > manifest.day.history:
            reason = f"since days keep the newest {manifest.day.history} interactions of earlier ones"
            choice = replace(choice, value=manifest.day.history, reason=reason)
        if beside := next((name for name in (choice.name, *choice.yields_to) if name in given), None):
            lines.append(PREFIX + _explain_given(config, choice, beside))
        else:
            chosen[choice.name] = choice.value
            lines.append(f"{PREFIX}{choice.name} {_plain(choice.value)}, {choice.reason}")
    try:
        return with_options(config, chosen), lines
    except ValueError as error:
        raise InputError(f"--preset auto does not fit an option that is given: {error}") from None


def statistics_of(manifest: Manifest, prompts: bool = False) -> Statistics:
    """What the rule reads of a manifest; `prompts`: whether the prompts of the histories are trained on."""
    return Statistics(
        users=manifest.users,
        items=manifest.items,
        interactions=manifest.interactions,
        targets=manifest.count_training_tokens(None, prompts=False),
        entries=manifest.entries if prompts else manifest.interactions,
        lengths=manifest.preparation.get("lengths", {}),
    )


def _explain_given(config: Pretrain | PromptTune, choice: Choice, beside: str) -> str:
    given, wanted = _plain(option_value(config, beside)), _plain(choice.value)
    if beside == choice.name:
        return f"{choice.name} {given} as given" + (f", instead of {wanted}" if given != wanted else "")
    return f"{choice.name} is not set to {wanted}, since {beside} {given} is given"


def _plain(value: object) -> str:
    """A value as a command line has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
