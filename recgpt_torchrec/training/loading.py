"""Loads models from checkpoints: to evaluate, to export, or to prompt-tune."""

from functools import partial

import torch
from torch import nn
from torchrec.optim.keyed import CombinedOptimizer

from recgpt_torchrec.checkpoints.folder import find_checkpoint, read_tensor_metadata, read_tensors
from recgpt_torchrec.checkpoints.reassigning import reset_rows
from recgpt_torchrec.checkpoints.settings import CheckpointSettings
from recgpt_torchrec.checkpoints.trained import Trained, check_tables, check_vocabulary, make_model
from recgpt_torchrec.config import Model, Pretrain, Sharding, Tuning
from recgpt_torchrec.data.bags import ITEM, OUTPUT, table_name, tables_of
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.ids.slots import reassigned_ids
from recgpt_torchrec.data.inputs.choosing import add_feedback, check_inputs
from recgpt_torchrec.data.inputs.events import check_events
from recgpt_torchrec.data.inputs.growing import check_growth
from recgpt_torchrec.data.inputs.spec import Inputs
from recgpt_torchrec.data.inputs.time_units import other_times
from recgpt_torchrec.data.stream import TOKENS_PER_SEQUENCE
from recgpt_torchrec.distributed.lockstep import raise_first_error
from recgpt_torchrec.distributed.processes import log_message
from recgpt_torchrec.distributed.sharding import shard
from recgpt_torchrec.distributed.shared_folder import read_on_node
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.model.recgpt import RecGPT


def load(
    checkpoint: str,
    dataset: Dataset,
    tables: Sharding,
    *,
    bags: int,
    device: torch.device,
    item_keys: int = TOKENS_PER_SEQUENCE,
) -> Trained:
    """Load the model of a checkpoint, on any number of ranks and with any sharding, without optimizers (collective).

    Args:
        checkpoint: its folder.
        dataset: with the vocabulary that the model was trained with.
        tables: how to shard the tables.
        bags: number of items looked up at once, per rank.
        device: of this rank.
        item_keys: number of keys that they are dealt to; by default, so that batches of histories to encode have few
            empty bags.

    Raises:
        InputError: the checkpoint belongs to another dataset, or is damaged.
    """
    settings = CheckpointSettings.read(checkpoint)
    options = {"item_keys": item_keys, "precision": tables.precision}
    unsharded = make_model(settings, checkpoint, dataset, RecGPT, read_on_node, **options)
    model = shard(unsharded, tables, bags=bags, device=device, fused=False, trained=False)
    state = {"model": model.state_dict()}
    read_tensors(state, checkpoint)
    model.load_state_dict(state["model"])
    return Trained(model, settings.model, settings.tuning, settings.inputs, unsharded.attributes, settings.repeat_bias)


def load_pretrained(model: nn.Module, checkpoint: str) -> None:
    """Initialise a model for prompt-tuning from a pre-trained checkpoint, in place (collective).

    W_l, if the model has it, becomes a copy of the item table. Other parameters that only prompt-tuning has keep their
    initial values.

    Raises:
        InputError: the checkpoint is damaged.
    """
    check_tables(model, checkpoint, made=OUTPUT)
    state = model.state_dict()
    saved = read_tensor_metadata(checkpoint)
    pretrained = {name: value for name, value in state.items() if f"model.{name}" in saved}
    tables = {table_name(name): name for name in tables_of(model)}
    read_tensors({"model": pretrained}, checkpoint)
    if OUTPUT in tables:
        read_tensors({"model": {tables[ITEM]: state[tables[OUTPUT]]}}, checkpoint)
    model.load_state_dict(state)


def read_pretrained(checkpoint: str, dataset: Dataset) -> CheckpointSettings:
    """The settings of a pre-trained checkpoint.

    Raises:
        InputError: the checkpoint was prompt-tuned, or belongs to another dataset.
    """
    settings = CheckpointSettings.read(checkpoint)
    check_vocabulary(settings, checkpoint, dataset)
    if settings.tuning is not None:
        raise InputError(f"{checkpoint} was tuned already; give the checkpoint of a pre-training run")
    return settings


def pretrained_model(checkpoint: str, dataset: Dataset, given: Model | None) -> Model:
    """The decoder's configuration for tuning a pre-trained checkpoint: `given`, which may differ in dropout only.

    Args:
        checkpoint: its folder.
        dataset: to tune on.
        given: the configuration that the user gave; None: the checkpoint's.

    Raises:
        InputError: the checkpoint was prompt-tuned, belongs to another dataset, or has another shape than `given`.
    """
    settings = read_pretrained(checkpoint, dataset)
    if given is None:
        return settings.model
    for name in settings.other_shape(given):
        raise InputError(
            f"--model.{name} is {getattr(given, name)}, the checkpoint {checkpoint} has "
            f"{getattr(settings.model, name)}; leave the option out, or give a checkpoint of that shape"
        )
    return given


def pretrained_inputs(checkpoint: str, dataset: Dataset, tuning: Tuning) -> Inputs:
    """What a model tuned from a pre-trained checkpoint reads beside ids: what the checkpoint reads, and what tuning
    adds.

    Raises:
        InputError: the dataset lacks it.
    """
    settings = CheckpointSettings.read(checkpoint)
    check_inputs(settings.inputs, checkpoint, dataset, settings.continue_command(checkpoint, dataset.path))
    return add_feedback(settings.inputs, dataset, tuning)


def find_initial(path: str, config: Pretrain, dataset: Dataset, inputs: Inputs) -> str:
    """Find the checkpoint for `--initial`, and check that a run of this configuration can start from it.

    Args:
        path: a checkpoint folder, or a run's output folder.
        config: of the run to start.
        dataset: the run's.
        inputs: what its model reads beside ids.

    Raises:
        InputError: there is no checkpoint; it was prompt-tuned; its vocabulary is neither the dataset's nor one that
            the dataset extends; it has another shape, table optimizer, other attributes or event types; or `--targets
            new` would leave targets out.
    """
    checkpoint = find_checkpoint(path)
    settings, manifest = CheckpointSettings.read(checkpoint), dataset.manifest
    if manifest.extends(settings.vocabulary) is None:
        raise InputError(
            f"--initial {path}: the checkpoint {checkpoint} was trained on {settings.data}, whose ids mean other "
            f"items than those of {dataset.path}. Prepare the log with --vocabulary {settings.data}, so that known "
            "users and items keep their ids, or leave --initial out"
        )
    if settings.tuning is not None:
        raise InputError(f"--initial {path}: {checkpoint} was prompt-tuned; give the checkpoint of a pre-training run")
    differ = [f"--model.{name} {getattr(settings.model, name)}" for name in settings.other_shape(config.model)]
    if settings.table_optimizer != config.tables.optimizer:
        differ.append(f"--tables.optimizer {settings.table_optimizer}")
    differ += other_times(settings.inputs, config.time, dataset)
    if differ:
        raise InputError(f"--initial {path}: {checkpoint} was trained with {' '.join(differ)}; give the same here")
    check_events(settings.inputs, checkpoint, dataset)
    for line in check_growth(settings.inputs, inputs, checkpoint, dataset):
        log_message(line)
    extended = manifest.preparation.get("extends", {})
    if config.targets == "new" and manifest.day is None and settings.vocabulary != extended.get("vocabulary"):
        raise InputError(
            f"--targets new: in {dataset.path} targets are new since {extended.get('dataset')}, but {checkpoint} was "
            f"trained on {settings.data}: targets added in between would never be trained on. Give --targets all, "
            f"or a run on {extended.get('dataset')}"
        )
    return checkpoint


def reset_reassigned(
    model: nn.Module, optimizer: CombinedOptimizer, checkpoint: str, config: Pretrain, dataset: Dataset
) -> None:
    """Reset the rows of a model, just restored from an earlier dataset's checkpoint, that mean other keys in this
    dataset (collective).

    Args:
        model, optimizer: restored; changed in place.
        checkpoint: found by `find_initial`.
        config: of the run.
        dataset: the run's.

    Raises:
        InputError: a part of the dataset is damaged.
    """
    versions = dataset.manifest.reassigned_since(CheckpointSettings.read(checkpoint).vocabulary)
    rows = {str(entity): partial(reassigned_ids, dataset, entity, version) for entity, version in versions.items()}
    failure, counts = None, {}
    try:
        counts = reset_rows(model, optimizer, rows, config.tables.init_std_of, config.seed)
    except Exception as error:  # a rank that cannot read its part; nothing in between waits for others
        failure = error
    raise_first_error(failure)
    for entity, count in counts.items():
        log_message(f"{count:,} rows of {entity}s belong to other keys than in {checkpoint}: they begin anew")
