"""Restores checkpoints on other numbers of ranks and with other sharding, and measures what differs.

Call `reshard` by `tools.ranks.run_ranks` on as many ranks as the largest layout has. It leaves that process group and
makes smaller ones, so that all pairs of layouts cost one start of processes.
"""

import contextlib
import functools
import io
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchrec.distributed import comm

from recgpt_torchrec.checkpoints.folder import Checkpoints
from recgpt_torchrec.checkpoints.saving import Saver
from recgpt_torchrec.checkpoints.state import restore, state_of, table_tensors
from recgpt_torchrec.config import Loss, Model, Optimizer, Pretrain, Saving, Tables
from recgpt_torchrec.data.bags import tables_of
from recgpt_torchrec.data.batch import SequenceBatch, make_batch
from recgpt_torchrec.data.candidates import AllItems
from recgpt_torchrec.data.dataset import Dataset, Manifest
from recgpt_torchrec.data.histories import Histories, no_histories
from recgpt_torchrec.data.inputs.attributes import Attributes
from recgpt_torchrec.data.packed import Capacity
from recgpt_torchrec.distributed.processes import silence_libraries
from recgpt_torchrec.distributed.replicas import Replicas
from recgpt_torchrec.model.tabled.base import unwrapped
from recgpt_torchrec.training.building import build
from tools.small_run import SmallAttribute, opened, walks

USERS, ITEMS, STEPS = 13, 29, 3
KEYS = 2
"""Number of keys that item bags are dealt to."""
CAPACITY = Capacity(USERS, ITEMS, KEYS)
ATTRIBUTES = (
    SmallAttribute.draw("item", "tags", ITEMS, 9, multiple=True),
    SmallAttribute.draw("user", "country", USERS, 5),
)
DIM = 24
"""Columns: blocks of a multiple of 4 on one, two and three ranks."""


@dataclass(frozen=True, order=True)
class Layout:
    """Number of ranks, sharding of the tables, their optimizer, number of nodes, and precision of the tables."""

    ranks: int
    sharding: Any
    optimizer: Any
    nodes: int = 1
    precision: Any = "fp32"
    shard_ranks: int = 0
    """Number of ranks that share a copy of the tables; 0: all."""
    attributes: bool = False
    """Whether users and items have attributes; checkpoints with them are restored into models with them."""

    def __str__(self) -> str:
        groups = f" in groups of {self.shard_ranks}" if self.shard_ranks else ""
        more = " with attributes" if self.attributes else ""
        return f"{self.ranks} {self.sharding} {self.precision}".removesuffix(" fp32") + groups + more

    @property
    def opened(self) -> dict[str, Any]:
        """What its model reads beside ids, and the values, by the names of `build`."""
        inputs, attributes = opened(ATTRIBUTES)
        return {"inputs": inputs, "attributes": attributes} if self.attributes else {}

    def blocks(self) -> int:
        """Number of column blocks that row-wise Adagrad keeps a moment for."""
        numbers = {"column_wise": self.shard_ranks or self.ranks, "grid": self.nodes}
        return numbers.get(self.sharding, 1) if self.optimizer == "rowwise_adagrad" else 1


@dataclass
class Difference:
    """Largest absolute differences between a restored model and the saved one."""

    source: Layout
    target: Layout
    tables: float
    moments: float
    dense: float
    losses: list[float]
    """Of the next two steps. The first depends only on the restored parameters, the second also on the moments."""


def reshard(rank: int, world_size: int, folder: str, sources: list[Layout], targets: list[Layout]) -> list[Difference]:
    """Save a checkpoint of each source layout, and restore it into each target layout of the same optimizer.

    Two more steps are trained after each save and after each restore; their losses are compared.
    """
    silence_libraries()
    dist.destroy_process_group()
    # The largest group comes first: torchrec agrees with all ranks once per process, with its first model.
    groups = sorted({(layout.ranks, layout.nodes) for layout in [*sources, *targets]}, reverse=True)
    assert groups[0][0] == world_size
    expected: dict[Layout, list[float]] = {}
    differences: list[Difference] = []
    for count, nodes in groups:
        with group(rank, world_size, count, folder, nodes) as member:
            for source in sources if member else ():
                if (source.ranks, source.nodes) == (count, nodes):
                    expected[source] = train_and_save(source, folder)
    for count, nodes in groups:
        with group(rank, world_size, count, folder, nodes) as member:
            for target in targets if member else ():
                if (target.ranks, target.nodes) == (count, nodes):
                    differences += restore_sources(target, [s for s in sources if _is_alike(s, target)], folder)
    with group(rank, world_size, world_size, folder):
        gathered: list[Any] = [None] * world_size
        dist.all_gather_object(gathered, expected)
    uninterrupted = gathered[0]  # rank 0 is in every group
    for difference in differences:
        losses = uninterrupted[difference.source]
        difference.losses = [abs(loss - other) for loss, other in zip(difference.losses, losses, strict=True)]
    return differences


def _is_alike(source: Layout, target: Layout) -> bool:
    return (source.optimizer, source.attributes) == (target.optimizer, target.attributes)


@contextlib.contextmanager
def group(rank: int, world_size: int, count: int, folder: str, nodes: int = 1) -> Iterator[bool]:
    """Process group of the first `count` ranks on so many nodes; yields whether this rank is a member.

    All ranks leave it together.
    """
    turn = next(_turns)
    before = dict(os.environ)
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count // nodes)}
    # torchrec keeps the groups within and between nodes for ever.
    comm._INTRA_PG = comm._CROSS_PG = comm._INTRA_PG_2D = comm._CROSS_PG_2D = None
    join = f"file://{folder}/group-{turn}"
    if rank < count:
        dist.init_process_group("gloo", init_method=join, rank=rank, world_size=count)
    yield rank < count
    if rank < count:
        dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"{join}-all", rank=rank, world_size=world_size)
    dist.barrier()
    dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


_turns = itertools.count()


def build_model(layout: Layout, users: int = USERS, items: int = ITEMS, restored: bool = False) -> tuple[Any, Any]:
    """Build a model and its optimizers with the given layout; `restored` is that of `build`."""
    config = Pretrain(
        data="",
        output="",
        seed=7,
        model=Model(dim=DIM, heads=2, layers=1, max_len=8, dropout=0, attention_dropout=0, user_dropout=0),
        loss=Loss(candidates="sampled"),
        tables=Tables(
            sharding=layout.sharding,
            optimizer=layout.optimizer,
            lr=0.02,
            user_lr=0.02,
            precision=layout.precision,
            shard_ranks=layout.shard_ranks,
        ),
        optimizer=Optimizer(lr=2e-3),
    )
    dataset = Dataset(path="", manifest=Manifest(users=users, items=items))
    return build(
        config,
        config.model,
        dataset,
        capacity=CAPACITY,
        device=torch.device("cpu"),
        restored=restored,
        **layout.opened,
    )


def make_step_batch(step: int, users: int = USERS, attributes: Attributes | None = None) -> SequenceBatch:
    """Make this rank's part of a step's global batch, which is the same for every number of ranks."""
    global_batch = walks(7, ITEMS, seed=step, shortest=2, longest=9)
    own = range(dist.get_rank(), len(global_batch), dist.get_world_size())
    histories = no_histories()
    if own:
        histories = Histories(
            users=np.array([(step + n) % users for n in own]),
            items=np.concatenate([global_batch[n] for n in own]),
            offsets=np.concatenate([[0], np.cumsum([len(global_batch[n]) for n in own])]),
        )
    batch = make_batch(
        histories,
        row_length=8,
        capacity=CAPACITY,
        predict=True,
        draw=lambda targets: AllItems(ITEMS).candidates,  # as if all had been sampled, on every rank
        attributes=attributes,
    )
    targets = torch.tensor(float(batch.target_slot.numel()))
    dist.all_reduce(targets)
    batch.global_targets = targets / dist.get_world_size()
    return batch


def train_steps(model: Any, optimizer: Any, numbers: range, group: int = 0, users: int = USERS) -> list[float]:
    """Train these steps, and return the loss of each, taken before its update.

    Args:
        group: number of ranks that share a copy of the tables; 0: all.
        users: number of users.
    """
    losses = []
    replicas = Replicas(table_tensors(model, optimizer), group or dist.get_world_size(), every=1)
    model.train()
    for number in numbers:
        optimizer.zero_grad()
        loss, _ = model(make_step_batch(number, users, unwrapped(model).attributes))
        loss.backward()
        optimizer.step()
        replicas.after_step(number + 1)
        loss = loss.detach()
        dist.all_reduce(loss)
        losses.append(float(loss) / dist.get_world_size())
    return losses


def train_and_save(source: Layout, folder: str) -> list[float]:
    """Train and save a checkpoint, and return the losses of the next two steps."""
    model, optimizer = build_model(source)
    train_steps(model, optimizer, range(STEPS), source.shard_ranks)
    saver = Saver(Checkpoints(output_folder(folder, source), keep=1), Saving())
    saver.save(STEPS, state_of(model, optimizer), {})
    losses = train_steps(
        model, optimizer, range(STEPS, STEPS + 2), source.shard_ranks
    )  # while the checkpoint is written
    saver.finish()
    return losses


def output_folder(folder: str, source: Layout) -> str:
    """Folder in which the run of a layout keeps its checkpoints."""
    more = "-attributes" * source.attributes
    return f"{folder}/{source.ranks}-{source.sharding}-{source.optimizer}-{source.precision}-{source.shard_ranks}{more}"


@functools.cache  # compared with many models
def load_tensors(folder: str, source: Layout) -> dict[str, torch.Tensor]:
    """Load every tensor of a layout's checkpoint by name, without the code under test; they are not to be changed."""
    return load_latest(output_folder(folder, source))


def load_latest(output: str) -> dict[str, torch.Tensor]:
    """Load every tensor of a run's newest checkpoint by name, without the code under test."""
    path = Checkpoints(output, keep=1).latest()
    assert path is not None
    metadata = FileSystemReader(path).read_metadata().state_dict_metadata
    state = {name: torch.empty(e.size) for name, e in metadata.items() if isinstance(e, TensorStorageMetadata)}
    dcp.load(state, checkpoint_id=path, no_dist=True)
    return state


def restore_sources(target: Layout, sources: list[Layout], folder: str) -> list[Difference]:
    """Restore each source into one model with the target layout; `losses` are those of the next two steps."""
    model, optimizer = build_model(target)
    differences = []
    for source in sources:
        path = Checkpoints(output_folder(folder, source), keep=1).latest()
        assert path is not None
        with contextlib.redirect_stdout(io.StringIO()):  # restore prints which column blocks change
            restore(model, optimizer, path, STEPS)
        state = load_tensors(folder, source)
        largest = {"tables": 0.0, "moments": 0.0, "dense": 0.0}
        for kind, value, expected in pairs_to_compare(model, optimizer, state):
            assert value.shape == expected.shape and value.numel(), (source, target, kind, value.shape, expected.shape)
            largest[kind] = max(largest[kind], float((value - expected).abs().max()))
        over_ranks = torch.tensor(list(largest.values()))
        dist.all_reduce(over_ranks, op=dist.ReduceOp.MAX)
        losses = train_steps(model, optimizer, range(STEPS, STEPS + 2), target.shard_ranks)
        tables, moments, dense = over_ranks.tolist()
        differences.append(Difference(source, target, tables, moments, dense, losses))
    return differences


def pairs_to_compare(
    model: Any, optimizer: Any, state: dict[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield (kind, tensor on this rank, expected part of the checkpoint) of parameters and optimizer state."""
    tables, moments = tables_of(model), optimizer.state_dict()["state"]
    for name, value in model.state_dict().items():
        if name not in tables:
            yield "dense", value, state[f"model.{name}"]
            for moment, tensor in moments[name].items():
                yield "dense", tensor, state[f"optimizer.state.{name}.{moment}"]
            continue
        table = state[f"model.{name}"]
        shards: list[tuple[torch.Tensor, int, int]] = [(value, 0, 0)]
        if isinstance(value, ShardedTensor):
            offsets = [shard.metadata.shard_offsets for shard in value.local_shards()]
            shards = [(s.tensor, row, column) for s, (row, column) in zip(value.local_shards(), offsets, strict=True)]
        for tensor, row, column in shards:
            part = table[row : row + tensor.shape[0], column : column + tensor.shape[1]]
            yield "tables", tensor.float(), part.to(tensor.dtype).float()  # as this run's precision rounds it
        assert not shards or all(moment.dtype == torch.float32 for moment in moments.get(name, {}).values())
        local = {moment: tensor for moment, tensor in moments.get(name, {}).items() if shards and moment != "step"}
        keys = sorted(key for key in state if key.startswith(f"optimizer.state.{name}.") and shards)
        for (moment, tensor), key in zip(local.items(), keys, strict=True):
            assert moment in key or "momentum1" in moment
            expanded = state[key].repeat_interleave(DIM // state[key].shape[1], dim=1)  # one moment per number
            if isinstance(tensor, ShardedTensor):
                parts = [shard.tensor for shard in tensor.local_shards()]
            else:
                parts = list(tensor.split([part.shape[0] for part, _, _ in shards]))
            for value, (part, row, column) in zip(parts, shards, strict=True):
                expected = expanded[row : row + part.shape[0], column : column + part.shape[1]]
                if value.numel() == part.shape[0]:
                    equal = bool((expected == expected[:, :1]).all())  # the mean of equal numbers may be rounded
                    expected = expected[:, 0] if equal else expected.mean(1)
                yield "moments", value.reshape(expected.shape), expected
