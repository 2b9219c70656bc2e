"""Results by user: what is recorded is joined whatever the order and the ranks, and facts are those of a plain loop."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.evaluation.comparing.comparison import role_of, shared_users
from recgpt_torchrec.evaluation.per_user import recording
from recgpt_torchrec.evaluation.per_user.facts import Facts
from recgpt_torchrec.evaluation.per_user.files import UserResults
from recgpt_torchrec.evaluation.per_user.recording import UserRecorder
from tests.support import training_part, walks, write_dataset
from tools.ranks import run_ranks

USERS, ITEMS = 60, 25


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "BUFFER", 7)
    monkeypatch.setattr(recording, "RANGE", 16)


def read(folder: Path) -> dict[str, list[Any]]:
    return pq.read_table(folder / "test.users.parquet").to_pydict()


def test_paths_are_joined_by_user_whatever_their_order(tmp_path: Path) -> None:
    rng, users = np.random.default_rng(0), np.array([3, 50, 17, 16, 15, 31, 32, 8, 9, 47, 0])
    ranks = {path: rng.integers(0, 20, users.size) / 2 for path in ("one", "two")}
    with UserRecorder(str(tmp_path / "test.json")) as recorder:
        for path, values in ranks.items():
            order = rng.permutation(users.size)
            for places in np.array_split(order, 3):
                both = {how: torch.from_numpy(values[places] + (how == "unmasked")) for how in ("masked", "unmasked")}
                recorder.add_ranks(path, users[places], both)
        record = recorder.join(64, paths=["one", "two"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test.users.parquet"]
    found, order = read(tmp_path), np.argsort(users)
    assert found["user_id"] == users[order].tolist() and record.rows == users.size
    for path, values in ranks.items():
        assert found[f"{path}_masked"] == values[order].tolist()
        assert found[f"{path}_unmasked"] == (values[order] + 1).tolist()


def test_an_error_leaves_nothing_and_what_a_kill_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".test.users.parquet.incomplete-x"
    left.mkdir()
    for name in (".incomplete", "old-00000.parquet"):
        (left / name).write_text("left")
    with pytest.raises(RuntimeError), UserRecorder(str(tmp_path / "test.json")) as recorder:
        recorder.add_ranks("one", np.arange(20), {"masked": torch.zeros(20)})
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_two_evaluations_with_one_output_keep_apart(tmp_path: Path) -> None:
    output = str(tmp_path / "test.json")
    with UserRecorder(output) as first:
        first.add_ranks("one", np.arange(20), {"masked": torch.zeros(20)})
        with UserRecorder(output) as second:
            second.add_ranks("two", np.arange(20), {"masked": torch.ones(20)})
            second.join(20, paths=["two"])
            assert set(read(tmp_path)) == {"user_id", "two_masked"}
        first.join(20, paths=["one"])
        assert set(read(tmp_path)) == {"user_id", "one_masked"}
    assert [path.name for path in tmp_path.iterdir()] == ["test.users.parquet"]


def test_a_file_that_is_not_the_one_named_is_refused(tmp_path: Path) -> None:
    with UserRecorder(str(tmp_path / "test.json")) as recorder:
        recorder.add_ranks("one", np.arange(20), {"masked": torch.arange(20.0)})
        record = recorder.join(20, paths=["one"])
    values = {"per_user": record.__dict__}
    results = UserResults.of(str(tmp_path / "test.json"), values)
    assert results is not None and [each["one_masked"].tolist() for each in results.read(["one_masked"])] == [
        [*range(20)]
    ]
    with pytest.raises(InputError, match="has no column two_masked"):
        list(results.read(["two_masked"]))
    with open(tmp_path / "test.users.parquet", "ab") as file:
        file.write(b"more")
    with pytest.raises(InputError, match="its checksum is"):
        UserResults.of(str(tmp_path / "test.json"), values)
    with pytest.raises(InputError, match="is not a file beside it"):
        UserResults.of(str(tmp_path / "test.json"), {"per_user": {**record.__dict__, "file": "../x.users.parquet"}})
    assert UserResults.of("test.json", {}) is None


def record_facts(rank: int, world_size: int, data: str, output: str) -> bool:
    """Record the facts of the users of a dataset, each rank its share."""
    recording.BUFFER, recording.RANGE = 7, 16
    with UserRecorder(output) as recorder:
        has_age = Facts(dataset=Dataset.open(data), split="test").record(recorder)
        recorder.join(USERS)
    return has_age


def test_facts_are_those_of_a_plain_loop_on_any_number_of_ranks(tmp_path: Path) -> None:
    histories = walks(USERS, ITEMS, shortest=1, longest=12, seed=4)
    write_dataset(tmp_path / "data", histories, items=ITEMS, rows_per_group=9)
    counts = np.bincount([item for history in histories for item in training_part(history)], minlength=ITEMS)
    first: dict[int, int] = {}
    for history in histories:  # the small datasets' times are 0, 1, 2, ... in every history
        for time, item in enumerate(history):
            first[item] = min(first.get(item, time), time)
    expected = [
        (user, history[-1], len(history) - 1, counts[history[-1]], len(history) - 1 - first[history[-1]])
        for user, history in enumerate(histories)
        if len(history) >= 3
    ]
    for world_size in (1, 3):
        folder = tmp_path / str(world_size)
        folder.mkdir()
        assert all(run_ranks(record_facts, world_size, str(tmp_path / "data"), str(folder / "test.json")))
        found = read(folder)
        names = ("user_id", "item_id", "history_length", "train_count", "item_age")
        assert list(zip(*(found[name] for name in names), strict=True)) == expected


def test_users_of_two_streams_are_joined_as_sets_are() -> None:
    rng = np.random.default_rng(1)
    sides = [np.sort(rng.choice(200, 120, replace=False)) for _ in range(2)]

    def stream(users: np.ndarray, size: int) -> Any:
        for start in range(0, users.size, size):
            part = users[start : start + size]
            yield {"user_id": part, "value": part * 10 + size}

    joined = list(shared_users(stream(sides[0], 7), stream(sides[1], 11)))
    assert list(itertools.chain(*(one["user_id"] for one, _ in joined))) == np.intersect1d(sides[0], sides[1]).tolist()
    for one, two in joined:
        assert (one["user_id"] == two["user_id"]).all() and (one["value"] - 7 == two["value"] - 11).all()


def test_paths_of_different_models_have_the_same_role() -> None:
    assert len({role_of(path) for path in ("pretrain", "fine_tuning", "recgpt_1")}) == 1
    assert len({role_of(path) for path in ("pretrain_two_step", "fine_tuning_two_step", "recgpt")}) == 1
    assert role_of("recgpt_1_interests_6_quota") == role_of("pretrain_interests_6_quota") != role_of("pretrain")
    assert role_of("popularity") == "popularity"
