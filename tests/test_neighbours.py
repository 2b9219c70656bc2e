"""find_neighbours, and training with what it finds: resumed, with loader processes, on ranks, prompts and days."""

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from recgpt_torchrec.config import Neighbours, Plan, TrainingBatch
from recgpt_torchrec.distributed import shared_folder
from recgpt_torchrec.planning.report import Estimate
from tests.preparation.prepare_helpers import make, random_log, write_csv
from tests.preparation.test_append import append_day
from tests.support import SMALL, change_json, read_epochs, stage, walks, write_dataset
from tests.test_pretrain import checkpoints, tensors
from tools.ranks import run_ranks

USERS, ITEMS = 40, 30
TRAIN = {
    **SMALL,
    "--loss.candidates": "all",
    "--saving.every_steps": 2,
    "--saving.keep": 100,
    "--train.epochs": 1,
    "--train.precision": "fp32",
}


def folders_of(folder: Path) -> dict[str, Path]:
    return {"--data": folder / "data", "--neighbours.path": folder / "neighbours"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A dataset, its neighbours and a run with them."""
    folder = tmp_path_factory.mktemp("neighbours")
    write_dataset(folder / "data", walks(USERS, ITEMS, shortest=4, longest=14), items=ITEMS)
    assert stage("find_neighbours", {"--data": folder / "data", "--output": folder / "neighbours"}) == 0
    assert stage("pretrain", {**folders_of(folder), "--output": folder / "run", **TRAIN}) == 0
    return folder


def assert_same(one: Path, other: Path) -> None:
    mine, theirs = (tensors(checkpoints(each)[-1]) for each in (one, other))
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_a_resumed_run_is_the_same(folder, tmp_path):
    half = tmp_path / "half"
    (half / "checkpoints").mkdir(parents=True)
    shutil.copy(folder / "run" / "run.json", half)
    shutil.copytree(checkpoints(folder / "run")[0], half / "checkpoints" / checkpoints(folder / "run")[0].name)
    assert len(checkpoints(folder / "run")) > 1
    assert stage("pretrain", {**folders_of(folder), "--output": half, **TRAIN}) == 0
    assert_same(half, folder / "run")


def test_a_loader_process_that_maps_a_large_table_trains_as_one_with_a_copy(folder, tmp_path, monkeypatch):
    options = {**folders_of(folder), **TRAIN, "--stream.workers": 1}
    assert stage("pretrain", {**options, "--output": tmp_path / "copied"}) == 0
    monkeypatch.setattr(shared_folder, "IN_MEMORY", 0)  # as if the table were large, it lies in a file
    assert stage("pretrain", {**options, "--output": tmp_path / "mapped"}) == 0
    assert_same(tmp_path / "mapped", tmp_path / "copied")


def test_a_share_of_nothing_is_training_without_neighbours_and_another_is_not(folder, tmp_path):
    options = {**TRAIN, "--data": folder / "data"}
    assert stage("pretrain", {**options, "--output": tmp_path / "without"}) == 0
    options |= {"--neighbours.path": folder / "neighbours", "--neighbours.share": 0}
    assert stage("pretrain", {**options, "--output": tmp_path / "none"}) == 0
    losses = [read_epochs(each)[0]["loss"] for each in (tmp_path / "none", tmp_path / "without", folder / "run")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[2] != pytest.approx(losses[1], rel=1e-3)


def train_on_rank(rank: int, world_size: int, port: int, folder: str, output: str) -> int:
    dist.destroy_process_group()  # the stage joins its own
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return stage("pretrain", {**folders_of(Path(folder)), "--output": output, **ONE_STEP})


ONE_STEP = {
    **TRAIN,
    "--batch.tokens": 2000,
    "--batch.thinning": 0,
    "--model.dropout": 0,
    "--model.attention_dropout": 0,
    "--model.user_dropout": 0,
    "--train.epochs": 2,
}
"""All of an epoch is one step, on any number of ranks."""


def test_two_ranks_have_the_losses_of_one(folder, tmp_path):
    assert stage("pretrain", {**folders_of(folder), "--output": tmp_path / "one", **ONE_STEP}) == 0
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert run_ranks(train_on_rank, 2, port, str(folder), str(tmp_path / "two")) == [0, 0]
    one, two = ([epoch["loss"] for epoch in read_epochs(tmp_path / name)] for name in ("one", "two"))
    assert len(one) == 2 and two == pytest.approx(one, rel=1e-4)


def test_prompts_are_tuned_on_with_neighbours_of_the_plain_dataset_and_those_of_both_are_the_same(folder, tmp_path):
    inputs = {"--data": folder / "data", "--checkpoint": folder / "run", "--output": tmp_path / "prompts"}
    assert stage("generate_prompts", {**inputs, "--prompts.k": 1, "--prompts.answers": 3}) == 0
    assert stage("find_neighbours", {"--data": tmp_path / "prompts", "--output": tmp_path / "again"}) == 0
    one, other = (
        json.loads((path / "manifest.json").read_text())["parts"]
        for path in (folder / "neighbours", tmp_path / "again")
    )
    assert [each["checksum"] for each in one] == [each["checksum"] for each in other]
    tune = {"--data": tmp_path / "prompts", "--checkpoint": folder / "run", "--batch.tokens": 60, "--train.epochs": 1}
    tune |= {"--loss.candidates": "all", "--optimizer.warmup_steps": 2, "--tuning.soft_targets": 0.2}
    losses = []
    for name, more in [("plain", {}), ("with", {"--neighbours.path": folder / "neighbours"})]:
        assert stage("prompt_tune", {**tune, **more, "--output": tmp_path / name}) == 0
        losses.append(read_epochs(tmp_path / name)[-1]["loss"])
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_neighbours_of_an_earlier_day_go_with_a_later_one(tmp_path):
    log = sorted(random_log(500, users=30, items=40), key=lambda row: row[2])
    parts = [log[:300], log[300:]]
    for number, rows in enumerate(parts, 1):
        append_day(tmp_path, rows, number, hold_out="none", history=12)
        if number == 1:
            assert stage("find_neighbours", {"--data": tmp_path / "data", "--output": tmp_path / "found"}) == 0
    options = {**TRAIN, "--neighbours.path": tmp_path / "found"}
    assert stage("pretrain", {"--data": tmp_path / "data", "--output": tmp_path / "run", **options}) == 0

    make(write_csv(tmp_path / "first.csv", log[:300]), tmp_path / "first")
    make(
        write_csv(tmp_path / "all.csv", [*log, ("new", "newer", 10**6)]),
        tmp_path / "all",
        vocabulary=str(tmp_path / "first"),
    )
    assert stage("find_neighbours", {"--data": tmp_path / "first", "--output": tmp_path / "of_first"}) == 0
    options = {**TRAIN, "--neighbours.path": tmp_path / "of_first"}
    assert stage("pretrain", {"--data": tmp_path / "all", "--output": tmp_path / "run of all", **options}) == 0


def test_what_cannot_be_used_is_refused_before_anything_is_written(folder, tmp_path, capfd):
    shutil.copytree(folder / "neighbours", tmp_path / "damaged")
    change_json(tmp_path / "damaged" / "manifest.json", lambda values: values.update(count=0))
    options = {**folders_of(folder), "--output": tmp_path / "run", **TRAIN}
    for changed, message in [
        ({"--neighbours.path": tmp_path / "damaged"}, "count is 0"),
        ({"--neighbours.path": folder / "data"}, "something other than a neighbours folder"),
        ({"--neighbours.path": tmp_path / "none"}, "is not a neighbours folder"),
        ({"--loss.candidates": "bce"}, "bce has no softmax"),
    ]:
        assert stage("pretrain", {**options, **changed}) == 2
        shown = capfd.readouterr().err
        assert message in shown and "Traceback" not in shown
        assert not (tmp_path / "run").exists()


def test_a_plan_counts_the_table_and_the_answers(folder):
    options: dict[str, Any] = {"data": str(folder / "data"), "items": 10**5, "gpu": "cpu", "gpus": 2}
    options |= {"peak": 0.1, "hbm_bandwidth": 10.0, "batch": TrainingBatch(tokens=512)}
    without = Estimate.of(Plan(**options))
    given = Estimate.of(Plan(**options, neighbours=Neighbours(path=str(folder / "neighbours"), answers=3)))
    sizes = {item.name: item.device for item in given.memory.items}
    assert sizes["neighbours"] == 8 * 20 * 10**5 and "neighbours" not in {each.name for each in without.memory.items}
    assert given.workload.distinct_items == without.workload.distinct_items + 3 * 512
    large = Estimate.of(Plan(**{**options, "items": 10**6}, neighbours=Neighbours(path=str(folder / "neighbours"))))
    (item,) = (each for each in large.memory.items if each.name == "neighbours")
    assert item.device == item.host == 0 and "a file that each node's ranks map" in item.note
