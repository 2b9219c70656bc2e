"""A dataset of a synthetic catalogue is what `prepare` would write, however large the catalogue."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from recgpt_torchrec.data.candidates import training_counts
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.preparation.writing import Fingerprint
from tests.support import SMALL, stage, training_part
from tools import write_dataset
from tools.write_dataset import Arithmetic


def make(folder: Path, **options: Any) -> Dataset:
    given = {"items": 2000, "users": 300, "seed": 1} | options
    write_dataset.main(["--output", str(folder), *(f"--{name}={value}" for name, value in given.items())])
    return Dataset.open(str(folder), checksums=True)


def histories(dataset: Dataset) -> dict[int, list[int]]:
    rows = [
        row for part in dataset.manifest.sequences for row in pq.read_table(f"{dataset.path}/{part.path}").to_pylist()
    ]
    for row in rows:
        assert len(row["timestamps"]) == len(row["item_ids"])
        assert (np.diff(row["timestamps"]) > 0).all()
    return {row["user_id"]: row["item_ids"] for row in rows}


def column(dataset: Dataset, folder: str, name: str) -> list[Any]:
    return pq.read_table(f"{dataset.path}/{folder}", columns=[name]).column(name).to_pylist()


def test_counts_keys_and_fingerprint_are_those_of_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_dataset, "KEYS", 700)
    dataset = make(tmp_path / "data")
    read = histories(dataset)
    assert sorted(read) == list(range(300)) == column(dataset, "users", "user_id")
    assert column(dataset, "items", "item_id") == list(range(2000))
    assert column(dataset, "items", "key") == [f"i{number}" for number in range(2000)]
    assert column(dataset, "users", "key") == [f"u{number}" for number in range(300)]
    for name, of in (("count", lambda h: h), ("train_count", training_part)):
        expected = np.bincount([item for h in read.values() for item in of(h)], minlength=2000)
        assert column(dataset, "items", name) == expected.tolist()
    assert (training_counts(dataset) == column(dataset, "items", "train_count")).all()
    fingerprint = Fingerprint()
    for name in ("items", "users"):
        fingerprint.add(pa.chunked_array([[name]]))
        fingerprint.add(pa.chunked_array([column(dataset, name, "key")]))
    assert dataset.manifest.vocabulary == fingerprint.hex()


def test_prepare_records_the_same_of_these_interactions(tmp_path: Path) -> None:
    dataset = make(tmp_path / "data")
    rows = [(user, item, time) for user, items in histories(dataset).items() for time, item in enumerate(items)]
    names = ("user_id", "item_id", "timestamp")
    log = pa.table({name: list(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)})
    pyarrow.csv.write_csv(log, tmp_path / "log.csv")
    options = {"--input": tmp_path / "log.csv", "--output": tmp_path / "prepared", "--min_count": 1}
    assert stage("prepare", options) == 0
    prepared = Dataset.open(str(tmp_path / "prepared")).manifest
    own, theirs = dataset.manifest.preparation, prepared.preparation
    assert own["lengths"] == theirs["lengths"] and own["rows"] == theirs["rows"]
    theirs["split"]["items_without_target"] += dataset.manifest.items - prepared.items  # those without interactions
    assert own["split"] == theirs["split"]


def test_fewer_histories_are_the_first_of_all_and_the_vocabulary_is_the_same(tmp_path: Path) -> None:
    whole, sample = make(tmp_path / "whole"), make(tmp_path / "sample", histories=20)
    assert whole.manifest.vocabulary == sample.manifest.vocabulary
    assert histories(sample) == {user: items for user, items in histories(whole).items() if user < 20}
    assert (sample.manifest.users, sample.manifest.preparation["split"]["test_users"]) == (300, 20)


@pytest.mark.parametrize("items", [2, 49, 50, 51, 1000, 12_345, 100_000_000, 3_000_000_000])
def test_series_are_cyclic_and_no_two_places_hold_one_item(items: int) -> None:
    world = Arithmetic(items, zipf=0.8)
    rng = np.random.default_rng(0)
    series = rng.integers(0, items // world.size, 200)
    if items < 100_000:
        grid = np.arange(items // world.size * world.size)
        at = world.item_at(grid // world.size, grid % world.size)
        assert np.unique(at).size == grid.size
    for place in range(world.size):
        here = world.item_at(series, np.full(200, place))
        following = world.item_at(series, np.full(200, (place + 1) % world.size))
        assert (world.next_of(here) == following).all() and ((0 <= here) & (here < items)).all()
        # An independent reference without bounds: Python's whole numbers.
        first = int(series[0])
        assert int(here[0]) == (first * world.size + place) * world.multiplier % items


def test_most_items_follow_their_thread(tmp_path: Path) -> None:
    read = histories(make(tmp_path / "data", items=100_000))
    world = Arithmetic(100_000, zipf=0.8)
    pairs = [(h[i - 3], h[i]) for h in read.values() for i in range(3, len(h))]
    before, after = np.array(pairs).T
    assert 0.8 < (world.next_of(before) == after).mean() < 0.9


def test_a_model_is_trained_on_it_and_prompts_are_generated_for_the_sample(tmp_path: Path) -> None:
    make(tmp_path / "whole", users=60), make(tmp_path / "sample", users=60, histories=10)
    run = {**SMALL, "--data": tmp_path / "whole", "--output": tmp_path / "run", "--train.epochs": 1}
    assert stage("pretrain", {**run, "--stream.checksums": "true"}) == 0
    options = {"--data": tmp_path / "sample", "--checkpoint": tmp_path / "run", "--output": tmp_path / "prompts"}
    assert stage("generate_prompts", options) == 0
    prompts = Dataset.open(str(tmp_path / "prompts"), checksums=True).manifest
    assert prompts.vocabulary and sum(part.rows for part in prompts.sequences) == 10
    options["--output"] = tmp_path / "evaluation.json"
    assert stage("evaluate", options) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"items": 1}, "--items 1 must be from 2 to 3e9"),
        ({"items": 1.5}, "invalid whole value"),
        ({"histories": 301}, "--histories 301 must be from 1 to --users 300"),
        ({"mean_events": 4}, "--mean_events must be at least 5"),
    ],
)
def test_options_that_cannot_be_are_refused(options: Any, message: str, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as end:
        make(tmp_path / "data", **options)
    assert end.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "data").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").write_text("mine")
    with pytest.raises(SystemExit):
        make(tmp_path / "data")
    assert "already holds something" in capsys.readouterr().err
    assert (tmp_path / "data" / "mine").read_text() == "mine"
