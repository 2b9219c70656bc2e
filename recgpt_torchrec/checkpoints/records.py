"""Cuts the state of a checkpoint into records of bounded size: who reads one holds little beside the tables.

torch.distributed.checkpoint writes a record per shard and reads a record whole, wherever its values go. Here a shard
becomes several shards, blocks of its rows that share its memory. Readers need nothing of this: they fill a tensor from
whatever blocks a checkpoint has.
"""

import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata, TensorProperties
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.remote_device import _remote_device

from recgpt_torchrec.distributed.processes import rank, world_size

RECORD_BYTES = 2**26
"""Maximum size of the values of one record. Reading takes four times that: the record as stored and its tensor, while
those of the record before are not yet freed."""


def cut_into_records(state: dict[str, Any]) -> dict[str, Any]:
    """Cut the tensors of a state into blocks of rows of at most `RECORD_BYTES`, without copying.

    Args:
        state: nested dicts of tensors, each the same on all ranks, and `ShardedTensor`s.

    Returns:
        The same structure. A larger `ShardedTensor` has more shards. A larger tensor becomes a `ShardedTensor` whose
        blocks are dealt to the ranks, so that each writes a part of it.
    """
    return {name: cut_into_records(value) if isinstance(value, dict) else _cut(value) for name, value in state.items()}


def _cut(value: Any) -> Any:
    if isinstance(value, ShardedTensor):
        itemsize = value.metadata().tensor_properties.dtype.itemsize
        whole, group = value.metadata().shards_metadata, value._process_group
        blocks = [block for shard in whole for block in _blocks(shard, itemsize)]
        if len(blocks) == len(whole):
            return value
        local = [
            Shard(_rows(shard.tensor, block, shard.metadata.shard_offsets[0]), block)
            for shard in value.local_shards()
            for block in _blocks(shard.metadata, itemsize)
        ]
    else:
        value, group = value.detach(), None
        if value.nbytes <= RECORD_BYTES or value.dim() == 0:
            return value
        blocks = _blocks(ShardMetadata([0] * value.dim(), list(value.shape)), value.itemsize)
        for number, block in enumerate(blocks):
            block.placement = _remote_device(f"rank:{number % world_size()}/{value.device}")
        local = [Shard(_rows(value, block, 0), block) for block in blocks[rank() :: world_size()]]
    metadata = ShardedTensorMetadata(blocks, value.size(), TensorProperties(dtype=value.dtype))
    return ShardedTensor._init_from_local_shards_and_global_metadata(local, metadata, process_group=group)


def _blocks(shard: ShardMetadata, itemsize: int) -> list[ShardMetadata]:
    """Blocks of rows that a shard is written in."""
    (first, *offsets), (count, *sizes) = shard.shard_offsets, shard.shard_sizes
    rows = max(1, RECORD_BYTES // max(1, math.prod(sizes) * itemsize))
    return [
        ShardMetadata([first + start, *offsets], [min(rows, count - start), *sizes], shard.placement)
        for start in range(0, max(1, count), rows)
    ]


def _rows(tensor: Tensor, block: ShardMetadata, first: int) -> Tensor:
    """The rows of a block, of a tensor whose first row is row `first` of the whole."""
    start = block.shard_offsets[0] - first
    return tensor[start : start + block.shard_sizes[0]]


def tensors_of(state: dict[str, Any]) -> Iterator[Tensor]:
    """This rank's tensors of a state: nested dicts of tensors and `ShardedTensor`s."""
    for value in state.values():
        yield from tensors_of(value) if isinstance(value, dict) else local_tensors(value)


def local_tensors(value: Any) -> list[Tensor]:
    """This rank's part of a tensor: each local shard of a `ShardedTensor`, or the tensor itself."""
    return [shard.tensor for shard in value.local_shards()] if isinstance(value, ShardedTensor) else [value]


class RecordPlanner(DefaultSavePlanner):
    """Plans the writing of a state that was cut, and calls `on_record` before each record."""

    def __init__(self, on_record: Callable[[], None]) -> None:
        super().__init__()
        self.on_record = on_record

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """A record's values, which the writer need not copy."""
        self.on_record()
        data = super().resolve_data(write_item)
        # torch.save writes a tensor's whole storage, so that torch's writer copies views; this one has its own.
        return torch.from_dlpack(data.detach()) if isinstance(data, Tensor) and data.is_cpu else data
