"""`pipelines/growing_ids.py`: its days, one arm from the log to its figures, and the report."""

import json
from pathlib import Path

from pipelines import growing_ids
from pipelines.growing_ids import ALIVE, ARMS, Options, make_days

SMALL = ["--days", "3", "--users", "16", "--new_items", "2", "--item_rows", "21", "--user_rows", "17", "--events", "3"]
WORDS = [*SMALL, "--epochs", "1", "--measure_every", "1", "--dim", "8"]


def options_of(folder: Path) -> Options:
    return growing_ids.parse([*WORDS, "--output", str(folder)])[0]


def test_a_tenth_of_the_items_is_new_each_day_and_as_many_are_forgotten(tmp_path):
    days = make_days(growing_ids.parse(["--days", "12", "--output", str(tmp_path)])[0])
    assert len(days) == 13, "one more, to predict"
    for day, rows in enumerate(days):
        series = {int(item.split("_")[1]) for _, item, _ in rows}
        assert series == {*range(day + 1, day + ALIVE + 1)}
        assert all(day * 86_400 <= time < (day + 1) * 86_400 for _, _, time in rows)
        assert len({user for user, _, _ in rows}) == 300
    assert make_days(growing_ids.parse(["--days", "12", "--output", str(tmp_path)])[0]) == days


def test_an_arm_is_measured_on_the_days_asked_for(tmp_path):
    options = options_of(tmp_path)
    growing_ids.run_arm(options, "managed")
    days = json.loads((tmp_path / "managed/result.json").read_text())["days"]
    keys: set[str] = set()
    for each, rows in zip(days, make_days(options), strict=False):
        keys |= {item for _, item, _ in rows}
        assert each["items"] == min(len(keys), options.item_rows)
    assert days[0]["evicted"]["item"] == 0 < days[2]["evicted"]["item"]
    assert options.measured_days == [1, 2]
    for each in days:
        measured = each["day"] in options.measured_days
        assert measured == ("HR@10" in each)
        if measured:
            assert 0 <= each["NDCG@10"] <= each["HR@10"] <= each["named"] <= 1
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("run*/checkpoints/*"))
    growing_ids.run_arm(options, "managed")  # nothing is trained twice
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("run*/checkpoints/*")) == before
    assert json.loads((tmp_path / "managed/result.json").read_text())["days"] == days


def test_the_report_has_every_arm(tmp_path):
    options = options_of(tmp_path)
    day = {"items": 21, "users": 16, "left_out": 0.1, "evicted": {"item": 1, "user": 0}, "bytes": 2048, "named": 0.9}
    results = {arm: [{**day, "HR@10": 0.25, "NDCG@10": 0.125}] * 3 for arm in ARMS}
    restart = {"killed": {"day": 1, "checkpoints": ["step-00000005"]}, "same_slots": True, "largest_difference": 0.0}
    text = growing_ids.markdown(options, {"results": results, "restart": restart})
    for arm in ARMS:
        assert f"| {arm} | 0.2500 | 0.2500 |" in text and f"| {arm} | 0.1250 | 0.1250 |" in text
        assert f"| {arm} | 21 | 16 | 2 | 90.0% |" in text
    assert "killed on day 2 at step-00000005; slots equal on all days" in text
