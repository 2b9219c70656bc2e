"""The header logged before the first step: ranks, data, size of the model, length of an epoch."""

import importlib.metadata
import math
import platform
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from recgpt_torchrec import __version__
from recgpt_torchrec.checkpoints.repeat_bias import describe_bias
from recgpt_torchrec.config import Train
from recgpt_torchrec.data.dataset import Manifest
from recgpt_torchrec.data.inputs.events import ASKED
from recgpt_torchrec.data.inputs.spec import TIMES, Inputs
from recgpt_torchrec.data.inputs.times import unit_name
from recgpt_torchrec.distributed.placements import Placement, table_text
from recgpt_torchrec.model.tabled.base import unwrapped
from recgpt_torchrec.training.building import Tokens
from recgpt_torchrec.training.execution import Execution
from recgpt_torchrec.training.run import describe_users


def header(
    model: nn.Module,
    manifest: Manifest,
    device: torch.device,
    execution: Execution,
    *,
    placed: list[Placement],
    tokens: Tokens,
    train: Train,
    validates: bool = True,
    repeat_bias: float = 0.0,
) -> str:
    """The lines logged before training: ranks, data, decoder, tables, length, validation.

    Args:
        model: sharded.
        manifest: of the dataset.
        device: of this rank.
        execution: how steps are computed.
        placed: where the tables are.
        tokens: of a batch.
        train: length of the training, and validations.
        validates: whether something is held out for validation, so that training may stop early.
        repeat_bias: of the checkpoint that training starts or resumes from.
    """
    ranks, name = dist.get_world_size(), _device_name(device)
    others = manifest.entries - manifest.interactions
    parameters = sum(parameter.numel() for parameter in unwrapped(model).dense.parameters())
    without = manifest.preparation.get("split", {}).get("items_without_target", 0)
    steps = max(1, math.ceil(tokens.epoch / (tokens.rank * ranks)))
    auto = f" (auto: {steps:,} steps an epoch)" if tokens.step is not None else ""
    return "\n".join(
        [
            f"Training on {ranks} rank{'s' * (ranks > 1)}, {name}",
            f"  data     {manifest.users:,} users, {manifest.items:,} items, {manifest.interactions:,} interactions"
            + (f", {others:,} prompts or shown items" if others > 0 else ""),
            f"  decoder  {parameters:,} parameters",
            "  tables   " + table_text(placed).replace("\n", "\n" + " " * len("  tables   ")),
            *_attributes(unwrapped(model).inputs, manifest),
            *_events(unwrapped(model).inputs, manifest),
            *_times(unwrapped(model).inputs),
            f"  compute  {execution}",
            f"  tokens   {tokens.rank:,} per rank{auto}",
            _length(train, steps, "at most" if validates else "all"),
            *([f"  targets  {without:,} of the items are never one, see the summary of prepare"] if without else []),
            *_validation(train, manifest, validates),
            *_repeats(validates, repeat_bias),
        ]
    )


def environment_of(device: torch.device, execution: Execution) -> dict[str, Any]:
    """Ranks, device, way of computing and versions, as JSON values that checkpoints record for reports."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torchrec")}
    return {
        "ranks": dist.get_world_size(),
        "device": _device_name(device),
        "compute": str(execution),
        **({"cpu_precision": execution.precision} if device.type == "cpu" else {}),
        "versions": {"recgpt_torchrec": __version__, **versions, "python": platform.python_version()},
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _attributes(inputs: Inputs, manifest: Manifest) -> list[str]:
    """The line about attributes, where the dataset has any."""
    if not manifest.attributes:
        return []
    read = {each.table: each for each in inputs.attributes}
    words = []
    for each in inputs.attributes:
        weight = f", weight {each.weight:g}" if each.weight != 1 else ""
        words.append(f"{each.full_name} ({each.values:,} values{weight})")
    line = "  attributes " + (", ".join(words) or "none")
    if inputs.id_dropout:
        line += f"; {inputs.id_dropout:.0%} of the items' own vectors are left out"
    if others := [each.full_name for each in manifest.attributes if each.table not in read]:
        line += f"; not read: {', '.join(others)}"
    return [line]


def _events(inputs: Inputs, manifest: Manifest) -> list[str]:
    """The line about event types, where the dataset has any."""
    if not manifest.events:
        return []
    words = ["the type of each entry"] if inputs.reads("event") else []
    if inputs.reads(ASKED):
        words.append(f"the type asked for (hidden from {inputs.ask_dropout:.0%} of the tokens)")
    line = "  events   " + (", ".join(words) or "none at the input")
    if inputs.history_events:
        line += f"; histories of {', '.join(inputs.history_events)} alone"
    return [line]


def _times(inputs: Inputs) -> list[str]:
    """The line about times, where the model reads any."""
    names = [each.name for each in inputs.features if each.name in TIMES]
    if not names:
        return []
    offset = f", {inputs.utc_offset_hours:+g} hours from UTC" if inputs.utc_offset_hours else ""
    return [f"  times    {', '.join(names)}; unit {unit_name(inputs.time_unit)}{offset}"]


def _length(train: Train, steps: int, how: str) -> str:
    """The line about the length of a run, given the steps of an epoch."""
    if train.steps:
        return f"  steps    {how} {train.steps:,}, about {train.steps / steps:,.1f} epochs"
    return f"  epochs   {how} {train.epochs}, about {steps:,} steps each"


def _validation(train: Train, manifest: Manifest, validates: bool) -> list[str]:
    """The line about validation, where it is not that on all users at the ends of epochs."""
    if not validates:
        return ["  nothing is held out for validation: the newest checkpoint is the result"]
    if not (train.validate_users or train.validate_steps):
        return []
    often = f", every {train.validate_steps:,} steps" if train.validate_steps else ""
    return [f"  validation on {describe_users(manifest, train.validate_users)}{often}"]


def _repeats(validates: bool, repeat_bias: float) -> list[str]:
    """The line about the repeat bias, where it is known already or is not going to be fitted."""
    if not validates:
        return [f"  repeat   {describe_bias(repeat_bias)}; nothing is held out to fit it on"]
    return [f"  repeat   {describe_bias(repeat_bias)}; fitted anew at each validation"] if repeat_bias else []
