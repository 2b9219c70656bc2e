"""Tables that grow: starts a run from another run's checkpoint, on a dataset with more users and items.

The checkpoint's rows are read into a view of a grown table's first rows. The new rows keep their initial values, and
their optimizer state stays zero. Nothing is copied, and no rank holds more than its shards. The decoder's embeddings of
features grow likewise, where there are more event types; of a feature that is new nothing is read.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata, TensorProperties

FEATURES = "decoder.features."
"""Part of the names of the embeddings of features."""


def feature_rows(parameters: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, int]:
    """Rows that a checkpoint has of each embedding of a feature, by parameter name; 0: it is new.

    Args:
        parameters: of the model, by name.
        saved: metadata of the checkpoint's tensors, whose names begin with `model.`.
    """
    names = [name for name in parameters if FEATURES in name]
    return {name: saved[f"model.{name}"].size[0] if f"model.{name}" in saved else 0 for name in names}


def first_rows(state: dict[str, Any], rows: dict[str, int]) -> dict[str, Any]:
    """View the first rows of each table and its moments in a state, without copying.

    Args:
        state: of a model and its optimizers (see `state.state_of`).
        rows: number of rows to view, by table name; a table that has no more stays as it is.

    Returns:
        The same structure, without the tables of which this rank holds none of these rows.
    """
    parameters, optimizer_state = dict(state["model"]), dict(state["optimizer"]["state"])
    for name, count in rows.items():
        table = parameters[name]
        if count >= table.shape[0]:
            continue
        moments = optimizer_state.pop(name, {})
        del parameters[name]
        if (first := _view_first_rows(table, count)) is not None:
            parameters[name] = first
            if moments:
                optimizer_state[name] = {moment: _view_first_rows(value, count) for moment, value in moments.items()}
    return {"model": parameters, "optimizer": {"state": optimizer_state}}


def _view_first_rows(value: Any, rows: int) -> Any:
    """View the first `rows` rows of a tensor or `ShardedTensor`; None: there are none, or not in this rank's shards.

    A number, such as a step counter, stays as it is.
    """
    if not isinstance(value, ShardedTensor):
        return (value if value.dim() == 0 else value[:rows]) if rows else None

    def cut(shard: ShardMetadata) -> ShardMetadata:
        (row, column), (count, columns) = shard.shard_offsets, shard.shard_sizes
        return ShardMetadata([row, column], [min(count, rows - row), columns], shard.placement)

    local = [
        Shard(shard.tensor[: rows - shard.metadata.shard_offsets[0]], cut(shard.metadata))
        for shard in value.local_shards()
        if shard.metadata.shard_offsets[0] < rows
    ]
    if not local:
        return None
    view = ShardedTensorMetadata(
        [cut(shard) for shard in value.metadata().shards_metadata if shard.shard_offsets[0] < rows],
        torch.Size([rows, value.size(1)]),
        TensorProperties(dtype=local[0].tensor.dtype),
    )
    return ShardedTensor._init_from_local_shards_and_global_metadata(local, view, process_group=value._process_group)
