"""Runs of steps, validations within an epoch and samples of users: the same on one rank and on two."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from recgpt_torchrec.config import Train
from recgpt_torchrec.data.bags import table_name, tables_of
from recgpt_torchrec.data.dataset import Dataset, Manifest
from recgpt_torchrec.training.building import build
from tests.distributed.training_helpers import (
    CAPACITY,
    ITEMS,
    USERS,
    Case,
    FixedStream,
    gather_table,
    make_batches,
    make_trainer,
)
from tests.support import SMALL, stage, stay_in_group, walks, write_dataset
from tools.ranks import run_ranks

CASE = Case("row_wise", "rowwise_adagrad", "sampled")
WITHIN = Train(steps=9, validate_steps=2)
"""Six steps are an epoch of `FixedStream`: the ninth is within the second."""


def train_given_batches(rank: int, world_size: int, output: str, train: Train) -> dict[str, Any]:
    dataset = Dataset(path="", manifest=Manifest(users=USERS, items=ITEMS))
    device = torch.device("cpu")
    model, optimizer = build(CASE.config, CASE.config.model, dataset, capacity=CAPACITY, device=device)
    stream = FixedStream(make_batches(CASE, rank, world_size), CASE)
    trainer = make_trainer(model, optimizer, stream, output, train=train, warmup_steps=3)
    validated = []

    def validate() -> dict[str, float]:
        validated.append(trainer.progress.step)
        model.eval()
        return {"NDCG@10": 1.0 - abs(trainer.progress.step - 4)}

    trainer.fit(validate)
    tables = {table_name(name): gather_table(value) for name, value in sorted(tables_of(model).items())}
    dense = {name: value.clone() for name, value in model.state_dict().items() if name.startswith("dense.")}
    progress = trainer.progress
    return {
        "tensors": tables | dense if dist.get_rank() == 0 else {},
        "validated": validated,
        "progress": (progress.step, progress.finished, progress.position.epoch, progress.best_step),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("steps")
    plain = Train(steps=9)
    runs = {"one": (1, WITHIN), "two": (2, WITHIN), "two, plain": (2, plain)}
    return {
        name: run_ranks(train_given_batches, world_size, str(folder / name), train)
        for name, (world_size, train) in runs.items()
    }


def test_steps_and_validations_are_the_same_on_every_rank(results: dict[str, list[dict[str, Any]]]) -> None:
    for name, validated in {"one": [2, 4, 6, 8, 9], "two": [2, 4, 6, 8, 9], "two, plain": [6, 9]}.items():
        for result in results[name]:
            assert result["validated"] == validated
            assert result["progress"] == (9, True, 1, 4 if "plain" not in name else 6)


def test_validations_within_an_epoch_change_nothing_on_two_ranks(results: dict[str, list[dict[str, Any]]]) -> None:
    often, plain = (results[name][0]["tensors"] for name in ("two", "two, plain"))
    for name, value in plain.items():
        assert torch.equal(often[name], value), name


def test_a_run_of_steps_is_the_same_on_one_rank_and_on_two(results: dict[str, list[dict[str, Any]]]) -> None:
    one, two = (results[name][0]["tensors"] for name in ("one", "two"))
    assert one.keys() == two.keys() and len(one) > 5
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=2e-4, msg=name)


def run_stages(rank: int, world_size: int, data: str, folder: str) -> None:
    """Train and evaluate on samples; nothing is learned, so that every number of ranks has the same model."""
    stay_in_group()
    still = {"--tables.lr": 0, "--tables.user_lr": 0, "--optimizer.lr": 0, "--train.precision": "fp32"}
    options = {**SMALL, **still, "--train.validate_users": 40, "--train.steps": 5, "--train.validate_steps": 2}
    assert stage("pretrain", {"--data": data, "--output": f"{folder}/run", **options}) == 0
    where = {"--data": data, "--checkpoint": f"{folder}/run", "--output": f"{folder}/test.json"}
    assert stage("evaluate", {**where, "--users": 30, "--recall.interests": 2, "--seed": 3}) == 0


def test_samples_give_the_same_figures_on_one_rank_and_on_two(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_dataset(data, walks(120, 30, shortest=1, longest=14), items=30, rows_per_group=8, groups_per_part=4)
    figures = {}
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        folder.mkdir()
        run_ranks(run_stages, world_size, str(data), str(folder))
        lines = [json.loads(line) for line in (folder / "run/history.jsonl").read_text().splitlines()]
        evaluated = json.loads((folder / "test.json").read_text())
        figures[world_size] = (
            [{name: value for name, value in line.items() if "@" in name} for line in lines],
            evaluated,
        )
        assert evaluated["users"] == 30 and evaluated["sample"] == {"users": 30, "seed": 3}
        assert set(evaluated["groups"]) == set(evaluated["results"])
    (lines, one), (others, two) = figures[1], figures[2]
    assert len(lines) == 3 and all(line == pytest.approx(lines[0], abs=1e-6) for line in (*lines, *others))
    for path, protocols in one["results"].items():
        for how, values in protocols.items():
            assert two["results"][path][how] == pytest.approx(values, abs=1e-6), (path, how)
            for name, groups in one["groups"][path][how].items():
                assert sum(group["users"] for group in groups) == 30
                for ours, theirs in zip(two["groups"][path][how][name], groups, strict=True):
                    assert ours == pytest.approx(theirs, abs=1e-6), (path, how, name)
    rows = [pq.read_table(tmp_path / str(ranks) / "test.users.parquet") for ranks in (1, 2)]
    assert rows[0].num_rows == 30 and rows[0].equals(rows[1])
    assert one["lists"]["users"] == 30
    for path, quality in one["lists"]["paths"].items():
        assert two["lists"]["paths"][path] == pytest.approx(quality), path
    assert one["examples"] == two["examples"] and len(one["examples"]) == 8
    shutil.rmtree(tmp_path)
