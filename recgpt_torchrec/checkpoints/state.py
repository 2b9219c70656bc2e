"""What a checkpoint holds of a model and its optimizers, in a form in which no sharding shows.

    model.NAME                      a parameter; a table has its full width and all its rows
    optimizer.state.NAME.sum        of a table under (row-wise) Adagrad: [rows, dim], or [rows, blocks]
    optimizer.state.NAME.exp_avg, exp_avg_sq    of a table under Adam: [rows, dim]
    optimizer.state.NAME.*          of any other parameter: as torch's AdamW holds it

A table's optimizer keeps that state under other names and in other shapes for each sharding: torch's in a parameter's
state, fbgemm's in buffers of its own. Here all of them become the same tensors, which share their memory with the
optimizer's: saving copies nothing more, and loading in place is loading into the optimizer. Each rank reads and writes
its own shards only.

*blocks* is 1, except where columns are sharded: fbgemm's row-wise Adagrad then keeps one moment a row and block of
columns, the mean square of the gradient over that block. Read with other blocks, each new one gets the mean over its
columns. For whole rows that is what row-wise Adagrad would have kept, given the same gradients.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharded_tensor import ShardedTensor as Sharded
from torchrec.optim.keyed import CombinedOptimizer

from recgpt_torchrec.checkpoints.folder import read_tensor_metadata, read_tensors
from recgpt_torchrec.checkpoints.growing import first_rows
from recgpt_torchrec.distributed.processes import log_message
from recgpt_torchrec.distributed.sharding import tables_of
from recgpt_torchrec.errors import InputError

MOMENTS = {0: (), 1: ("sum",), 2: ("exp_avg", "exp_avg_sq")}
"""Names of a table's moments, by how many its optimizer keeps."""


def state_of(model: nn.Module, optimizer: CombinedOptimizer) -> dict[str, Any]:
    """A model and its optimizers as nested dicts of tensors that share their memory.

    Returns:
        {"model": {name: tensor}, "optimizer": {"state": {name: {moment: tensor}}}}, where tables and their moments are
        `ShardedTensor`s unless every rank holds a copy. A rank without a shard of a table has no moments of it.
    """
    parameters, state = model.state_dict(), {}
    for name, held in optimizer.state_dict()["state"].items():
        kept = moments(parameters[name], held) if "embedding_bags" in name else held
        if kept:
            state[name] = kept
    return {"model": parameters, "optimizer": {"state": state}}


def moments(table: Any, held: dict[str, Any]) -> dict[str, Any]:
    """The moments of one table, from whatever its optimizer holds: [rows, dim] or [rows, blocks], sharded as the table.

    Args:
        table: [rows, dim] a `ShardedTensor`, or a tensor where every rank holds a copy.
        held: the optimizer's state of it: a `ShardedTensor` or this rank's tensor a moment, and perhaps a step counter.
    """
    values = [value for name, value in held.items() if name != "step"]
    kept = {}
    for name, value in zip(MOMENTS[len(values)], values, strict=True):
        if not isinstance(table, Sharded):
            kept[name] = value
        elif shards := table.local_shards():
            if isinstance(value, Sharded):
                parts = [shard.tensor for shard in value.local_shards()]
            else:
                parts = list(value.split([shard.tensor.shape[0] for shard in shards]))
            kept[name] = _along(table, [part.view(part.shape[0], -1) for part in parts])
    return kept


def _along(table: Sharded, parts: list[Tensor]) -> Sharded:
    """Moments sharded as their table, from one part a shard: of the shard's shape, or [rows of the shard, 1]."""
    starts = sorted({shard.shard_offsets[1] for shard in table.metadata().shards_metadata})
    if parts[0].shape[1] > 1:
        return _sharded(table, parts, table.size(1), lambda column, columns: (column, columns))
    return _sharded(table, parts, len(starts), lambda column, columns: (starts.index(column), 1))


def _sharded(table: Sharded, parts: list[Tensor], width: int, place: Callable[[int, int], tuple[int, int]]) -> Sharded:
    """A `ShardedTensor` [rows, width] of `parts`, one a local shard of the table.

    Args:
        place: (first column, number of columns) of a part, from those of the table's shard.
    """

    def metadata(shard: ShardMetadata) -> ShardMetadata:
        (row, column), (rows, columns) = shard.shard_offsets, shard.shard_sizes
        first, number = place(column, columns)
        return ShardMetadata([row, first], [rows, number], shard.placement)

    local = [Shard(part, metadata(s.metadata)) for part, s in zip(parts, table.local_shards(), strict=True)]
    whole = ShardedTensorMetadata(
        [metadata(shard) for shard in table.metadata().shards_metadata],
        torch.Size([table.size(0), width]),
        TensorProperties(dtype=parts[0].dtype),
    )
    return Sharded._init_from_local_shards_and_global_metadata(local, whole, process_group=table._process_group)


def restore(model: nn.Module, optimizer: CombinedOptimizer, checkpoint: str, steps: int) -> None:
    """Give a model and its optimizers the values of a checkpoint, whatever wrote it (collective).

    Of tables that have more rows than in the checkpoint these get the first ones; the others, and what the optimizer
    keeps of them, stay as they are.

    Args:
        model, optimizer: to be filled in place.
        checkpoint: folder, written on any number of ranks and with any sharding.
        steps: optimizer steps that were done.

    Raises:
        InputError: it is damaged, or holds the tables' optimizer state in the form of an earlier version.
    """
    whole = state_of(model, optimizer)
    there = read_tensor_metadata(checkpoint)
    state = first_rows(whole, {name: there[f"model.{name}"].size[0] for name in tables_of(model)})
    regrouped = []
    for name, kept in state["optimizer"]["state"].items():
        for moment, value in kept.items() if "embedding_bags" in name else ():
            key = f"optimizer.state.{name}.{moment}"
            if key not in there:
                raise InputError(
                    f"{checkpoint} has no {key}: an earlier version of this program wrote it, and this one reads its "
                    "model (evaluate, export, prompt_tune), but cannot go on training it; choose another --output"
                )
            blocks = there[key].size[1]
            if blocks != value.size(1):
                kept[moment] = _room(state["model"][name], value, blocks)
                regrouped.append((name, value, kept[moment]))
    read_tensors(state, checkpoint)
    for name, value, read in regrouped:
        log_message(
            f"{name}: row-wise Adagrad kept {read.size(1)} moments a row in {checkpoint}, one for each block of "
            f"columns, and keeps {value.size(1)} here; each is set to the mean over its columns"
        )
        _regroup(read, value)
    model.load_state_dict(whole["model"])
    optimizer.set_optimizer_step(steps)  # of the fused ones
    for held in optimizer.state.values():
        if "step" in held:
            held["step"].fill_(steps)


def _room(table: Any, value: Any, blocks: int) -> Any:
    """Where to read moments [rows, blocks] for a rank that will keep `value`: what it needs of them, and no more."""
    if not isinstance(value, Sharded) or value.size(1) > 1:
        return torch.empty(value.size(0), blocks)  # a block of columns needs all rows
    parts = [shard.tensor.new_empty(shard.tensor.shape[0], blocks) for shard in value.local_shards()]
    return _sharded(table, parts, blocks, lambda column, columns: (0, blocks))


def _regroup(read: Any, value: Any) -> None:
    """Fill moments of some blocks of columns with the means of those of others."""
    old, new = read.size(1), value.size(1)
    edges = torch.arange(old + 1) / old, torch.arange(new + 1) / new
    # share[i, j]: how much of the new block j lies in the old block i.
    share = torch.minimum(edges[0][1:, None], edges[1][None, 1:]) - torch.maximum(
        edges[0][:-1, None], edges[1][None, :-1]
    )
    share = share.clamp(min=0) * new
    parts = [(value, 0)]
    if isinstance(value, Sharded):
        parts = [(shard.tensor, shard.metadata.shard_offsets[1]) for shard in value.local_shards()]
    sources = [shard.tensor for shard in read.local_shards()] if isinstance(read, Sharded) else [read] * len(parts)
    for source, (part, block) in zip(sources, parts, strict=True):
        part.copy_(source @ share[:, block : block + part.shape[1]].to(source.device))
