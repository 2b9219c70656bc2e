"""Builds the stream, the sharded model and its optimizers from a configuration and a dataset, for both stages."""

import os
from dataclasses import dataclass

import torch
from torch import nn
from torchrec.optim.keyed import KeyedOptimizer

from recgpt_torchrec.catalogue.softmax import SharedSoftmax
from recgpt_torchrec.config import Loss, Model, Neighbours, Pretrain, PromptTune, Tables, Tuning
from recgpt_torchrec.config.defaults import tokens_of_rank, tokens_of_step
from recgpt_torchrec.data.candidates import candidate_source
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.inputs.attributes import Attributes
from recgpt_torchrec.data.inputs.events import weights_of_targets
from recgpt_torchrec.data.inputs.spec import Inputs
from recgpt_torchrec.data.neighbours.answering import NeighbourAnswers
from recgpt_torchrec.data.neighbours.table import NeighbourTable
from recgpt_torchrec.data.packed import Capacity
from recgpt_torchrec.data.reading.damage import LIST, SetAside
from recgpt_torchrec.data.reading.histories import HistoryReader
from recgpt_torchrec.data.stream import BatchMaker, SequenceStream
from recgpt_torchrec.data.windows import check_new_targets
from recgpt_torchrec.distributed.initial_values import initialise_tables
from recgpt_torchrec.distributed.memory import find_shortage
from recgpt_torchrec.distributed.processes import gather_objects, rank, run_on_first_rank, world_size
from recgpt_torchrec.distributed.sharding import ranks_per_group, shard
from recgpt_torchrec.distributed.shared_folder import read_on_node
from recgpt_torchrec.distributed.watchdog import tracked_phase
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.model.recgpt import RecGPT
from recgpt_torchrec.model.tabled.base import unwrapped, unwrapped_dense
from recgpt_torchrec.training.execution import Execution
from recgpt_torchrec.training.optimizers import DENSE, fuse_optimizers, is_fused, optimizers_of
from recgpt_torchrec.training.run import read_record

COPIES = 2
"""Copies of looked-up vectors that a step holds at least: with their gradients. Measured on CPU, ids and exchanges
included: 2.7 on one rank at dim 32, on two 4 at dim 128 and 10 at dim 32."""
PARTS = {"users": "user", "items": "item", "output": "output", "decoder": DENSE}
"""Values of `--tuning.trained`, and the model's names for them: a table, or `DENSE`."""


def open_dataset(config: Pretrain | PromptTune) -> Dataset:
    """Open the dataset to train on, with the configuration's handling of damaged parts.

    Raises:
        InputError: there is no dataset, or it is damaged.
    """
    stream = config.stream
    with tracked_phase("checking the dataset's files", None, "files") as advance:
        return Dataset.open(config.data, damaged=stream.damaged, checksums=stream.checksums, advance=advance)


@dataclass(frozen=True)
class Tokens:
    """The number of tokens of a batch, and what it follows from."""

    rank: int
    """Maximum number of tokens of a batch, per rank."""
    step: int | None
    """Maximum number over all ranks that `auto` chose, which a resumed run keeps; None: `rank` was given."""
    epoch: float
    """About the number of tokens of one epoch, over all ranks."""


def choose_tokens(
    config: Pretrain | PromptTune, model: Model, dataset: Dataset, device: torch.device, tuning: Tuning | None = None
) -> Tokens:
    """Choose the number of tokens of a batch: the one given, that of the run to resume, or the default (collective).

    Args:
        config: of the stage.
        model: the decoder's configuration.
        dataset: to train on.
        device: of this rank.
        tuning: which prompts are read; None: pre-training.

    Raises:
        InputError: the record of the run to resume is damaged.
    """
    max_len = model.max_len if config.batch.long_histories == "newest" else None
    epoch = dataset.manifest.count_training_tokens(max_len, prompts=tuning is not None and tuning.prompts)
    given = config.batch.given_tokens(model.max_len)
    if given is not None:
        return Tokens(given, None, epoch)
    record, ranks = run_on_first_rank(lambda: read_record(config.output)), world_size()
    if record is not None and record.rank_tokens is not None:
        return Tokens(record.rank_tokens, None, epoch)
    step = None if record is None else record.step_tokens
    step = step or tokens_of_step(epoch, ranks, device.type, config.batch.step_tokens)
    return Tokens(tokens_of_rank(step, ranks, model.max_len), step, epoch)


def training_stream(
    config: Pretrain | PromptTune,
    model: Model,
    dataset: Dataset,
    tokens: int,
    execution: Execution,
    *,
    tuning: Tuning | None = None,
    new_targets: bool = False,
    inputs: Inputs | None = None,
) -> SequenceStream:
    """Make the stream of the training part's batches, with the candidates of the loss.

    Args:
        config: of the stage.
        model: the decoder's configuration.
        dataset: to train on.
        tokens: maximum number of tokens per batch and rank.
        execution: how steps are computed, which decides how tokens lie in a batch.
        tuning: which prompts and answers are read, and how; None: pre-training.
        new_targets: whether only targets that the dataset marks as new are predicted.
        inputs: what the model reads beside ids; None: nothing.

    Raises:
        InputError: the dataset does not fit the options, or is damaged.
    """
    set_aside, batch = None, config.batch.of(tokens)
    if config.stream.damaged == "skip":
        set_aside = SetAside(os.path.join(config.output, LIST), config.stream.damaged_limit)
    soft_targets = config.soft_targets if isinstance(config, Pretrain) else config.tuning.soft_targets
    reader = HistoryReader(
        dataset=dataset,
        split="training",
        max_len=model.max_len,
        long_histories=config.batch.long_histories,
        prompts=tuning is not None and tuning.prompts,
        feedback=tuning is not None and tuning.reads_feedback,
        answers=answers_of(dataset) if soft_targets else 0,
        new_targets=new_targets,
        set_aside=set_aside,
        time_order=config.stream.time_order,
        inputs=inputs or Inputs(),
        event_weights=weights_of_targets(config.events, dataset),
    )
    predict_from = "every" if tuning is None else tuning.predict_from
    assert predict_from != "auto", "the stage has chosen"
    maker = BatchMaker(
        reader=reader,
        batch=batch,
        users=config.batch.users,
        attributes=Attributes.open(dataset, reader.inputs, read_on_node),
        source=candidate_source(config.loss, dataset, batch, rank(), world_size()),
        seed=config.seed,
        predict_from=predict_from,
        soft_targets=soft_targets,
        neighbours=open_answers(config.neighbours, dataset),
        last_target=tuning is not None and tuning.targets == "last",
        thinning=(config.batch.thinning, config.batch.thinned),
        layout="row" if execution.attention == "varlen" else "grid",
        pad=execution.compile and execution.attention == "varlen",
    )
    with tracked_phase("reading footers", len(dataset.manifest.sequences), "parts") as advance:
        stream = SequenceStream(maker, config.stream, advance)
    if new_targets:
        check_new_targets(dataset)
    return stream


def open_answers(options: Neighbours, dataset: Dataset) -> NeighbourAnswers | None:
    """Read the neighbours that share the targets' weight (collective); None: there are none.

    Raises:
        InputError: the folder is damaged, or of another dataset.
    """
    if options.path is None:
        return None
    table = NeighbourTable.of_dataset(options.path, dataset, read_on_node)
    return NeighbourAnswers(
        table=table, share=options.share, memory=options.memory, recency=options.recency, answers=options.answers
    )


def check_answers(share: float, option: str, dataset: Dataset) -> None:
    """Check that a dataset has answers, where a share of the targets' weight goes to them.

    Raises:
        InputError: it has none.
    """
    if share and not answers_of(dataset):
        raise InputError(
            f"{option} is {share}, but {dataset.path} holds no answers of a model; run generate_prompts with "
            "--prompts.answers, for example 10, or leave the option out"
        )


def answers_of(dataset: Dataset) -> int:
    """Number of the pre-trained model's answers that a prompt dataset holds per item; 0: none."""
    return int(dataset.manifest.settings.get("prompts", {}).get("answers", 0))


def build(
    config: Pretrain | PromptTune,
    model: Model,
    dataset: Dataset,
    *,
    capacity: Capacity,
    device: torch.device,
    tuning: Tuning | None = None,
    restored: bool = False,
    inputs: Inputs | None = None,
    attributes: Attributes | None = None,
) -> tuple[nn.Module, KeyedOptimizer]:
    """Build a configuration's sharded model, with initial values, and its optimizer (collective).

    Args:
        config: of the stage: loss, tables, optimizer and seed.
        model: the decoder's configuration.
        dataset: gives the numbers of users and items.
        capacity: number of bags of a batch.
        device: of this rank.
        tuning: what prompt-tuning adds and trains; None: pre-training.
        restored: whether the caller fills the tables from a checkpoint, so that no values are drawn for them.
        inputs: what the model reads beside ids; None: nothing.
        attributes: the values of all users and items; None: there are none.

    Raises:
        InputError: a table cannot be sharded as configured, or memory will not hold the candidates.
    """
    torch.manual_seed(config.seed)
    users, items = dataset.manifest.users, dataset.manifest.items
    unsharded = RecGPT(
        model, config.loss, users, items, tuning, capacity.item_keys, config.tables.precision, inputs, attributes
    )
    frozen = set() if tuning is None else {part for name, part in PARTS.items() if name not in tuning.trained}
    # Vectors of users or items that stay as they are stay so with their attributes, also where W_l reads these.
    frozen |= {each.table for each in unsharded.inputs.attributes if each.entity in frozen}
    fuse_optimizers(unsharded, config.tables, device, frozen)
    fused = is_fused(config.tables.optimizer, device)
    optimizer = config.tables.optimizer
    sharded = shard(unsharded, config.tables, bags=capacity.items, device=device, fused=fused, optimizer=optimizer)
    share_loss(sharded, config.loss, config.tables)
    if not restored:
        initialise_tables(sharded, config.tables.init_std_of, config.seed)
    check_memory(config.loss, capacity, model.dim, device)
    return sharded, optimizers_of(sharded, config.tables, config.optimizer, frozen)


def share_loss(model: nn.Module, loss: Loss, tables: Tables) -> None:
    """Score the targets of a sharded model's batches against the candidates of all ranks, where the loss says so.

    Raises:
        InputError: groups of ranks train copies of the tables, so that only one group would train each candidate.
    """
    if not loss.crosses_ranks(world_size()):
        return
    if ranks_per_group(tables) != world_size():
        raise InputError(
            f"--tables.shard_ranks {tables.shard_ranks} makes groups of ranks, and this loss's candidates are those of "
            "all ranks, each trained in one group only; leave it out, or give --loss.candidates sampled with "
            "--loss.negatives_across_ranks same"
        )
    shared = SharedSoftmax(each_once=loss.candidates == "in_batch")
    unwrapped_dense(unwrapped(model)).set_shared_loss(shared)


def check_memory(loss: Loss, capacity: Capacity, dim: int, device: torch.device) -> None:
    """Check that every rank's memory holds the vectors of its part of the catalogue, where all items are candidates,
    beside the tables, which have theirs already (collective).

    Raises:
        InputError: it does not on a rank.
    """
    if loss.candidates != "all":
        return
    needed = capacity.stride * capacity.item_keys * dim * 4 * COPIES
    if shortage := find_shortage(needed, device):
        raise InputError(
            f"--loss.candidates all looks up {capacity.items:,} items on each rank, whose vectors and gradients take "
            f"at least {shortage.needed:,} bytes on {shortage.place}, where {shortage.available:,} are available; give "
            "--loss.candidates sampled, or more ranks"
        )


def check_lost(dataset: Dataset) -> None:
    """Check that every rank finds the same parts of the dataset, which windows are made of (collective).

    Raises:
        InputError: a rank finds other parts than rank 0.
    """
    lost_parts: list[dict[str, str]] = gather_objects(dataset.lost_parts)
    for other, lost in enumerate(lost_parts):
        if differ := sorted(lost.keys() ^ lost_parts[0].keys()):
            raise InputError(
                f"{dataset.path}: rank 0 and rank {other} find different parts ({', '.join(differ)}); all nodes must "
                "read the same files"
            )
