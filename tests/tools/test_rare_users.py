"""Rare users keep their newest interactions, others all."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.support import walks, write_dataset
from tools import rare_users


def test_drawn_users_keep_their_newest_interactions_and_others_all(tmp_path: Path) -> None:
    histories = walks(50, 20, shortest=2, longest=15)
    dataset = write_dataset(tmp_path / "data", histories, items=20)
    words = ["--data", dataset.path, "--output", str(tmp_path / "log.parquet"), "--share", "0.4", "--keep", "4"]
    rare_users.main(words)
    found: dict[str, list[tuple[str, int]]] = {}
    for row in pq.read_table(tmp_path / "log.parquet").to_pylist():
        found.setdefault(row["user_id"], []).append((row["item_id"], row["timestamp"]))
    shortened = 0
    for user, items in enumerate(histories):
        whole = [(f"item {item}", time) for time, item in enumerate(items)]
        assert found[f"user {user}"] in (whole, whole[-4:])
        shortened += found[f"user {user}"] != whole
    assert shortened <= 20
    log, users = rare_users.keep_newest(dataset, 1.0, 4, seed=0)
    assert users == 50 and log.num_rows == sum(min(len(items), 4) for items in histories)
    assert rare_users.keep_newest(dataset, 0.0, 4, seed=0)[0].num_rows == sum(map(len, histories))


def test_what_was_shown_is_no_interaction(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "data", [[0, 1, 2, 3, 4, 5, 6]], segments=[[0, 2, 0, 2, 0, 0, 2]])
    log, _ = rare_users.keep_newest(dataset, 1.0, 3, seed=0)
    assert log.to_pydict() == {
        "user_id": ["user 0"] * 3,
        "item_id": ["item 2", "item 4", "item 5"],
        "timestamp": [2, 4, 5],
    }


def test_bad_options_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        rare_users.main(["--data", str(tmp_path), "--output", str(tmp_path / "x.parquet"), "--keep", "2"])
    with pytest.raises(SystemExit):
        rare_users.main(["--data", str(tmp_path), "--output", str(tmp_path / "x.parquet")])
    assert "is not a dataset" in capsys.readouterr().err
