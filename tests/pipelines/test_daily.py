"""`pipelines/daily.py` from a log to its report, and how it cuts the log."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from pipelines import daily
from pipelines.steps import ROOT
from tests.pipelines.test_paper import InProcess, executor
from tools import synthetic_log

__all__ = ["executor"]  # a fixture
CONFIG = """
model: {dim: 8, layers: 1, max_len: 10}
loss: {candidates: all}
batch: {tokens: 200}
train: {epochs: 1}
"""
WEEK = 7 * 86400


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    log, configs = tmp_path / "log.csv", tmp_path / "configs"
    synthetic_log.main(["--output", str(log), "--users", "120", "--items", "60", "--mean_events", "10"])
    configs.mkdir()
    (configs / "tiny.yaml").write_text(CONFIG)
    (configs / "tiny_warm.yaml").write_text(CONFIG)
    words = ["--input", str(log), "--output", str(tmp_path / "out"), "--configs", str(configs), "--name", "tiny"]
    return [*words, "--day", str(WEEK), "--days", "2", "--first", "0.6", "--targets", "new"]


def test_from_a_log_to_the_report_interrupted_and_done_once(
    tmp_path: Path,
    words: list[str],
    executor: InProcess,  # noqa: F811
) -> None:
    executor.interrupt_at = 5
    with pytest.raises(SystemExit):
        daily.main(words)
    executor.interrupt_at = None
    daily.main(words)
    assert len(executor.ran) == len(daily.parse(words).planned()) == 3 + 2 + 2 * 4

    report = json.loads((tmp_path / "out/report.json").read_text())
    assert [list(day["runs"]) for day in report["days"]] == [["scratch"], *2 * [["scratch", "warm_new"]]]
    place = tmp_path / "out/tiny/seed0"
    initial = [json.loads((place / f"day{day}/warm_new/run.json").read_text())["initial"] for day in (1, 2)]
    began = [(ROOT / path).resolve().parents[1] for path in initial]
    assert began == [(place / run).resolve() for run in ("day0/scratch", "day1/warm_new")]
    for day in report["days"][1:]:
        measured = json.loads((place / f"day{day['day']}/warm_new_test.json").read_text())
        figure = day["runs"]["warm_new"]["test"]["masked"]["NDCG@10"]["mean"]
        assert figure == measured["results"]["pretrain"]["masked"]["NDCG@10"]
        assert day["runs"]["warm_new"]["users"] == day["runs"]["scratch"]["users"]
        assert 0 < day["runs"]["warm_new"]["training"][0]["steps"] <= day["runs"]["scratch"]["training"][0]["steps"]
        assert 0 < day["extends"]["new_targets"] < day["interactions"]
    text = (tmp_path / "out/report.md").read_text()
    for part in ("## Day 2, test", "| 1 | warm_new |", "After day 0, all days together: scratch", "--targets new"):
        assert part in text

    daily.main(words)
    assert len(executor.ran) == 13  # a second run starts no stage
    with pytest.raises(SystemExit):
        daily.main([*words, "--first", "0.5"])


def test_each_day_ends_in_deltas_that_lead_to_its_export(
    tmp_path: Path,
    words: list[str],
    executor: InProcess,  # noqa: F811
) -> None:
    words = [*words, "--deltas", "0", "0.5"]
    daily.main(words)
    assert len(executor.ran) == len(daily.parse(words).planned()) == 13 + 1 + 2 * 5
    days = json.loads((tmp_path / "out/report.json").read_text())["days"]
    assert [len(day["deltas"]) for day in days] == [0, 2, 2]
    for day in days[1:]:
        exact, rough = day["deltas"]
        assert exact["same_items"] and exact["same_users"] and rough["same_items"] and rough["same_users"]
        assert exact["items"]["count"] == day["items"] and rough["bytes"] < exact["bytes"] <= 1.1 * exact["full_bytes"]
        for name in ("items", "users"):
            before = day["extends"][name] - (0 if name == "items" else day["extends"]["absent_users"])
            assert exact[name]["new"] == rough[name]["new"] == day[name] - before
            assert rough[name]["moved"] < exact[name]["moved"]
    assert "| 2 | 0.5 |" in (tmp_path / "out/report.md").read_text()
    assert "ANOTHER" not in (tmp_path / "out/report.md").read_text()


def test_days_are_the_log_cut_by_time_in_its_order(tmp_path: Path, words: list[str]) -> None:
    options = daily.parse(words)
    log = pyarrow.csv.read_csv(tmp_path / "log.csv").to_pylist()
    daily.cut_log(tmp_path / "log.csv", tmp_path / "cut", options)
    first = sorted(row["timestamp"] for row in log)[round(0.6 * len(log)) - 1]
    edges = [0, first, first + WEEK, first + 2 * WEEK]
    for day, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
        rows = pq.read_table(tmp_path / f"cut/day{day}.parquet").to_pylist()
        of_day = [{**row, **{name: str(row[name]) for name in ("user_id", "item_id")}} for row in log]
        assert rows and rows == [row for row in of_day if low <= row["timestamp"] < high]


def test_dates_of_the_log_become_seconds_and_other_columns_are_refused(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "dates.csv"
    times = [f"2024-01-{day:02d}T00:00:00+00:00" for day in range(1, 29)]
    log.write_text("user_id,item_id,timestamp\n" + "".join(f"u,i{n},{time}\n" for n, time in enumerate(times)))
    daily.cut_log(log, tmp_path / "cut", daily.parse([*words, "--input", str(log), "--day", "86400", "--days", "3"]))
    start = datetime(2024, 1, 1, tzinfo=UTC).timestamp()
    whole = [pq.read_table(tmp_path / f"cut/day{day}.parquet")["timestamp"].to_pylist() for day in range(4)]
    assert sum(whole, []) == [start + 86400 * day for day in range(len(sum(whole, [])))]
    for column, said in (("item_id", "unreadable time"), ("when", "it has 'user_id', 'item_id', 'timestamp'")):
        with pytest.raises(SystemExit):
            daily.cut_log(log, tmp_path / "other", daily.parse([*words, "--time_column", column]))
        assert said in capsys.readouterr().err


def test_each_way_to_continue_training_is_a_separate_run(words: list[str]) -> None:
    options = daily.parse([*words, "--targets", "all", "new"])
    assert [options.runs(day) for day in (0, 1)] == [["scratch"], ["scratch", "warm_new", "warm_all"]]
    assert len(options.planned()) == 3 + 2 + 2 * 6


@pytest.mark.parametrize(
    "more", [["--days", "0"], ["--first", "1"], ["--day", "0"], ["--input", "nowhere.csv"], ["--input", "configs"]]
)
def test_impossible_options_are_refused(words: list[str], more: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        daily.parse([*words, *more])
    assert ended.value.code == 2


def test_only_the_newest_interaction_can_be_held_out(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        daily.parse([*words, "--hold_out", "time"])
    assert "measured on the newest interaction of each user" in capsys.readouterr().err
    assert daily.parse([*words, "--hold_out", "last"]) == daily.parse(words)
