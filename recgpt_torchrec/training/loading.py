"""From a checkpoint to a model: to evaluate or to export it, or to tune it further."""

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
    """A model read from a checkpoint, and what it is."""

    model: nn.Module
    config: Model
    tuning: Tuning | None
    """None: a pre-trained model."""

    @property
    def prompts(self) -> bool:
        """Whether it reads the prompts between the items of a history."""
        return self.tuning is not None and self.tuning.prompts


def load(checkpoint: str, dataset: Dataset, tables: Sharding, *, batch_size: int, device: torch.device) -> Trained:
    """The model of a checkpoint, on any number of ranks and any sharding, without optimizers (collective).

    Args:
        checkpoint: its folder.
        dataset: with the ids that it was trained on.
        tables: how they are sharded.
        batch_size: bags of the largest feature a rank looks up at once.
        device: of this rank.

    Raises:
        InputError: the checkpoint belongs to another dataset, or is damaged.
    """
    metadata = read_metadata(checkpoint)
    check_vocabulary(metadata, checkpoint, dataset)
    settings = metadata["config"]
    config, loss = Model(**settings["model"]), Loss(**settings["loss"])
    tuning = Tuning(**settings["tuning"]) if "tuning" in settings else None
    whole = RecGPT(config, loss, dataset.manifest.users, dataset.manifest.items, tuning)
    model = shard(whole, tables, batch_size=batch_size, device=device, fused=False)
    state = {"model": model.state_dict()}
    read_tensors(state, checkpoint)
    model.load_state_dict(state["model"])
    return Trained(model, config, tuning)


def load_pretrained(model: nn.Module, checkpoint: str) -> None:
    """Give a model to be tuned the values of a pre-trained checkpoint (collective).

    W_l, where the model has one, becomes a copy of the item table; what only tuning has keeps its initial values.
    """
    state = model.state_dict()
    there = read_tensor_metadata(checkpoint)
    known = {name: value for name, value in state.items() if f"model.{name}" in there}
    read_tensors({"model": known}, checkpoint)
    tables = {table_name(name): name for name in tables_of(model)}
    if "output" in tables:
        read_tensors({"model": {tables["item"]: state[tables["output"]]}}, checkpoint)
    model.load_state_dict(state)


def pretrained_model(checkpoint: str, dataset: Dataset, given: Model | None) -> Model:
    """The decoder's configuration of a pre-trained checkpoint, with the dropouts that were given.

    Raises:
        InputError: the checkpoint is not a pre-trained one, belongs to another dataset, or has another shape than
        given.
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
    """Raise an `InputError` unless the checkpoint was trained with the dataset's ids, and with all of them."""
    manifest = dataset.manifest
    if metadata["vocabulary"] == manifest.vocabulary:
        return
    if (earlier := manifest.extends(metadata["vocabulary"])) is not None:
        raise InputError(
            f"the checkpoint {checkpoint} was trained before {manifest.items - earlier.items:,} items and "
            f"{manifest.users - earlier.users:,} users of {dataset.path} were known, and has no vectors of them: go on "
            f"training with python -m recgpt_torchrec.pretrain --data {dataset.path} --initial {checkpoint} --output "
            f"NEW_RUN, or give the dataset it was trained on ({metadata['config']['data']})"
        )
    raise InputError(
        f"the checkpoint {checkpoint} was trained on another dataset than {dataset.path} (vocabulary "
        f"{metadata['vocabulary'][:12]}, the dataset has {manifest.vocabulary[:12]}): "
        f"its ids mean other items. It was trained on {metadata['config']['data']}"
    )
