"""Checkpoints of versions in which each table was a collection of its own are restored like any other."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from recgpt_torchrec.checkpoints.folder import Checkpoints, read_tensor_metadata
from recgpt_torchrec.checkpoints.names import current_name
from recgpt_torchrec.checkpoints.state import restore
from tools.ranks import run_ranks
from tools.reshard import STEPS, Layout, build_model, output_folder, train_and_save, train_steps

BEFORE = {f"tables.embedding_bags.{table}.": f"{table}_table.embedding_bags.{table}." for table in ("user", "item")}
LAYOUTS = [
    Layout(2, "row_wise", "rowwise_adagrad"),
    Layout(2, "column_wise", "rowwise_adagrad"),
    Layout(2, "table_wise", "adagrad"),
    Layout(2, "data_parallel", "adam"),
]


def rename_back(checkpoint: str) -> list[str]:
    """Give the tensors of a checkpoint the names that they had before; returns these."""

    def before(name: str) -> str:
        for new, old in BEFORE.items():
            name = name.replace(new, old)
        return name

    metadata: Any = dcp.FileSystemReader(checkpoint).read_metadata()
    metadata.state_dict_metadata = {before(name): value for name, value in metadata.state_dict_metadata.items()}
    for index in list(metadata.storage_data):
        place = metadata.storage_data.pop(index)
        object.__setattr__(index, "fqn", before(index.fqn))
        metadata.storage_data[index] = place
    metadata.planner_data = None
    Path(checkpoint, ".metadata").write_bytes(pickle.dumps(metadata))
    return list(metadata.state_dict_metadata)


def losses_after(rank: int, world_size: int, folder: str) -> list[tuple[list[float], list[float], list[str]]]:
    """By layout, the losses of two steps after saving and after restoring; and the names in the checkpoint."""
    results = []
    for layout in LAYOUTS:
        saved = train_and_save(layout, folder)
        path = Checkpoints(output_folder(folder, layout), keep=1).latest()
        assert path is not None
        names = rename_back(path) if rank == 0 else []
        dist.barrier()
        model, optimizer = build_model(layout)
        restore(model, optimizer, path, STEPS)
        results.append((saved, train_steps(model, optimizer, range(STEPS, STEPS + 2)), names))
        expected = {*map(current_name, names)} if rank == 0 else {*read_tensor_metadata(path)}
        assert {*read_tensor_metadata(path)} == expected
    return results


def test_a_run_of_an_earlier_version_resumes_with_its_tables_and_their_optimizer_state(tmp_path):
    for layout, (saved, restored, names) in zip(LAYOUTS, run_ranks(losses_after, 2, str(tmp_path))[0], strict=True):
        assert "model.item_table.embedding_bags.item.weight" in names
        assert any(name.startswith("optimizer.state.user_table.embedding_bags.user.weight.") for name in names)
        assert not [name for name in names if "tables." in name]
        assert restored == pytest.approx(saved, rel=1e-6), layout


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("model.output_table.embedding_bags.output.weight", "model.tables.embedding_bags.output.weight"),
        (
            "optimizer.state.item_table.embedding_bags.item.weight.sum",
            "optimizer.state.tables.embedding_bags.item.weight.sum",
        ),
        ("model.tables.embedding_bags.user.weight", "model.tables.embedding_bags.user.weight"),
        ("model.dense.decoder.position.weight", "model.dense.decoder.position.weight"),
        ("other.item_table.embedding_bags.item.weight", "other.item_table.embedding_bags.item.weight"),
        ("model.dense.item_table.weight", "model.dense.item_table.weight"),
    ],
)
def test_names_of_before_and_now(before, now):
    assert current_name(before) == now
