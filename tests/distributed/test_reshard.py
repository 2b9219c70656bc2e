"""A checkpoint can be read on any number of ranks and with any sharding.

`tools/check_reshard.py` tries every pair on one node.
"""

from typing import Any

import pytest
from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata

from recgpt_torchrec.checkpoints import records
from recgpt_torchrec.checkpoints.folder import Checkpoints
from tools.check_reshard import is_wrong
from tools.ranks import run_ranks
from tools.reshard import Difference, Layout, output_folder, reshard

RECORD_BYTES = 600
"""Of a record: a table of 29 items takes five, one rank's third of it two, a matrix of the decoder fifteen. Each record
is a file format of its own to torch, so ten times as many take most of the time of this test."""

# Each sharding is a source and a target, on more ranks and on fewer, under each kind of optimizer state: one moment per
# row, one per number, two of them updated by torch (Adam on CPU), none.
SOURCES = [
    Layout(2, "data_parallel", "rowwise_adagrad"),
    Layout(2, "table_wise", "rowwise_adagrad"),
    Layout(2, "column_wise", "rowwise_adagrad"),
    Layout(3, "column_wise", "rowwise_adagrad"),
    Layout(3, "row_wise", "rowwise_adagrad"),
    Layout(2, "column_wise", "adagrad"),
    Layout(2, "data_parallel", "adam"),
    Layout(3, "row_wise", "adam"),
    Layout(2, "data_parallel", "sgd"),
    Layout(4, "table_row_wise", "rowwise_adagrad", nodes=2),
    Layout(4, "grid", "rowwise_adagrad", nodes=2),
    Layout(4, "grid", "adagrad", nodes=2),
    Layout(4, "grid", "adam", nodes=2),
    Layout(4, "row_wise", "rowwise_adagrad", shard_ranks=2),
    Layout(2, "row_wise", "rowwise_adagrad", precision="fp16"),
    Layout(2, "column_wise", "adagrad", precision="fp16"),
]
TARGETS = [
    Layout(1, "row_wise", "rowwise_adagrad"),
    Layout(2, "data_parallel", "rowwise_adagrad"),
    Layout(2, "column_wise", "rowwise_adagrad"),
    Layout(3, "table_wise", "rowwise_adagrad"),
    Layout(3, "column_wise", "rowwise_adagrad"),
    Layout(3, "row_wise", "adagrad"),
    Layout(1, "data_parallel", "adam"),
    Layout(2, "column_wise", "adam"),
    Layout(2, "table_wise", "adam"),
    Layout(2, "row_wise", "sgd"),
    Layout(4, "table_row_wise", "rowwise_adagrad", nodes=2),
    Layout(4, "table_row_wise", "adam", nodes=2),
    Layout(4, "grid", "rowwise_adagrad", nodes=2),
    Layout(4, "grid", "adagrad", nodes=2),
    Layout(4, "row_wise", "rowwise_adagrad", shard_ranks=2),
    Layout(4, "table_wise", "adam", shard_ranks=2),
    Layout(3, "row_wise", "rowwise_adagrad", precision="fp16"),
    Layout(2, "table_wise", "adagrad", precision="fp16"),
    Layout(2, "table_wise", "sgd", precision="fp16"),
]


def reshard_in_small_records(rank: int, world_size: int, *arguments: Any) -> list[Difference]:
    records.RECORD_BYTES = RECORD_BYTES
    return reshard(rank, world_size, *arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("reshard"))


@pytest.fixture(scope="module")
def differences(folder) -> list[Difference]:
    return run_ranks(reshard_in_small_records, 4, folder, SOURCES, TARGETS, timeout=240)[0]


def test_tables_optimizer_state_and_next_losses_are_those_that_were_saved(differences):
    pairs = {(d.source, d.target) for d in differences}
    assert pairs == {(s, t) for s in SOURCES for t in TARGETS if s.optimizer == t.optimizer}
    assert not [d for d in differences if is_wrong(d)]


def test_row_wise_adagrad_resumes_slightly_differently_only_where_column_blocks_change(differences):
    """The state is a mean over the columns of a block; the means of other blocks cannot be recovered from it."""
    changed = [
        d
        for d in differences
        if d.source.blocks() != d.target.blocks() and not d.source.shard_ranks and not d.target.shard_ranks
    ]
    assert {(d.source.blocks(), d.target.blocks()) for d in changed} >= {(1, 2), (2, 1), (2, 3), (3, 2), (3, 1)}
    for difference in changed:
        assert difference.losses[0] < 1e-5 < difference.losses[1] < 5e-3, difference


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_every_record_holds_at_most_so_many_bytes(differences, folder, source):
    path = Checkpoints(output_folder(folder, source), keep=1).latest()
    assert path is not None
    several = 0
    for name, tensor in FileSystemReader(path).read_metadata().state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)
        itemsize = tensor.properties.dtype.itemsize
        sizes = [chunk.sizes.numel() * itemsize for chunk in tensor.chunks]
        assert all(size <= RECORD_BYTES for size in sizes if size > tensor.size[1:].numel() * itemsize)  # one row
        assert sum(sizes) == tensor.size.numel() * itemsize, name
        several += len(sizes) > source.ranks
    assert several >= 2  # the tables, and the decoder's parameters that all ranks have
