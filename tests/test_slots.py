"""Days whose ids are slots of a table of fixed size: training from day to day, export, and what is refused."""

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from recgpt_torchrec.distributed.initial_values import fill_shard, key_of
from tests.preparation.test_ids import MANAGED, growing_log, prepare_days, write_days
from tests.support import SMALL, stage
from tests.test_pretrain import checkpoints, tensors
from tools.ranks import run_ranks

OPTIONS = {**SMALL, "--loss.candidates": "all", "--saving.every_steps": 4, "--saving.keep": 100, "--seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three days in managed tables, the run of the first one, and that of the second, which begins from it."""
    folder = tmp_path_factory.mktemp("slots")
    prepare_days(folder, 3, write_days(folder, 3), **MANAGED)
    assert stage("pretrain", {"--data": folder / "data0", "--output": folder / "run0", **OPTIONS}) == 0
    assert stage("pretrain", run_options(folder, 1)) == 0
    return folder


def run_options(folder: Path, day: int, **more: Any) -> dict[str, Any]:
    options = {"--data": folder / f"data{day}", "--output": folder / f"run{day}", "--initial": folder / "run0"}
    return {**options, **OPTIONS, **{f"--{name}": value for name, value in more.items()}}


@pytest.mark.parametrize("day", [1, 2])
def test_rows_of_other_keys_begin_anew_and_all_others_go_on(folder, tmp_path, day):
    """Nothing is learned, so that the checkpoint holds what the run started from: of the day before, or two before."""
    still = {"optimizer.lr": 1e-30, "tables.lr": 1e-30, "tables.user_lr": 1e-30, "train.steps": 1, "train.epochs": None}
    assert stage("pretrain", run_options(folder, day, output=tmp_path / "run", **still)) == 0
    before = tensors(Path(json.loads((tmp_path / "run/run.json").read_text())["initial"]))
    after = tensors(checkpoints(tmp_path / "run")[-1])
    (name,) = [name for name in after if name.endswith("item.weight") and name.startswith("model.")]
    old, new = (pq.read_table(folder / f"data{each}" / "items")["key"].to_pylist() for each in (0, day))
    initial = torch.zeros(after[name].shape)
    fill_shard(initial, 0, 0, std=0.02, key=key_of(3, "item"))
    kinds = set()
    for slot, key in enumerate(new):
        is_kept = slot < len(old) and old[slot] == key
        torch.testing.assert_close(after[name][slot], before[name][slot] if is_kept else initial[slot], rtol=0, atol=0)
        kinds.add((is_kept, slot < len(old)))
    assert kinds == {(True, True), (False, True), (False, False)}


def test_a_stopped_run_resumes_to_the_same_end(folder, tmp_path):
    stopped = checkpoints(folder / "run1")[0]
    shutil.copytree(stopped, tmp_path / "run1/checkpoints" / stopped.name)
    shutil.copy(folder / "run1/run.json", tmp_path / "run1")
    assert stage("pretrain", run_options(folder, 1, output=tmp_path / "run1")) == 0
    mine, theirs = (tensors(checkpoints(run)[-1]) for run in (tmp_path / "run1", folder / "run1"))
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-5, atol=1e-6, msg=name)


def start_on_rank(rank: int, world_size: int, port: int, options: dict[str, Any]) -> int:
    dist.destroy_process_group()  # the stage joins its own
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return stage("pretrain", options)


def test_two_ranks_start_from_the_same_rows(folder, tmp_path):
    still = {"optimizer.lr": 1e-30, "tables.lr": 1e-30, "tables.user_lr": 1e-30, "train.steps": 1, "train.epochs": None}
    options = run_options(folder, 1, output=tmp_path / "two", **still, **{"tables.sharding": "row_wise"})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert run_ranks(start_on_rank, 2, port, options, timeout=120) == [0, 0]
    assert stage("pretrain", run_options(folder, 1, output=tmp_path / "one", **still)) == 0
    two, one = (tensors(checkpoints(tmp_path / name)[-1]) for name in ("two", "one"))
    for name in one:
        if name.startswith("model.") and "embedding_bags" in name:
            torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-20, msg=name)  # rows of zeros move by lr


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("evaluate", {"--data": "data1", "--checkpoint": "run0", "--output": "x.json"}, "rows of items belong"),
        ("pretrain", {"--data": "data0", "--initial": "run1", "--output": "x"}, "whose ids mean other items"),
        (
            "export",
            {"--data": "data1", "--checkpoint": "run1", "--output": "x", "--since": "export0"},
            "a delta cannot",
        ),
    ],
)
def test_what_is_refused(name, options, message, folder, tmp_path, capsys):
    if name == "export":
        made = {"--data": folder / "data0", "--checkpoint": folder / "run0", "--output": folder / "export0"}
        assert stage("export", made) == 0
    here = {key: folder / value if value[0] != "x" else tmp_path / value for key, value in options.items()}
    assert stage(name, {**here, **(OPTIONS if name == "pretrain" else {})}) == 2
    assert message in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_an_export_of_hashed_items_says_which_keys_share_vectors(tmp_path, capsys):
    (data,) = prepare_days(tmp_path, 1, ids="hash", item_rows=20)
    assert stage("pretrain", {"--data": data, "--output": tmp_path / "run", **OPTIONS}) == 0
    capsys.readouterr()
    made = {"--data": data, "--checkpoint": tmp_path / "run", "--output": tmp_path / "export"}
    assert stage("export", made) == 0
    items = pq.read_table(data / "items").to_pydict()
    shared = sum(keys > 1 for keys in items["keys"])
    said = capsys.readouterr().out
    assert f"{shared} item vectors belong to several keys each ({sum(items['keys'])} keys" in said
    assert pq.read_table(tmp_path / "export/items")["key"].to_pylist() == items["key"]
    assert {row[1] for row in growing_log(1)} == {*pq.read_table(data / "item_keys")["key"].to_pylist()}
