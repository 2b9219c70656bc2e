"""A folder of days whose ids are slots of tables of fixed size: trained day after day, each row for its own key."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from recgpt_torchrec.config.tables import Tables
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.distributed.initial_values import fill_shard, key_of
from recgpt_torchrec.retrieval.exports.reading import open_export
from tests.preparation.test_append import append_day
from tests.preparation.test_append_slots import MANAGED, moving_log, read_table, rows_of
from tests.support import SMALL, stage
from tests.test_appended_days import observing
from tests.test_pretrain import checkpoints, tensors
from tools.observed_pretrain import read_targets

DAYS, EPOCHS = 3, 2
OPTIONS = {**SMALL, "--loss.candidates": "all", "--saving.every_steps": 3, "--saving.keep": 100, "--seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three days, a run that trained each once it was appended, and a copy of it after the second day."""
    folder = tmp_path_factory.mktemp("days")
    with observing(folder / "trained.jsonl"):
        for day in range(DAYS):
            append_day(folder, rows_of(moving_log(DAYS), day), day + 1, hold_out="none", history=12, **MANAGED)
            assert run(folder, folder / "run") == 0
            if day == 1:
                shutil.copytree(folder / "run", folder / "two")
    return folder


def run(folder: Path, output: Path, **more: Any) -> int:
    options = {"--data": folder / "data", "--output": output, **OPTIONS}
    return stage("pretrain", options | {f"--{name}": value for name, value in more.items()})


def keys_of(folder: Path, day: int, name: str) -> list[str]:
    return [row["key"] for row in read_table(folder, day, name)]


def expected_targets(folder: Path) -> list[Counter[tuple[str, str, str]]]:
    """Per day, (user, item before, item) of every interaction that has a row and a history, by a plain loop."""
    histories: dict[str, list[str]] = {}
    days: list[Counter[tuple[str, str, str]]] = []
    before: tuple[list[str], list[str]] = ([], [])
    for day in range(DAYS):
        users, items = (keys_of(folder, day + 1, name) for name in ("users", "items"))
        gone = [
            {key for slot, key in enumerate(old) if new[slot] != key}
            for old, new in zip(before, (users, items), strict=False)
        ]
        histories = {
            user: [item for item in own if item not in gone[1]]
            for user, own in histories.items()
            if user not in gone[0]
        }
        counted: Counter[tuple[str, str, str]] = Counter()
        for user, item, _ in rows_of(moving_log(DAYS), day):
            if user not in users or item not in items:
                continue
            own = histories.setdefault(user, [])
            if own:
                counted[user, own[-1], item] += EPOCHS
            own.append(item)
        days.append(counted)
        before = (users, items)
    return days


def test_every_new_target_with_a_row_is_trained_once_per_epoch(folder):
    found = []
    for day, (_, targets) in enumerate(sorted(read_targets(folder / "trained.jsonl").items()), 1):
        users, items = (keys_of(folder, day, name) for name in ("users", "items"))
        found.append(Counter((users[user], items[after], items[item]) for user, after, item in targets))
    assert found == expected_targets(folder)


def test_rows_of_other_keys_begin_anew_on_the_day_they_change_hands(folder, tmp_path):
    """Nothing is learned on the third day, so that its checkpoint holds what it started from."""
    shutil.copytree(folder / "two", tmp_path / "run")
    still = {"optimizer.lr": 1e-30, "tables.lr": 1e-30, "tables.user_lr": 1e-30}
    assert run(folder, tmp_path / "run", **still) == 0
    before, after = (tensors(checkpoints(path)[-1]) for path in (folder / "two/days/0002", tmp_path / "run/days/0003"))
    for entity, table in (("item", "items"), ("user", "users")):
        (name,) = [name for name in after if name.endswith(f"{entity}.weight") and name.startswith("model.")]
        old, new = (keys_of(folder, day, table) for day in (2, 3))
        initial = torch.zeros(after[name].shape)
        if (std := Tables().init_std_of(entity)) > 0:
            fill_shard(initial, 0, 0, std=std, key=key_of(3, entity))
        kinds = set()
        for slot, key in enumerate(new):
            is_kept = slot < len(old) and old[slot] == key
            expected = before[name][slot] if is_kept else initial[slot]
            torch.testing.assert_close(after[name][slot], expected, rtol=0, atol=1e-20)  # rows of zeros move by lr
            kinds.add(is_kept)
        assert kinds == {True, False}


@pytest.mark.parametrize("stop", ["before day 3", "at its start", "within day 3", "never"])
def test_a_stopped_run_ends_bit_for_bit_as_one_that_is_not(folder, tmp_path, stop):
    """Never: all three days are trained by one command."""
    if stop != "never":
        shutil.copytree(folder / "two", tmp_path / "run")
    if stop in ("at its start", "within day 3"):
        day = tmp_path / "run/days/0003"
        shutil.copytree(folder / "run/days/0003", day)
        for checkpoint in checkpoints(day)[1 if stop == "within day 3" else 0 :]:
            shutil.rmtree(checkpoint)
    assert run(folder, tmp_path / "run") == 0
    mine, theirs = (tensors(checkpoints(path / "days/0003")[-1]) for path in (tmp_path / "run", folder / "run"))
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(mine[name], value), name
    record = json.loads((tmp_path / "run/trained_days.json").read_text())
    assert [EPOCHS * day["targets"] for day in record["days"]] == [day.total() for day in expected_targets(folder)]


def test_the_export_has_the_raw_keys_of_the_last_day(folder, tmp_path, capsys):
    given = {"--data": folder / "data", "--checkpoint": folder / "run", "--output": tmp_path / "vectors"}
    assert stage("export", given) == 0
    items, users = (keys_of(folder, DAYS, name) for name in ("items", "users"))
    assert pq.read_table(tmp_path / "vectors/items")["key"].to_pylist() == items
    rows = [row for batch in open_export(str(tmp_path / "vectors")).users() for row in batch.to_pylist()]
    assert {row["key"] for row in rows} <= {*users} and all(users[row["user_id"]] == row["key"] for row in rows)
    stale = {**given, "--checkpoint": folder / "two", "--output": tmp_path / "stale"}
    assert stage("export", stale) == 2
    assert "belong to other keys now" in " ".join(capsys.readouterr().err.split())
    assert Dataset.open(str(folder / "data")).manifest.items == MANAGED["item_rows"]
