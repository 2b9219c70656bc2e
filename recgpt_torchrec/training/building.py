"""From a configuration and a dataset to a stream, a sharded model and its optimizers, for both training stages."""

import os

import torch
from torch import nn
from torchrec.optim.keyed import KeyedOptimizer

from recgpt_torchrec.checkpoints.growing import check_new_targets
from recgpt_torchrec.config import Model, Pretrain, PromptTune, Tuning
from recgpt_torchrec.data.damage import LIST, SetAside
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.histories import HistoryReader
from recgpt_torchrec.data.stream import BatchMaker, SequenceStream, candidate_source
from recgpt_torchrec.distributed.processes import gather_objects
from recgpt_torchrec.distributed.sharding import initialise_tables, shard
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.model.recgpt import RecGPT
from recgpt_torchrec.training.optimizers import DENSE, fuse_optimizers, is_fused, optimizers_of

PARTS = {"users": "user", "items": "item", "output": "output", "decoder": DENSE}
"""What `--tuning.trained` names, and what it is called in the model."""


def open_dataset(config: Pretrain | PromptTune) -> Dataset:
    """The dataset to train on, opened as its options about damage say."""
    return Dataset.open(config.data, damaged=config.stream.damaged, checksums=config.stream.checksums)


def training_stream(
    config: Pretrain | PromptTune,
    model: Model,
    dataset: Dataset,
    *,
    tuning: Tuning | None = None,
    new_targets: bool = False,
) -> SequenceStream:
    """The stream of the training part, with the candidates of its loss.

    Args:
        config: of the stage.
        model: the decoder's configuration.
        dataset: what is read.
        tuning: whether prompts and answers are read, and how; None: pre-training.
        new_targets: whether only what the dataset marks as new is predicted.
    """
    set_aside = None
    if config.stream.damaged == "skip":
        set_aside = SetAside(os.path.join(config.output, LIST), config.stream.damaged_limit)
    soft_targets = 0.0 if tuning is None else tuning.soft_targets
    reader = HistoryReader(
        dataset=dataset,
        split="training",
        max_len=model.max_len,
        long_histories=config.batch.long_histories,
        prompts=tuning is not None and tuning.prompts,
        answers=answers_of(dataset) if soft_targets else 0,
        new_targets=new_targets,
        set_aside=set_aside,
        time_order=config.stream.time_order,
    )
    maker = BatchMaker(
        reader=reader,
        batch=config.batch,
        source=candidate_source(config.loss, dataset, config.batch),
        seed=config.seed,
        predict_from="every" if tuning is None else tuning.predict_from,
        soft_targets=soft_targets,
    )
    stream = SequenceStream(maker, config.stream)
    if new_targets:
        check_new_targets(dataset)
    return stream


def answers_of(dataset: Dataset) -> int:
    """How many answers of the pre-trained model a prompt dataset holds beside each item."""
    return int(dataset.manifest.settings.get("prompts", {}).get("answers", 0))


def build(
    config: Pretrain | PromptTune,
    model: Model,
    dataset: Dataset,
    *,
    batch_size: int,
    device: torch.device,
    tuning: Tuning | None = None,
) -> tuple[nn.Module, KeyedOptimizer]:
    """The sharded model of a configuration, freshly initialised, and its optimizer (collective).

    Args:
        config: of the stage: loss, tables, optimizer and seed.
        model: the decoder's configuration.
        dataset: how many users and items there are.
        batch_size: bags of the largest feature a rank looks up in a step.
        device: of this rank.
        tuning: what prompt-tuning adds and trains; None: pre-training.
    """
    torch.manual_seed(config.seed)
    whole = RecGPT(model, config.loss, dataset.manifest.users, dataset.manifest.items, tuning)
    frozen = set() if tuning is None else {part for name, part in PARTS.items() if name not in tuning.trained}
    fuse_optimizers(whole, config.tables, device, frozen)
    fused = is_fused(config.tables.optimizer, device)
    sharded = shard(whole, config.tables, batch_size=batch_size, device=device, fused=fused)
    initialise_tables(sharded, config.tables.init_std_of, config.seed)
    return sharded, optimizers_of(sharded, config.tables, config.optimizer, frozen)


def check_lost(dataset: Dataset) -> None:
    """Raise an `InputError` unless every rank finds the same parts of the dataset (collective): windows depend on
    it."""
    found: list[dict[str, str]] = gather_objects(dataset.lost_parts)
    for rank, lost in enumerate(found):
        if differ := sorted(lost.keys() ^ found[0].keys()):
            raise InputError(
                f"{dataset.path}: rank 0 and rank {rank} do not find the same parts ({', '.join(differ)}); all nodes "
                "must read the same files"
            )
