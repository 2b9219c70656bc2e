"""Records are views of the state of bounded size, written without a copy; where memory is short, none is made."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from recgpt_torchrec.checkpoints import records, saving
from recgpt_torchrec.checkpoints.folder import Checkpoints
from recgpt_torchrec.checkpoints.records import RecordPlanner, cut_into_records, local_tensors
from recgpt_torchrec.checkpoints.saving import Saver
from recgpt_torchrec.checkpoints.state import state_of
from recgpt_torchrec.config import Saving
from recgpt_torchrec.distributed import memory
from recgpt_torchrec.distributed.processes import silence_libraries
from tools.ranks import run_ranks
from tools.reshard import Layout, build_model


def cut_views(rank: int, world_size: int) -> None:
    silence_libraries()
    records.RECORD_BYTES = 100
    model, optimizer = build_model(Layout(world_size, "column_wise", "rowwise_adagrad"))
    state = state_of(model, optimizer)
    cut = cut_into_records(state)
    dense = "dense.decoder.position.weight"
    own = state["model"][dense]
    moments = {
        (name, kind): (value, cut["optimizer"]["state"][name][kind])
        for name, kinds in state["optimizer"]["state"].items()
        for kind, value in kinds.items()
    }
    tables = {name: (value, cut["model"][name]) for name, value in state["model"].items()}
    sharded = [pair for pair in [*tables.values(), *moments.values()] if isinstance(pair[0], ShardedTensor)]
    assert len(sharded) == 4, "two tables and their moments"
    for value, parts in sharded:
        assert torch.equal(torch.cat(local_tensors(parts)), torch.cat(local_tensors(value)))
        storages = {shard.untyped_storage().data_ptr() for shard in local_tensors(value)}
        assert {part.untyped_storage().data_ptr() for part in local_tensors(parts)} == storages
        assert all(part.nbytes <= 100 for part in local_tensors(parts))
    # Of what all ranks have, each writes every other block.
    blocks = [shard.metadata.shard_offsets[0] for shard in cut["model"][dense].local_shards()]
    assert blocks == list(range(rank, own.shape[0], 2))
    for shard in cut["model"][dense].local_shards():
        assert shard.tensor.data_ptr() == own[shard.metadata.shard_offsets[0]].data_ptr()

    # What is given to the writer is the memory itself, in a storage that holds no more.
    planner = RecordPlanner(lambda: None)
    planner.set_up_planner({"position": cut["model"][dense]}, is_coordinator=rank == 0)
    for item in planner.create_local_plan().items:
        index: MetadataIndex = item.index
        data: Any = planner.resolve_data(item)
        assert index.offset is not None and data.data_ptr() == own[index.offset[0]].data_ptr()
        assert data.untyped_storage().nbytes() == data.nbytes <= 100


def test_records_share_the_memory_of_the_state():
    run_ranks(cut_views, 2)


def save_with_little_memory(
    rank: int, world_size: int, folder: str
) -> tuple[list[bool], dict[str, torch.Tensor], list[str]]:
    """Whether there are copies, on each of two savers: the second's ranks lack memory together. And what they say."""
    silence_libraries()
    said: list[str] = []
    saving.log_message = said.append  # type: ignore[assignment]
    state = {"table": torch.arange(1000.0)}
    copied = []
    for name, spare in (("enough", 4000 / 0.9 + 1), ("little", 4000 / 0.9 - 1)):
        memory.available_bytes = Mock(return_value=int(spare))
        with Saver(Checkpoints(f"{folder}/{name}", keep=1), Saving()) as saver:
            saver.prepare(state)
            saver.save(1, state, {})
            copied.append(bool(saver._copies))
            dist.barrier()
    read = {"table": torch.zeros(1000)}
    dcp.load(read, checkpoint_id=f"{folder}/little/checkpoints/step-00000001")
    return copied, read, said


def test_without_memory_for_a_copy_training_waits_for_the_checkpoint(tmp_path):
    for copied, read, (said,) in run_ranks(save_with_little_memory, 2, str(tmp_path)):
        assert copied == [True, False]
        assert torch.equal(read["table"], torch.arange(1000.0))
        assert "Saving as with --saving.asynchronous false" in said
        assert "need 8,888 bytes of host memory" in said and "8,886 are available" in said
    assert Path(tmp_path / "little/checkpoints/step-00000001/checkpoint.json").exists()


@pytest.mark.parametrize("shape", [(), (0,), (0, 8), (1, 500), (7, 8)])
def test_a_tensor_of_any_shape_is_written_and_read(tmp_path, monkeypatch, shape):
    monkeypatch.setattr(records, "RECORD_BYTES", 64)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        value = torch.arange(float(torch.Size(shape).numel())).view(shape)
        with Saver(Checkpoints(str(tmp_path), keep=1), Saving()) as saver:
            saver.save(1, {"value": value}, {})
        read = {"value": torch.full(shape, torch.nan)}
        dcp.load(read, checkpoint_id=Checkpoints(str(tmp_path), keep=1).latest())
    finally:
        dist.destroy_process_group()
    assert torch.equal(read["value"], value)
