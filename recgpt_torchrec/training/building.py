"""From a configuration and a dataset to streams and a distributed model: what several stages build alike."""

import os
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torchrec.optim.keyed import KeyedOptimizer

from recgpt_torchrec.checkpoints.folder import facts_of, read_tensors, tensors_in
from recgpt_torchrec.checkpoints.growing import check_new_targets
from recgpt_torchrec.config import (
    Batch,
    Loss,
    Model,
    Pretrain,
    PromptTune,
    Saving,
    Sharding,
    Stream,
    Tables,
    Tuning,
)
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.reader import LIST, SetAside
from recgpt_torchrec.data.stream import BatchMaker, SequenceStream, training_counts
from recgpt_torchrec.distributed.processes import gather, say
from recgpt_torchrec.distributed.sharding import DENSE, distribute, table_name, tables_of
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.evaluation.validation import Validation
from recgpt_torchrec.model.recgpt import RecGPT
from recgpt_torchrec.training.header import header
from recgpt_torchrec.training.run import Run
from recgpt_torchrec.training.trainer import Trainer


def open_dataset(config: Pretrain | PromptTune) -> Dataset:
    """The dataset to train on, opened as its options about damage say."""
    return Dataset.open(config.data, damaged=config.stream.damaged, checksums=config.stream.checksums)


def training_stream(config: Pretrain | PromptTune, dataset: Dataset, tuning: Tuning | None = None) -> SequenceStream:
    """The stream of the training part, with the loss's candidates, and with the prompts where `tuning` reads them."""
    assert config.model is not None
    set_aside = None
    if config.stream.damaged == "skip":
        set_aside = SetAside(os.path.join(config.output, LIST), config.stream.damaged_limit)
    new_targets = isinstance(config, Pretrain) and config.targets == "new"
    by_popularity = config.loss.candidates == "in_batch" or config.loss.negatives_by == "log_uniform"
    maker = BatchMaker(
        dataset=dataset,
        split="training",
        prompts=tuning is not None and tuning.prompts,
        predict_from="every" if tuning is None else tuning.predict_from,
        soft_targets=0.0 if tuning is None else tuning.soft_targets,
        answers=answers_of(dataset) if tuning is not None and tuning.soft_targets else 0,
        batch=config.batch,
        loss=config.loss,
        max_len=config.model.max_len,
        seed=config.seed,
        item_counts=training_counts(dataset) if by_popularity else None,
        set_aside=set_aside,
        time_order=config.stream.time_order,
        new_targets=new_targets,
    )
    stream = SequenceStream(maker, config.stream)
    if new_targets:
        check_new_targets(dataset)
    return stream


def answers_of(dataset: Dataset) -> int:
    """How many answers of the pre-trained model a prompt dataset holds beside each item."""
    return int(dataset.manifest.settings.get("prompts", {}).get("answers", 0))


def encoding_stream(
    dataset: Dataset,
    split: str,
    model: Model,
    batch: Batch,
    prompts: bool = False,
    grows: int = 0,
    set_aside: SetAside | None = None,
) -> SequenceStream:
    """The stream of histories to encode: those before the held-out item of a split, or with `all` the whole."""
    maker = BatchMaker(
        dataset=dataset,
        split=split,
        prompts=prompts,
        grows=grows,
        batch=batch,
        loss=Loss(),
        max_len=model.max_len,
        seed=0,
        set_aside=set_aside,
    )
    return SequenceStream(maker, Stream())


def build(
    config: Pretrain | PromptTune,
    dataset: Dataset,
    batch_size: int,
    device: torch.device,
    tuning: Tuning | None = None,
) -> tuple[nn.Module, KeyedOptimizer]:
    """The distributed model of a configuration, freshly initialised, and its optimizer (collective)."""
    assert config.model is not None
    torch.manual_seed(config.seed)
    model = RecGPT(config.model, config.loss, dataset.manifest.users, dataset.manifest.items, tuning)
    frozen: set[str] = set()
    if tuning is not None:
        parts = {"users": "user", "items": "item", "output": "output", "decoder": DENSE}
        frozen = {part for name, part in parts.items() if name not in tuning.trained}
    return distribute(
        model,
        tables=config.tables,
        optimizer=config.optimizer,
        batch_size=batch_size,
        seed=config.seed,
        device=device,
        frozen=frozen,
    )


@dataclass
class Trained:
    """A model read from a checkpoint, and what it is."""

    model: nn.Module
    config: Model
    tuning: Tuning | None
    """None: a pre-trained model."""


def load(checkpoint: str, dataset: Dataset, batch: Batch, tables: Sharding, device: torch.device) -> Trained:
    """The model of a checkpoint, on any number of ranks and any sharding (collective).

    Raises:
        InputError: the checkpoint belongs to another dataset.
    """
    facts = facts_of(checkpoint)
    check_vocabulary(facts, checkpoint, dataset)
    settings = facts["config"]
    tuning = Tuning(**settings["tuning"]) if "tuning" in settings else None
    config = Pretrain(
        data=dataset.path,
        output="",
        seed=settings["seed"],
        model=Model(**settings["model"]),
        loss=Loss(**settings["loss"]),
        batch=batch,
        tables=Tables(sharding=tables.sharding, data_parallel_mb=tables.data_parallel_mb),
    )
    model, _ = build(config, dataset, batch.tokens, device, tuning)
    state = {"model": model.state_dict()}
    read_tensors(state, checkpoint)
    model.load_state_dict(state["model"])
    return Trained(model, config.model, tuning)


def load_pretrained(model: nn.Module, checkpoint: str) -> None:
    """Give a model to be tuned the values of a pre-trained checkpoint (collective).

    W_l, where the model has one, becomes a copy of the item table; what only tuning has keeps its initial values.
    """
    state = model.state_dict()
    there = tensors_in(checkpoint)
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
    facts = facts_of(checkpoint)
    check_vocabulary(facts, checkpoint, dataset)
    if "tuning" in facts["config"]:
        raise InputError(f"{checkpoint} was tuned already; give the checkpoint of a pre-training run")
    saved = Model(**facts["config"]["model"])
    if given is None:
        return saved
    for name, value in asdict(saved).items():
        if "dropout" not in name and getattr(given, name) != value:
            raise InputError(
                f"--model.{name} is {getattr(given, name)}, the checkpoint {checkpoint} has {value}; "
                "leave the option out, or give a checkpoint of that shape"
            )
    return given


def check_vocabulary(facts: dict[str, Any], checkpoint: str, dataset: Dataset) -> None:
    """Raise an `InputError` unless the checkpoint was trained with the dataset's ids, and with all of them."""
    manifest = dataset.manifest
    if facts["vocabulary"] == manifest.vocabulary:
        return
    if (earlier := manifest.extends(facts["vocabulary"])) is not None:
        raise InputError(
            f"the checkpoint {checkpoint} was trained before {manifest.items - earlier.items:,} items and "
            f"{manifest.users - earlier.users:,} users of {dataset.path} were known, and has no vectors of them: go on "
            f"training with python -m recgpt_torchrec.pretrain --data {dataset.path} --initial {checkpoint} --output "
            f"NEW_RUN, or give the dataset it was trained on ({facts['config']['data']})"
        )
    raise InputError(
        f"the checkpoint {checkpoint} was trained on another dataset than {dataset.path} (vocabulary "
        f"{facts['vocabulary'][:12]}, the dataset has {manifest.vocabulary[:12]}): "
        f"its ids mean other items. It was trained on {facts['config']['data']}"
    )


def check_lost(dataset: Dataset) -> None:
    """Raise an `InputError` unless every rank finds the same parts of the dataset (collective): windows depend on
    it."""
    found: list[dict[str, str]] = gather(dataset.lost)
    for rank, lost in enumerate(found):
        if differ := sorted(lost.keys() ^ found[0].keys()):
            raise InputError(
                f"{dataset.path}: rank 0 and rank {rank} do not find the same parts ({', '.join(differ)}); all nodes "
                "must read the same files"
            )


def fit(
    config: Pretrain | PromptTune,
    saving: Saving,
    stream: SequenceStream,
    run: Run,
    device: torch.device,
    *,
    tuning: Tuning | None = None,
    pretrained: str | None = None,
    initial: str | None = None,
) -> None:
    """Train a configuration's model from where its run stands to its end (collective).

    Args:
        config: with the decoder's configuration filled in.
        saving: what is saved, and when.
        stream: its `training_stream`, of the dataset that is validated on, too.
        run: the output folder; claimed once nothing can be refused any more.
        device: of this rank.
        tuning: what is tuned; None: pre-training.
        pretrained: checkpoint of whose model a run that has not begun starts from, to be tuned.
        initial: checkpoint whose training a run that has not begun goes on with, on a dataset that may have grown.
    """
    assert config.model is not None
    dataset = stream.maker.dataset
    check_lost(dataset)
    model, optimizer = build(config, dataset, stream.maker.capacity.items, device, tuning)
    with run.claimed():
        trainer = Trainer(
            model=model,
            optimizer=optimizer,
            device=device,
            stream=stream,
            interactions=dataset.manifest.entries,
            train=config.train,
            schedule=config.optimizer,
            saving=saving,
            checkpoints=run.checkpoints,
            facts=run.facts(str(model.plan)),
            seed=config.seed,
        )
        if resumed := run.checkpoints.latest():
            trainer.resume(resumed)
            say(f"Going on from {resumed}")
        elif pretrained is not None:
            load_pretrained(model, pretrained)
        elif initial is not None:
            trainer.begin_from(initial)
            say(f"Beginning from {initial}")
        say(header(model, dataset.manifest, device, tokens=config.batch.tokens, epochs=config.train.epochs))
        prompts = tuning is not None and tuning.prompts
        set_aside = stream.maker.set_aside
        validation = encoding_stream(
            dataset, "validation", config.model, config.batch, prompts=prompts, set_aside=set_aside
        )
        trainer.fit(Validation(model, validation, device), metric="NDCG@10")
        if set_aside is not None:
            say(set_aside.summary())
