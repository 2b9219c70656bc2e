"""Checkpoints written on some ranks with some sharding, and read on others with another: what comes out differently?

`reshard(rank, world_size, ...)` is to be run by `launch.run_ranks` on as many ranks as the largest of the cases. It
leaves that group and makes smaller ones, so that a whole matrix costs one start of processes.
"""

import contextlib
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

from recgpt_torchrec.checkpoints.folder import Checkpoints
from recgpt_torchrec.checkpoints.saving import Saver
from recgpt_torchrec.checkpoints.state import restore, state_of
from recgpt_torchrec.config import Loss, Model, Optimizer, Pretrain, Saving, Tables
from recgpt_torchrec.data.batch import Capacity, SequenceBatch, make_batch
from recgpt_torchrec.data.candidates import AllItems
from recgpt_torchrec.data.dataset import Dataset, Manifest
from recgpt_torchrec.data.histories import Histories, no_histories
from recgpt_torchrec.distributed.processes import silence_libraries
from recgpt_torchrec.distributed.sharding import tables_of
from recgpt_torchrec.training.building import build
from tools.small_run import walks

USERS, ITEMS, STEPS = 13, 29, 3
DIM = 24
"""Columns: blocks of a multiple of 4 on one, two and three ranks."""


@dataclass(frozen=True, order=True)
class Layout:
    """How many ranks hold the tables, and how."""

    ranks: int
    sharding: Any
    optimizer: Any

    def __str__(self) -> str:
        return f"{self.ranks} {self.sharding}"

    def blocks(self) -> int:
        """Blocks of columns that row-wise Adagrad keeps a moment for."""
        return self.ranks if (self.sharding, self.optimizer) == ("column_wise", "rowwise_adagrad") else 1


@dataclass
class Difference:
    """What a restored model has that the saved one had not; the largest absolute difference of any number."""

    source: Layout
    target: Layout
    tables: float
    moments: float
    dense: float
    losses: list[float]
    """Of the next two steps: the first depends on what was restored only, the second also on the moments."""


def reshard(rank: int, world_size: int, folder: str, sources: list[Layout], targets: list[Layout]) -> list[Difference]:
    """Train, save and go on with each source; restore each into each target of the same optimizer, and go on there."""
    silence_libraries()
    dist.destroy_process_group()
    # All ranks come first: torchrec agrees with them on something once in a process, for its first model.
    ranks = sorted({layout.ranks for layout in [*sources, *targets]}, reverse=True)
    assert ranks[0] == world_size
    expected: dict[Layout, list[float]] = {}
    found = []
    for count in ranks:
        with group(rank, world_size, count, folder) as member:
            if member:
                expected |= {source: written(source, folder) for source in sources if source.ranks == count}
    for count in ranks:
        with group(rank, world_size, count, folder) as member:
            for target in targets if member else ():
                if target.ranks == count:
                    found += read(target, [s for s in sources if s.optimizer == target.optimizer], folder)
    with group(rank, world_size, world_size, folder):
        everyone: list[Any] = [None] * world_size
        dist.all_gather_object(everyone, expected)
    known = everyone[0]  # rank 0 is in every group
    for difference in found:
        difference.losses = [
            abs(mine - theirs) for mine, theirs in zip(difference.losses, known[difference.source], strict=True)
        ]
    return found


@contextlib.contextmanager
def group(rank: int, world_size: int, count: int, folder: str) -> Iterator[bool]:
    """A process group of the first `count` ranks; yields whether this one is among them. All leave it together."""
    turn = next(_turns)
    before = dict(os.environ)
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
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


def made(layout: Layout, users: int = USERS, items: int = ITEMS) -> tuple[Any, Any]:
    """A model and its optimizers, laid out that way."""
    config = Pretrain(
        data="",
        output="",
        seed=7,
        model=Model(dim=DIM, heads=2, layers=1, max_len=8, dropout=0, attention_dropout=0, user_dropout=0),
        loss=Loss(candidates="all"),
        tables=Tables(sharding=layout.sharding, optimizer=layout.optimizer, lr=0.02, user_lr=0.02),
        optimizer=Optimizer(lr=2e-3),
    )
    dataset = Dataset(path="", manifest=Manifest(users=users, items=items))
    return build(config, config.model, dataset, batch_size=items, device=torch.device("cpu"))


def batch(step: int) -> SequenceBatch:
    """This rank's part of a step's batch, which is the same for every number of ranks."""
    drawn = walks(7, ITEMS, seed=step, shortest=2, longest=9)
    mine = range(dist.get_rank(), len(drawn), dist.get_world_size())
    histories = no_histories()
    if mine:
        histories = Histories(
            users=np.array([(step + n) % USERS for n in mine]),
            items=np.concatenate([drawn[n] for n in mine]),
            offsets=np.concatenate([[0], np.cumsum([len(drawn[n]) for n in mine])]),
        )
    made = make_batch(
        histories,
        row_length=8,
        capacity=Capacity(USERS, ITEMS),
        predict=True,
        draw=lambda targets: AllItems(ITEMS).candidates,
    )
    targets = torch.tensor(float(made.target_slot.numel()))
    dist.all_reduce(targets)
    made.global_targets = targets / dist.get_world_size()
    return made


def steps(model: Any, optimizer: Any, numbers: range) -> list[float]:
    """Train some steps; the loss of each, before it."""
    losses = []
    model.train()
    for number in numbers:
        optimizer.zero_grad()
        loss, _ = model(batch(number))
        loss.backward()
        optimizer.step()
        loss = loss.detach()
        dist.all_reduce(loss)
        losses.append(float(loss) / dist.get_world_size())
    return losses


def written(source: Layout, folder: str) -> list[float]:
    """Train and save; returns the losses of the two steps after."""
    model, optimizer = made(source)
    steps(model, optimizer, range(STEPS))
    saver = Saver(Checkpoints(place(folder, source), keep=1), Saving())
    saver.save(STEPS, state_of(model, optimizer), {})
    losses = steps(model, optimizer, range(STEPS, STEPS + 2))  # beside the writing
    saver.finish()
    return losses


def place(folder: str, source: Layout) -> str:
    """Where the run of a layout keeps its checkpoints."""
    return f"{folder}/{source.ranks}-{source.sharding}-{source.optimizer}"


def saved(folder: str, source: Layout) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by name, read without the code under test."""
    path = Checkpoints(place(folder, source), keep=1).latest()
    assert path is not None
    there = FileSystemReader(path).read_metadata().state_dict_metadata
    state = {name: torch.empty(e.size) for name, e in there.items() if isinstance(e, TensorStorageMetadata)}
    dcp.load(state, checkpoint_id=path, no_dist=True)
    return state


def read(target: Layout, sources: list[Layout], folder: str) -> list[Difference]:
    """Restore each source into one model, laid out as the target; the losses are those of the next steps."""
    model, optimizer = made(target)
    found = []
    for source in sources:
        path = Checkpoints(place(folder, source), keep=1).latest()
        assert path is not None
        with contextlib.redirect_stdout(io.StringIO()):  # it says where blocks of columns change
            restore(model, optimizer, path, STEPS)
        state = saved(folder, source)
        worst = {"tables": 0.0, "moments": 0.0, "dense": 0.0}
        for kind, mine, theirs in compared(model, optimizer, state):
            assert mine.shape == theirs.shape and mine.numel(), (source, target, kind, mine.shape, theirs.shape)
            worst[kind] = max(worst[kind], float((mine - theirs).abs().max()))
        over_ranks = torch.tensor(list(worst.values()))
        dist.all_reduce(over_ranks, op=dist.ReduceOp.MAX)
        losses = steps(model, optimizer, range(STEPS, STEPS + 2))
        tables, moments, dense = over_ranks.tolist()
        found.append(Difference(source, target, tables, moments, dense, losses))
    return found


def compared(
    model: Any, optimizer: Any, state: dict[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(kind, what this rank holds, what of the checkpoint it should be), from the optimizers' own state."""
    tables, held = tables_of(model), optimizer.state_dict()["state"]
    for name, value in model.state_dict().items():
        if name not in tables:
            yield "dense", value, state[f"model.{name}"]
            for moment, tensor in held[name].items():
                yield "dense", tensor, state[f"optimizer.state.{name}.{moment}"]
            continue
        whole = state[f"model.{name}"]
        shards: list[tuple[torch.Tensor, int, int]] = [(value, 0, 0)]
        if isinstance(value, ShardedTensor):
            offsets = [shard.metadata.shard_offsets for shard in value.local_shards()]
            shards = [(s.tensor, row, column) for s, (row, column) in zip(value.local_shards(), offsets, strict=True)]
        for tensor, row, column in shards:
            yield "tables", tensor, whole[row : row + tensor.shape[0], column : column + tensor.shape[1]]
        raw = {moment: tensor for moment, tensor in held.get(name, {}).items() if shards and moment != "step"}
        keys = sorted(key for key in state if key.startswith(f"optimizer.state.{name}.") and shards)
        for (moment, tensor), key in zip(raw.items(), keys, strict=True):
            assert moment in key or "momentum1" in moment
            spread = state[key].repeat_interleave(DIM // state[key].shape[1], dim=1)  # a moment for every number
            if isinstance(tensor, ShardedTensor):
                parts = [shard.tensor for shard in tensor.local_shards()]
            else:
                parts = list(tensor.split([part.shape[0] for part, _, _ in shards]))
            for mine, (part, row, column) in zip(parts, shards, strict=True):
                theirs = spread[row : row + part.shape[0], column : column + part.shape[1]]
                if mine.numel() == part.shape[0]:
                    alike = bool((theirs == theirs[:, :1]).all())  # a mean of equal numbers may be rounded
                    theirs = theirs[:, 0] if alike else theirs.mean(1)
                yield "moments", mine.reshape(theirs.shape), theirs
