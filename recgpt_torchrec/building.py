"""From a configuration and a dataset to streams and a distributed model: what several stages build alike."""

from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torchrec.optim.keyed import KeyedOptimizer

from recgpt_torchrec.config import Batch, Loss, Model, Pretrain, Stream, Tables
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.stream import BatchMaker, SequenceStream, training_counts
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.model.recgpt import RecGPT
from recgpt_torchrec.training.checkpoint import facts_of
from recgpt_torchrec.training.sharding import distribute


def training_stream(config: Pretrain, dataset: Dataset) -> SequenceStream:
    """The stream of the training part, with the loss's candidates."""
    by_popularity = config.loss.candidates == "in_batch" or config.loss.negatives_by == "log_uniform"
    maker = BatchMaker(
        dataset=dataset,
        split="training",
        batch=config.batch,
        loss=config.loss,
        max_len=config.model.max_len,
        seed=config.seed,
        item_counts=training_counts(dataset) if by_popularity else None,
    )
    return SequenceStream(maker, config.stream)


def encoding_stream(dataset: Dataset, split: str, model: Model, batch: Batch, workers: int = 0) -> SequenceStream:
    """The stream of histories to encode: those before the held-out item of a split, or with `all` the whole."""
    maker = BatchMaker(dataset=dataset, split=split, batch=batch, loss=Loss(), max_len=model.max_len, seed=0)
    return SequenceStream(maker, Stream(workers=workers))


def build(
    config: Pretrain, dataset: Dataset, batch_size: int, device: torch.device
) -> tuple[nn.Module, KeyedOptimizer]:
    """The distributed model of a configuration, freshly initialised, and its optimizer (collective)."""
    torch.manual_seed(config.seed)
    model = RecGPT(config.model, config.loss, dataset.manifest.users, dataset.manifest.items)
    return distribute(
        model, tables=config.tables, optimizer=config.optimizer, batch_size=batch_size, seed=config.seed, device=device
    )


def load(
    checkpoint: str, dataset: Dataset, batch: Batch, tables: Tables, device: torch.device
) -> tuple[nn.Module, Model]:
    """The model of a checkpoint, on any number of ranks and any sharding (collective).

    Raises:
        InputError: the checkpoint belongs to another dataset.
    """
    facts = facts_of(checkpoint)
    check_vocabulary(facts, checkpoint, dataset)
    settings = facts["config"]
    config = Pretrain(
        data=dataset.path,
        output="",
        seed=settings["seed"],
        model=Model(**settings["model"]),
        loss=Loss(**settings["loss"]),
        batch=batch,
        tables=tables,
    )
    model, _ = build(config, dataset, batch.tokens, device)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=checkpoint)
    model.load_state_dict(state["model"])
    return model, config.model


def check_vocabulary(facts: dict[str, Any], checkpoint: str, dataset: Dataset) -> None:
    """Raise an `InputError` unless the checkpoint was trained with the dataset's ids."""
    if facts["vocabulary"] != dataset.manifest.vocabulary:
        raise InputError(
            f"the checkpoint {checkpoint} was trained on another dataset than {dataset.path} (vocabulary "
            f"{facts['vocabulary'][:12]}, the dataset has {dataset.manifest.vocabulary[:12]}): "
            f"its ids mean other items. It was trained on {facts['config']['data']}"
        )
