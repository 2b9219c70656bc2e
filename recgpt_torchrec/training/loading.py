"""Loads models from checkpoints: to evaluate, to export, or to prompt-tune."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from recgpt_torchrec.checkpoints.folder import read_metadata, read_tensor_metadata, read_tensors
from recgpt_torchrec.config import Loss, Model, Sharding, Tuning
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.distributed.sharding import shard, table_name, tables_of
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.model.recgpt import RecGPT


@dataclass
class Trained:
    """A model loaded from a checkpoint, with its configuration."""

    model: nn.Module
    config: Model
    tuning: Tuning | None
    """Options it was prompt-tuned with; None: it is a pre-trained model."""

    @property
    def prompts(self) -> bool:
        """Whether the model reads the prompts of a history."""
        return self.tuning is not None and self.tuning.prompts


def load(checkpoint: str, dataset: Dataset, tables: Sharding, *, batch_size: int, device: torch.device) -> Trained:
    """Load the model of a checkpoint, on any number of ranks and with any sharding, without optimizers (collective).

    Args:
        checkpoint: its folder.
        dataset: with the vocabulary that the model was trained with.
        tables: how to shard the tables.
        batch_size: number of bags of the largest feature per rank and step.
        device: of this rank.

    Raises:
        InputError: the checkpoint belongs to another dataset, or is damaged.
    """
    metadata = read_metadata(checkpoint)
    check_vocabulary(metadata, checkpoint, dataset)
    settings = metadata["config"]
    config, loss = Model(**settings["model"]), Loss(**settings["loss"])
    tuning = Tuning(**settings["tuning"]) if "tuning" in settings else None
    unsharded = RecGPT(config, loss, dataset.manifest.users, dataset.manifest.items, tuning)
    model = shard(unsharded, tables, batch_size=batch_size, device=device, fused=False)
    state = {"model": model.state_dict()}
    read_tensors(state, checkpoint)
    model.load_state_dict(state["model"])
    return Trained(model, config, tuning)


def load_pretrained(model: nn.Module, checkpoint: str) -> None:
    """Initialise a model for prompt-tuning from a pre-trained checkpoint, in place (collective).

    W_l, if the model has it, becomes a copy of the item table. Other parameters that only prompt-tuning has keep their
    initial values.

    Raises:
        InputError: the checkpoint is damaged.
    """
    state = model.state_dict()
    saved = read_tensor_metadata(checkpoint)
    pretrained = {name: value for name, value in state.items() if f"model.{name}" in saved}
    read_tensors({"model": pretrained}, checkpoint)
    tables = {table_name(name): name for name in tables_of(model)}
    if "output" in tables:
        read_tensors({"model": {tables["item"]: state[tables["output"]]}}, checkpoint)
    model.load_state_dict(state)


def pretrained_model(checkpoint: str, dataset: Dataset, given: Model | None) -> Model:
    """The decoder's configuration for tuning a pre-trained checkpoint: `given`, which may differ in dropout only.

    Args:
        checkpoint: its folder.
        dataset: to tune on.
        given: the configuration that the user gave; None: the checkpoint's.

    Raises:
        InputError: the checkpoint was prompt-tuned, belongs to another dataset, or has another shape than `given`.
    """
    metadata = read_metadata(checkpoint)
    check_vocabulary(metadata, checkpoint, dataset)
    if "tuning" in metadata["config"]:
        raise InputError(f"{checkpoint} was tuned already; give the checkpoint of a pre-training run")
    saved = Model(**metadata["config"]["model"])
    if given is None:
        return saved
    for name, value in asdict(saved).items():
        if "dropout" not in name and getattr(given, name) != value:
            raise InputError(
                f"--model.{name} is {getattr(given, name)}, the checkpoint {checkpoint} has {value}; "
                "leave the option out, or give a checkpoint of that shape"
            )
    return given


def check_vocabulary(metadata: dict[str, Any], checkpoint: str, dataset: Dataset) -> None:
    """Check that a checkpoint was trained with the dataset's vocabulary.

    Raises:
        InputError: it was trained with another one, or before users or items were added to it.
    """
    manifest = dataset.manifest
    if metadata["vocabulary"] == manifest.vocabulary:
        return
    if (earlier := manifest.extends(metadata["vocabulary"])) is not None:
        raise InputError(
            f"the checkpoint {checkpoint} has no vectors for {manifest.items - earlier.items:,} items and "
            f"{manifest.users - earlier.users:,} users that {dataset.path} added to its vocabulary. Train a new run: "
            f"python -m recgpt_torchrec.pretrain --data {dataset.path} --initial {checkpoint} --output NEW_RUN; or "
            f"give the dataset it was trained on, {metadata['config']['data']}"
        )
    raise InputError(
        f"the checkpoint {checkpoint} was trained on another dataset than {dataset.path} (vocabulary "
        f"{metadata['vocabulary'][:12]}, not {manifest.vocabulary[:12]}): its ids mean other items. It was trained on "
        f"{metadata['config']['data']}"
    )
