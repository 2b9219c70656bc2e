"""The synthetic log is the same for the same seed, and has the structure its docstring promises."""

from pathlib import Path

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from tools import synthetic_log


def make(path: Path, **options: object) -> Path:
    synthetic_log.main(["--output", str(path), *(f"--{name}={value}" for name, value in options.items())])
    return path


def columns(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    table = pq.read_table(path) if path.suffix == ".parquet" else pyarrow.csv.read_csv(path)
    return tuple(table.column(name).to_numpy() for name in ("user_id", "item_id", "timestamp"))


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return columns(make(tmp_path_factory.mktemp("log") / "log.parquet", users=2000, items=500, threads=3, seed=1))


def histories(log: tuple[np.ndarray, np.ndarray, np.ndarray]) -> list[np.ndarray]:
    users, items, _ = log
    return np.split(items, np.flatnonzero(users[1:] != users[:-1]) + 1)


def test_the_same_seed_gives_the_same_file_and_another_seed_another(tmp_path: Path) -> None:
    one = make(tmp_path / "one.csv", users=300, items=100, seed=4).read_bytes()
    assert one == make(tmp_path / "two.csv", users=300, items=100, seed=4).read_bytes()
    assert one != make(tmp_path / "three.csv", users=300, items=100, seed=5).read_bytes()


def test_csv_and_parquet_hold_the_same_rows(tmp_path: Path) -> None:
    left = columns(make(tmp_path / "log.csv", users=300, items=100))
    right = columns(make(tmp_path / "log.parquet", users=300, items=100))
    assert all((a == b).all() for a, b in zip(left, right, strict=True))


def test_users_are_the_same_however_many_blocks_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic_log, "BLOCK_USERS", 100)
    users, _, _ = columns(make(tmp_path / "log.parquet", users=250, items=100))
    assert sorted(set(users)) == [f"user_{number:05d}" for number in range(250)]
    assert (np.sort(users) == users).all()


def test_keys_lengths_and_times(log: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    users, items, times = log
    assert users[0] == "user_00000" and set(items) <= {f"item_{number:03d}" for number in range(500)}
    lengths = np.array([len(history) for history in histories(log)])
    assert lengths.min() >= 5 and 18 < lengths.mean() < 22
    same_user = users[1:] == users[:-1]
    assert (np.diff(times)[same_user] > 0).all()
    days_between = np.diff(times)[same_user] / 86_400
    assert 0.03 < (days_between > 0.5).mean() < 0.2  # users come back on other days


def test_popularity_is_skewed(log: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    counts = np.sort(np.unique(log[1], return_counts=True)[1])[::-1]
    assert 0.25 < counts[:50].sum() / counts.sum() < 0.7


def test_the_item_after_a_threads_last_one_follows_with_the_promised_probability(
    log: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    """The item three places back decides the next one; the last item says little."""

    def predictable(back: int) -> float:
        following: dict[str, dict[str, int]] = {}
        for history in histories(log):
            for earlier, later in zip(history[:-back], history[back:], strict=True):
                seen = following.setdefault(earlier, {})
                seen[later] = seen.get(later, 0) + 1
        total = sum(sum(seen.values()) for seen in following.values())
        return sum(max(seen.values()) for seen in following.values()) / total

    assert 0.8 < predictable(3) < 0.92
    assert predictable(1) < 0.3


@pytest.mark.parametrize(
    "arguments",
    [
        ["--output", "log.txt"],
        ["--output", "log.csv", "--items", "1"],
        ["--output", "log.csv", "--follow", "2"],
        ["--output", "log.csv", "--mean_events", "2"],
        ["--output", "log.csv", "--threads", "0"],
    ],
)
def test_impossible_requests_end_with_status_2(arguments: list[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        synthetic_log.main(arguments)
    assert caught.value.code == 2
    assert list(tmp_path.iterdir()) == []
