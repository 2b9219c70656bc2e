"""The program plan: what it prints, what it reads, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest

from recgpt_torchrec.errors import REFUSED
from tests.support import stage, write_dataset

CONFIGS = Path(__file__).parents[1] / "configs"
LARGE = {"--items": "1e8", "--users": "1e9", "--nodes": 8, "--gpus": 8}


def report(capsys: Any, options: dict[str, Any]) -> str:
    assert stage("plan", options) == 0
    return str(capsys.readouterr().out)


def test_it_prints_sharding_memory_traffic_time_and_the_smallest_cluster(capsys: Any) -> None:
    said = report(capsys, {**LARGE, "--interactions": "1e10"})
    first = said.splitlines()[0]
    assert first == "100,000,000 items, 1,000,000,000 users on 64 ranks (8 x 8)"
    for heading in ("Sharding", "Memory of the fullest rank", "Sent per step", "Estimated time", "Smallest cluster"):
        assert f"\n{heading}" in said
    assert "user   1,000,000,000 x 64" in said and "Fits: " in said
    assert "An epoch of 10,000,000,000 interactions has 8,583 steps" in said  # 9e9 targets / (64 x 16,384)
    assert max(map(len, said.splitlines())) <= 160


def test_a_file_of_pretrains_options_is_read(capsys: Any) -> None:
    said = report(capsys, {"--config": CONFIGS / "gpu_large.yaml", "--items": "1e6", "--users": "1e6"})
    assert "dim 512, 8 layers" in said and "65,536 tokens per rank" in said


def test_the_sizes_of_a_dataset_are_taken(tmp_path: Path, capsys: Any) -> None:
    write_dataset(tmp_path, [[1, 2, 3, 4, 5]] * 20, items=30)
    said = report(capsys, {"--data": tmp_path, "--gpu": "cpu", "--gpus": 1, "--peak": 0.1, "--hbm_bandwidth": 10})
    assert said.startswith("30 items, 20 users on 1 ranks (1 x 1)") and "Sent per step: nothing, on one rank" in said
    assert "An epoch of 100 interactions" in said


def test_what_does_not_fit_is_said(capsys: Any) -> None:
    said = report(capsys, {"--items": "1e9", "--users": "1e3", "--gpus": 1, "--gpu": "l4", "--memory": 64})
    assert "DOES NOT FIT: " in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--gpus": 0}, "--gpus is 0; it must be from 1 to 64"),
        ({"--nodes": 0}, "--nodes is 0; it must be from 1 to 4096"),
        ({"--items": 0}, "--items is 0; it must be at least 1"),
        ({"--items": "1e18"}, "--items is 1000000000000000000; it must be at most 2^40"),
        ({"--items": 1.5}, "--items is 1.5; it must be a whole number or null"),
        ({"--users": None}, "--users must be given, or --data DIR to take it from a dataset"),
        ({"--gpu": "k80"}, "--gpu is k80; it must be one of h100, h200, b200, a100, l4, cpu"),
        ({"--device": "cpu"}, "--device cpu contradicts --gpu h100; leave --device out"),
        ({"--batch.tokens": 10}, "--batch.tokens 10 is less than --model.max_len 50"),
        ({"--data": "nowhere"}, "nowhere is not a dataset"),
        ({"--tables.sharding": "column_wise"}, "table"),
        ({"--gpu": "cpu", "--tables.kernel": "uvm"}, "needs CUDA"),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_line(options: Any, message: str, capsys: Any) -> None:
    assert stage("plan", {**LARGE, **options}) == REFUSED
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and said.out == ""


def test_a_table_that_cannot_be_sharded_is_named_with_what_would_fit(capsys: Any) -> None:
    assert stage("plan", {**LARGE, "--tables.sharding": "column_wise"}) == REFUSED
    said = capsys.readouterr().err
    assert "the user table cannot be sharded column_wise" in said and "64 columns are not 64 equal blocks" in said
