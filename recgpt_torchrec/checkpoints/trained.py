"""The model of a checkpoint, made for a dataset; as a whole in one process, with torch alone."""

from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from recgpt_torchrec.checkpoints.folder import read_tensor_metadata, read_tensors
from recgpt_torchrec.checkpoints.settings import CheckpointSettings
from recgpt_torchrec.config import Model, Tuning
from recgpt_torchrec.data.bags import table_name, tables_of
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.inputs.attributes import Attributes, Read
from recgpt_torchrec.data.inputs.choosing import check_inputs
from recgpt_torchrec.data.inputs.spec import Inputs
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.model.tabled.base import TabledModel
from recgpt_torchrec.model.tabled.whole import WholeModel
from recgpt_torchrec.storage.buffers import fill_in_memory

Made = TypeVar("Made", bound=TabledModel)


@dataclass
class Trained:
    """A model loaded from a checkpoint, with its configuration."""

    model: nn.Module
    config: Model
    tuning: Tuning | None
    """Options it was prompt-tuned with; None: it is a pre-trained model."""
    inputs: Inputs = field(default_factory=Inputs)
    """What it reads beside ids."""
    attributes: Attributes | None = None
    """The attribute values of all users and items; None: it reads none."""
    repeat_bias: float = 0.0
    """See `checkpoints.repeat_bias`."""

    @property
    def prompts(self) -> bool:
        """Whether the model reads the prompts of a history."""
        return self.tuning is not None and self.tuning.prompts

    @property
    def feedback(self) -> bool:
        """Whether it answers a request from the feedback that was known at it."""
        return self.tuning is not None and self.tuning.reads_feedback


def load_unsharded(checkpoint: str, dataset: Dataset, device: torch.device) -> Trained:
    """Load the model of a checkpoint, with whole tables, in one process that needs no process group.

    Args:
        checkpoint: its folder.
        dataset: with the vocabulary that the model was trained with.
        device: to hold tables and decoder.

    Raises:
        InputError: the checkpoint belongs to another dataset, or is damaged.
    """
    settings = CheckpointSettings.read(checkpoint)
    model = make_model(settings, checkpoint, dataset, WholeModel, fill_in_memory)
    model.tables = model.tables.to_empty(device=device)
    model.dense.to(device)
    read_tensors({"model": model.state_dict()}, checkpoint)
    return Trained(
        model.eval(), settings.model, settings.tuning, settings.inputs, model.attributes, settings.repeat_bias
    )


def make_model(
    settings: CheckpointSettings, checkpoint: str, dataset: Dataset, make: type[Made], read: Read, **options: Any
) -> Made:
    """The model of a checkpoint, its tables without memory.

    Args:
        settings: of the checkpoint.
        checkpoint: its folder.
        dataset: with the vocabulary that the model was trained with.
        make: `RecGPT` or `WholeModel`.
        read: makes the buffer of its attributes.
        options: of `make`.

    Raises:
        InputError: the checkpoint belongs to another dataset, or is damaged.
    """
    check_vocabulary(settings, checkpoint, dataset)
    manifest, tuning, inputs = dataset.manifest, settings.tuning, settings.inputs
    check_inputs(inputs, checkpoint, dataset, settings.continue_command(checkpoint, dataset.path))
    if tuning is not None and tuning.prompts and manifest.segments > inputs.segments:
        raise InputError(
            f"the checkpoint {checkpoint} does not tell dislikes and skips from what was only shown, and "
            f"{dataset.path} does; tune again on that dataset, or give the one it was tuned on"
        )
    attributes = Attributes.open(dataset, inputs, read)
    model = make(
        settings.model,
        settings.loss,
        manifest.users,
        manifest.items,
        tuning,
        inputs=inputs,
        attributes=attributes,
        **options,
    )
    check_tables(model, checkpoint)
    return model


def check_tables(model: nn.Module, checkpoint: str, made: str | None = None) -> None:
    """Check that a checkpoint has all rows and columns of a model's tables, which nothing else fills.

    Args:
        model: made for the dataset to use; its tables need no memory yet.
        checkpoint: its folder.
        made: name of a table that is not read from the checkpoint.

    Raises:
        InputError: a table is missing, or has another size.
    """
    saved = read_tensor_metadata(checkpoint)
    for name, table in tables_of(model).items():
        if table_name(name) == made:
            continue
        size = list(saved[f"model.{name}"].size) if f"model.{name}" in saved else None
        if size != list(table.shape):
            raise InputError(
                f"the {table_name(name)} table of {checkpoint} has size {size}, for the dataset it must be "
                f"{list(table.shape)}: the checkpoint or the dataset is damaged. Restore it, or give another one"
            )


def check_vocabulary(settings: CheckpointSettings, checkpoint: str, dataset: Dataset) -> None:
    """Check that a checkpoint was trained with the dataset's vocabulary.

    Raises:
        InputError: it was trained with another one, or before users or items were added to it.
    """
    manifest = dataset.manifest
    if settings.vocabulary == manifest.vocabulary:
        return
    if (earlier := manifest.extends(settings.vocabulary)) is not None:
        changed = [f"{entity}s" for entity in manifest.reassigned_since(settings.vocabulary)]
        more = f", and rows of {' and '.join(changed)} belong to other keys now" if changed else ""
        raise InputError(
            f"the checkpoint {checkpoint} has no vectors for {manifest.items - earlier.items:,} items and "
            f"{manifest.users - earlier.users:,} users that {dataset.path} added to its vocabulary{more}. Train a new "
            f"run: {settings.continue_command(checkpoint, dataset.path)}; or give the dataset it was trained on, "
            f"{settings.data}"
        )
    raise InputError(
        f"the checkpoint {checkpoint} was trained on another dataset than {dataset.path} (vocabulary "
        f"{settings.vocabulary[:12]}, not {manifest.vocabulary[:12]}): its ids mean other items. It was trained on "
        f"{settings.data}"
    )
