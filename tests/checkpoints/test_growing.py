"""Tables that grow between two runs: old rows keep their optimizer state, new rows are initial, and so are the rows
that are reset."""

import contextlib
import io
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from recgpt_torchrec.checkpoints.folder import Checkpoints
from recgpt_torchrec.checkpoints.reassigning import reset_rows
from recgpt_torchrec.checkpoints.state import restore
from recgpt_torchrec.config import Tables
from recgpt_torchrec.distributed.initial_values import fill_shard, initialise_tables, key_of
from recgpt_torchrec.distributed.processes import silence_libraries
from tools import reshard
from tools.ranks import run_ranks
from tools.reshard import DIM, ITEMS, STEPS, USERS, Layout

MORE_USERS, MORE_ITEMS = 3 * USERS + 1, 2 * ITEMS + 13
"""Enough that, row-wise on two ranks, the second holds no old row."""

SOURCES = [
    Layout(1, "data_parallel", "rowwise_adagrad"),
    Layout(2, "row_wise", "rowwise_adagrad"),
    Layout(2, "column_wise", "rowwise_adagrad"),
    Layout(2, "table_wise", "rowwise_adagrad"),
    Layout(1, "row_wise", "adagrad"),
    Layout(1, "data_parallel", "adam"),
]
TARGETS = [
    Layout(1, "table_wise", "rowwise_adagrad"),
    Layout(2, "data_parallel", "rowwise_adagrad"),
    Layout(2, "row_wise", "rowwise_adagrad"),
    Layout(2, "column_wise", "rowwise_adagrad"),
    Layout(2, "column_wise", "adagrad"),
    Layout(2, "row_wise", "adam"),
]


def initial_rows(name: str, rows: int) -> torch.Tensor:
    """Initial values of a whole table: users 0, items N(0, 0.02^2), drawn at once."""
    table = torch.zeros(rows, DIM)
    if ".user." not in name:
        fill_shard(table, 0, 0, std=0.02, key=key_of(7, "item"))
    return table


def expected_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Expected initial tensors of a run on more users and items, from all tensors of the checkpoint."""
    names = [key.removeprefix("model.") for key in state if "embedding_bags" in key and key.startswith("model.")]
    expected = dict(state)
    for name in names:
        rows = MORE_USERS if ".user." in name else MORE_ITEMS
        old = state[f"model.{name}"]
        expected[f"model.{name}"] = torch.cat([old, initial_rows(name, rows)[len(old) :]])
        for key in [key for key in state if key.startswith(f"optimizer.state.{name}.")]:
            moment = state[key]
            expected[key] = torch.cat([moment, torch.zeros(rows - len(moment), moment.shape[1])])
    return expected


RESET = {"user": [[0, 5, MORE_USERS - 1]], "item": [[1, 2], [], [ITEMS - 1, ITEMS, MORE_ITEMS - 1]]}
"""Rows to reset, in blocks: of both ranks' shards, restored and new."""


def state_after_reset(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The expected tensors once the rows of `RESET` begin anew, from all tensors before."""
    expected = {key: value.clone() for key, value in state.items()}
    for key, value in expected.items():
        for table, blocks in RESET.items():
            if f"embedding_bags.{table}." in key:
                rows = [row for block in blocks for row in block]
                is_moment = key.startswith("optimizer.")
                value[rows] = 0 if is_moment else initial_rows(key, len(value))[rows]
    return expected


def reset(model: Any, optimizer: Any) -> None:
    rows = {
        table: lambda blocks=blocks: (np.array(each, np.int64) for each in blocks) for table, blocks in RESET.items()
    }
    counts = reset_rows(model, optimizer, rows, Tables().init_std_of, 7)
    assert counts == {table: sum(map(len, blocks)) for table, blocks in RESET.items()}


def restore_into_larger_tables(rank: int, world_size: int, folder: str) -> list[tuple[Layout, Layout, str]]:
    """Train and save each source, and restore it into larger tables of each target layout of the same optimizer."""
    silence_libraries()
    dist.destroy_process_group()
    for count in (2, 1):
        with reshard.group(rank, world_size, count, folder) as member:
            for source in SOURCES if member else ():
                if source.ranks == count:
                    reshard.train_and_save(source, folder)
    restored = []
    for count in (2, 1):
        with reshard.group(rank, world_size, count, folder) as member:
            for target in TARGETS if member else ():
                for source in SOURCES if target.ranks == count else ():
                    if source.optimizer == target.optimizer:
                        restored += check_restored(source, target, folder)
    return restored


def fused_steps(optimizer: Any) -> Iterator[torch.Tensor]:
    """Step counters in fbgemm of the tables that this rank updates in the backward pass; its Adam needs them."""
    for _, part in getattr(optimizer, "optimizers", []):
        yield from fused_steps(part)
    if hasattr(optimizer, "_emb_module"):
        yield optimizer._emb_module.iter[0]


def check_restored(source: Layout, target: Layout, folder: str) -> list[tuple[Layout, Layout, str]]:
    model, optimizer = reshard.build_model(target, MORE_USERS, MORE_ITEMS, restored=True)
    path = Checkpoints(reshard.output_folder(folder, source), keep=1).latest()
    assert path is not None
    with contextlib.redirect_stdout(io.StringIO()):  # restore prints which column blocks change
        restore(model, optimizer, path, STEPS, partial(initialise_tables, model, Tables().init_std_of, 7))
    kinds = set()
    state = expected_state(reshard.load_tensors(folder, source))
    for kind, value, expected in reshard.pairs_to_compare(model, optimizer, state):
        same = torch.allclose if kind == "moments" and source.blocks() != target.blocks() else torch.equal
        assert value.shape == expected.shape and same(value, expected), (source, target, kind)
        kinds.add(kind)
    reset(model, optimizer)
    for kind, value, expected in reshard.pairs_to_compare(model, optimizer, state_after_reset(state)):
        same = torch.allclose if kind == "moments" and source.blocks() != target.blocks() else torch.equal
        assert value.shape == expected.shape and same(value, expected), (source, target, kind, "reset")
    counted: list[Any] = [state["step"] for state in optimizer.state.values() if "step" in state]
    fused = list(fused_steps(optimizer))
    assert counted and all(float(step) == STEPS for step in (*counted, *fused))
    assert fused or target.sharding in ("data_parallel", "table_wise") or target.optimizer == "adam"
    assert all(np.isfinite(reshard.train_steps(model, optimizer, range(STEPS, STEPS + 2))))
    return [(source, target, kind) for kind in kinds]


@pytest.fixture(scope="module")
def restored(tmp_path_factory) -> list[list[tuple[Layout, Layout, str]]]:
    return run_ranks(restore_into_larger_tables, 2, str(tmp_path_factory.mktemp("growing")), timeout=150)


def test_old_rows_and_their_optimizer_state_are_bit_equal_and_new_rows_are_initial(restored):
    pairs = {(s, t) for s in SOURCES for t in TARGETS if s.optimizer == t.optimizer}
    for kind in ("tables", "moments", "dense"):
        assert {(s, t) for s, t, found in restored[0] if found == kind} == pairs
    assert {t.ranks for _, t, _ in restored[1]} == {2}
