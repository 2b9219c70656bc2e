"""The header logged before the first step: ranks, data, size of the model, length of an epoch."""

import math

import torch
import torch.distributed as dist
from torch import nn

from recgpt_torchrec.data.dataset import Manifest
from recgpt_torchrec.distributed.placements import Placement, table_text
from recgpt_torchrec.model.recgpt import unwrapped
from recgpt_torchrec.training.building import Tokens
from recgpt_torchrec.training.execution import Execution


def header(
    model: nn.Module,
    manifest: Manifest,
    device: torch.device,
    execution: Execution,
    *,
    placed: list[Placement],
    tokens: Tokens,
    epochs: int,
    validates: bool = True,
) -> str:
    """The lines logged before training: ranks, data, decoder, tables, epochs.

    Args:
        model: sharded.
        manifest: of the dataset.
        device: of this rank.
        execution: how steps are computed.
        placed: where the tables are.
        tokens: of a batch.
        epochs: maximum number of epochs.
        validates: whether epochs are validated, so that training may stop early.
    """
    ranks = dist.get_world_size()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
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
            f"  compute  {execution}",
            f"  tokens   {tokens.rank:,} per rank{auto}",
            f"  epochs   {'at most' if validates else 'all'} {epochs}, about {steps:,} steps each",
            *([f"  targets  {without:,} of the items are never one, see the summary of prepare"] if without else []),
            *([] if validates else ["  nothing is held out for validation: the newest checkpoint is the result"]),
        ]
    )
