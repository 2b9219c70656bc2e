"""The tensors of a model and its optimizers as a checkpoint holds them: independent of the sharding.

    model.NAME                      a parameter; a table has its full width and all its rows
    optimizer.state.NAME.sum        of a table under (row-wise) Adagrad: [rows, dim], or [rows, blocks]
    optimizer.state.NAME.exp_avg, exp_avg_sq    of a table under Adam: [rows, dim]
    optimizer.state.NAME.*          of any other parameter: as torch's AdamW holds it

A table's optimizer holds this state under names and shapes that depend on the sharding: torch's in a parameter's state,
fbgemm's in its own buffers. Here they become the same tensors, which share memory with the optimizer: saving makes no
further copy, and loading in place loads into the optimizer. Each rank reads and writes its own shards only.

*blocks* is 1 unless columns are sharded: fbgemm's row-wise Adagrad then keeps one moment per row and block of columns,
the mean square of the gradient over that block. If a run has other blocks than the checkpoint, each gets the mean over
its columns. For unsharded rows that is what row-wise Adagrad would have kept, given the same gradients.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharded_tensor import ShardedTensor as Sharded
from torchrec.optim.keyed import CombinedOptimizer

from recgpt_torchrec.checkpoints.folder import read_tensor_metadata, read_tensors
from recgpt_torchrec.checkpoints.growing import feature_rows, first_rows
from recgpt_torchrec.config.tables import is_attribute
from recgpt_torchrec.data.bags import table_name, tables_of
from recgpt_torchrec.distributed.processes import log_message
from recgpt_torchrec.errors import InputError

MOMENTS = {0: (), 1: ("sum",), 2: ("exp_avg", "exp_avg_sq")}
"""Names of a table's moments, by their number."""


def state_of(model: nn.Module, optimizer: CombinedOptimizer) -> dict[str, Any]:
    """The state of a model and its optimizers, as nested dicts of tensors that share their memory.

    Returns:
        {"model": {name: tensor}, "optimizer": {"state": {name: {moment: tensor}}}}. Tables and their moments are
        `ShardedTensor`s, or tensors where every rank holds a copy. A rank without a shard of a table has no moments of
        it.
    """
    parameters, state = model.state_dict(), {}
    for name, values in optimizer.state_dict()["state"].items():
        tensors = moments(parameters[name], values) if "embedding_bags" in name else values
        if tensors:
            state[name] = tensors
    return {"model": parameters, "optimizer": {"state": state}}


def table_tensors(model: nn.Module, optimizer: CombinedOptimizer) -> list[Any]:
    """Every table of a model and its moments, in memory shared with both: see `state_of`."""
    state = state_of(model, optimizer)
    names = tables_of(model)
    return [state["model"][name] for name in names] + [
        moment for name in names for moment in state["optimizer"]["state"].get(name, {}).values()
    ]


def moments(table: Any, state: dict[str, Any]) -> dict[str, Any]:
    """One table's moments by name, from its optimizer's state: [rows, dim] or [rows, blocks], sharded as the table.

    Args:
        table: [rows, dim], a `ShardedTensor`, or a tensor where every rank holds a copy.
        state: the optimizer's state of the table: per moment a `ShardedTensor` or this rank's tensor, and perhaps a
            step counter.
    """
    values = [value for name, value in state.items() if name != "step"]
    by_name = {}
    for name, value in zip(MOMENTS[len(values)], values, strict=True):
        if not isinstance(table, Sharded):
            by_name[name] = value
        elif shards := table.local_shards():
            if isinstance(value, Sharded):
                parts = [shard.tensor for shard in value.local_shards()]
            else:
                parts = list(value.split([shard.tensor.shape[0] for shard in shards]))
            by_name[name] = _shard_moments(table, [part.view(part.shape[0], _width(part)) for part in parts])
    return by_name


def _width(part: Tensor) -> int:
    """Number of moments per row; a rank may hold a shard of no rows."""
    return part.shape[1] if part.dim() > 1 else 1


def _shard_moments(table: Sharded, parts: list[Tensor]) -> Sharded:
    """Shard moments as their table, given one part per local shard: of the shard's shape, or [rows of the shard, 1]."""
    starts = sorted({shard.shard_offsets[1] for shard in table.metadata().shards_metadata})
    if parts[0].shape[1] > 1:
        return _make_sharded(table, parts, table.size(1), lambda column, columns: (column, columns))
    return _make_sharded(table, parts, len(starts), lambda column, columns: (starts.index(column), 1))


def _make_sharded(
    table: Sharded, parts: list[Tensor], width: int, columns_of: Callable[[int, int], tuple[int, int]]
) -> Sharded:
    """Make a `ShardedTensor` [rows, width] of `parts`, one per local shard of the table.

    Args:
        columns_of: (first column, number of columns) of a part, from those of the table's shard.
    """

    def metadata(shard: ShardMetadata) -> ShardMetadata:
        (row, column), (rows, columns) = shard.shard_offsets, shard.shard_sizes
        first, number = columns_of(column, columns)
        return ShardMetadata([row, first], [rows, number], shard.placement)

    local = [Shard(part, metadata(s.metadata)) for part, s in zip(parts, table.local_shards(), strict=True)]
    full = ShardedTensorMetadata(
        [metadata(shard) for shard in table.metadata().shards_metadata],
        torch.Size([table.size(0), width]),
        TensorProperties(dtype=parts[0].dtype),
    )
    return Sharded._init_from_local_shards_and_global_metadata(local, full, process_group=table._process_group)


def restore(
    model: nn.Module,
    optimizer: CombinedOptimizer,
    checkpoint: str,
    steps: int,
    initialise: Callable[[Mapping[str, int]], None] | None = None,
) -> None:
    """Restore a model and its optimizers from a checkpoint, in place (collective).

    Where a table or the embedding of a feature has more rows than in the checkpoint, its first rows are restored; the
    optimizer state of the others stays as it is.

    Args:
        model, optimizer: restored in place.
        checkpoint: folder, written on any number of ranks and with any sharding.
        steps: optimizer steps done, to which the optimizers' step counters are set.
        initialise: fills the tables from a row on, given the number of rows in the checkpoint by table name; None: it
            must have all rows.

    Raises:
        InputError: the checkpoint is damaged or lacks rows, or an earlier version wrote the tables' optimizer state.
    """
    full_state = state_of(model, optimizer)
    saved = read_tensor_metadata(checkpoint)
    tables = tables_of(model)
    # A run that starts from another's checkpoint may read attributes that are new: their tables start as in any run.
    rows = {
        name: 0
        for name in tables
        if initialise is not None and f"model.{name}" not in saved and is_attribute(table_name(name))
    }
    for name, table in tables.items():
        if name in rows:
            continue
        if (key := f"model.{name}") not in saved or len(saved[key].size) != 2:
            raise InputError(f"{checkpoint} has no table {key}; restore it, or choose another --output")
        rows[name], columns = size = saved[f"model.{name}"].size
        # Nothing else fills the tables.
        if columns != table.shape[1] or (initialise is None and rows[name] != table.shape[0]):
            raise InputError(
                f"in {checkpoint} the table {name} has size {list(size)}, in the run {list(table.shape)}; restore it, "
                "or choose another --output"
            )
    if initialise is not None:
        initialise(rows)
        rows |= feature_rows(full_state["model"], saved)
    state = first_rows(full_state, rows)
    regrouped = []
    for name, tensors in state["optimizer"]["state"].items():
        for moment, value in tensors.items() if "embedding_bags" in name else ():
            key = f"optimizer.state.{name}.{moment}"
            if key not in saved:
                raise InputError(
                    f"{checkpoint} has no {key}: an earlier version of this program wrote it, whose training cannot be "
                    "resumed (evaluate, export and prompt_tune can read it); choose another --output"
                )
            if len(saved[key].size) != 2:
                raise InputError(f"{checkpoint} has a damaged {key}; restore it, or choose another --output")
            blocks = saved[key].size[1]
            if blocks != value.size(1):
                tensors[moment] = _allocate_moments(state["model"][name], value, blocks)
                regrouped.append((name, value, tensors[moment]))
    read_tensors(state, checkpoint)
    for name, value, read in regrouped:
        log_message(
            f"{name}: {checkpoint} has {read.size(1)} row-wise Adagrad moments per row, one per block of columns; this "
            f"run keeps {value.size(1)}, each set to the mean over its columns"
        )
        _regroup_moments(read, value)
    model.load_state_dict(full_state["model"])
    optimizer.set_optimizer_step(steps)  # of fused optimizers
    for parameter_state in optimizer.state.values():
        if "step" in parameter_state:
            parameter_state["step"].fill_(steps)


def _allocate_moments(table: Any, value: Any, blocks: int) -> Any:
    """Allocate moments [rows, blocks] to read: only the rows that this rank needs to fill `value`."""
    if not isinstance(value, Sharded) or value.size(1) > 1:
        return torch.empty(value.size(0), blocks)  # a block of columns needs all rows
    parts = [shard.tensor.new_empty(shard.tensor.shape[0], blocks) for shard in value.local_shards()]
    return _make_sharded(table, parts, blocks, lambda column, columns: (0, blocks))


def _regroup_moments(read: Any, value: Any) -> None:
    """Fill `value` [rows, new blocks] from `read` [rows, old blocks]: each block's mean over its columns, in place."""
    old, new = read.size(1), value.size(1)
    edges = torch.arange(old + 1) / old, torch.arange(new + 1) / new
    # share[i, j]: the share of new block j that is in old block i.
    share = torch.minimum(edges[0][1:, None], edges[1][None, 1:]) - torch.maximum(
        edges[0][:-1, None], edges[1][None, :-1]
    )
    share = share.clamp(min=0) * new
    parts: list[Any] = [(value, 0, 0)]
    if isinstance(value, Sharded):
        parts = [(shard.tensor, *shard.metadata.shard_offsets) for shard in value.local_shards()]
    if isinstance(read, Sharded):
        sources = [shard.tensor for shard in read.local_shards()]
    else:
        sources = [read[row : row + part.shape[0]] for part, row, _ in parts]
    for source, (part, _, block) in zip(sources, parts, strict=True):
        part.copy_(source @ share[:, block : block + part.shape[1]].to(source.device))
