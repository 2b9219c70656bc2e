"""`pipelines/inputs.py` from a structured log to its report; which arm reads what."""

import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

from pipelines import inputs
from recgpt_torchrec.checkpoints.folder import find_checkpoint
from recgpt_torchrec.checkpoints.settings import CheckpointSettings
from tests.pipelines.test_paper import InProcess, executor
from tools import structured_log

__all__ = ["executor"]  # a fixture
CONFIG = """
model: {dim: 8, layers: 1, max_len: 10}
loss: {candidates: all}
batch: {tokens: 400}
train: {epochs: 1}
"""


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("log")
    words = ["--structure", "attributes", "--users", "80", "--items", "320", "--mean_events", "8"]
    structured_log.main([*words, "--output", str(folder)])
    return folder


def table_words(log: Path, *, users: bool = True) -> list[str]:
    words = ["--input", str(log / "log.parquet"), "--items", str(log / "items.parquet")]
    words += ["--item_attributes", "category", "tags"]
    of_users = ["--users", str(log / "users.parquet"), "--user_attributes", "age:number"]
    return words + of_users if users else words


def test_from_a_log_to_the_report_and_done_once(log: Path, tmp_path: Path, executor: InProcess) -> None:  # noqa: F811
    configs, out = tmp_path / "configs", tmp_path / "out"
    configs.mkdir()
    (configs / "tiny.yaml").write_text(CONFIG)
    words = [
        *table_words(log, users=False),
        "--output",
        str(out),
        "--configs",
        str(configs),
        "--name",
        "tiny",
        "--seeds",
        "1",
    ]
    words += ["--event_column", "event", "--asked", "view", "buy", "--truth", str(log / "truth.json")]
    inputs.main(words)
    options = inputs.parse(words)
    assert len(executor.ran) == len(options.planned())

    report = json.loads((out / "report.json").read_text())
    arms = ["ids", "attributes", "time", "events", "all"]
    assert list(report["results"]) == list(options.arms) == arms
    tests = {arm: json.loads((out / f"tiny/seed0/{arm}_test.json").read_text()) for arm in arms}
    figures = {arm: tests[arm]["results"]["pretrain"]["masked"]["NDCG@10"] for arm in arms}
    assert report["results"]["all"]["test"]["masked"]["NDCG@10"]["values"] == [figures["all"]]
    difference = report["differences"]["test"]["all"]["NDCG@10"]["values"]
    assert difference == pytest.approx([figures["all"] - figures["ids"]])
    parts = [json.loads((out / f"tiny/seed0/all_test_{event}.json").read_text()) for event in ("view", "buy")]
    assert sum(part["users"] for part in parts) == 80
    hits = sum(part["users"] * part["results"]["pretrain"]["masked"]["HR@10"] for part in parts) / 80
    asked = report["results"]["all"]["test, asked for the event type"]["masked"]["HR@10"]
    assert asked["values"][0] == pytest.approx(hits)
    best = json.loads((out / "tiny/seed0/time/best.json").read_text())["value"]
    assert report["results"]["time"]["validation"]["masked"]["NDCG@10"]["values"] == [best]
    for lines in report["groups"].values():
        assert sum(line["users"] for line in lines) == 80
        of_users = sum(line["users"] * line["arms"]["ids"]["HR@10"]["values"][0] for line in lines) / 80
        assert of_users == pytest.approx(tests["ids"]["results"]["pretrain"]["masked"]["HR@10"])
    text = (out / "report.md").read_text()
    for part in ("best possible", "popularity", "Minus `ids`", "items in the history", "--item_attributes category"):
        assert part in text

    read = {}
    for arm in arms:
        recorded = CheckpointSettings.read(find_checkpoint(str(out / f"tiny/seed0/{arm}"))).inputs
        attributes = {f"{each.entity}.{each.name}" for each in recorded.attributes}
        read[arm] = attributes, {each.name for each in recorded.features}
    items, times, events = {"item.category", "item.tags"}, {"past_gap", "next_gap", "hour", "weekday"}, {"event"}
    events |= {"asked_event"}
    assert read == {
        "ids": (set(), set()),
        "attributes": (items, set()),
        "time": (set(), times),
        "events": (set(), events),
        "all": (items, times | events),
    }

    inputs.main(words)
    assert len(executor.ran) == len(options.planned())  # a second run starts no stage


def test_arms_are_those_that_tables_and_columns_allow(log: Path) -> None:
    options = inputs.parse([*table_words(log), "--no_time"])
    assert options.arms == {
        "ids": ["--attributes.use", "[]"],
        "attributes": [],
        "item_attributes": ["--attributes.use", "item.category", "item.tags"],
        "user_attributes": ["--attributes.use", "user.age"],
    }
    assert list(inputs.parse(["--input", str(log / "log.parquet")]).arms) == ["ids", "time"]
    assert list(inputs.parse([*table_words(log), "--arms", "all", "time"]).arms) == ["ids", "time", "all"]


def test_differences_are_those_of_the_same_seeds() -> None:
    def over_seeds(values: list[float]) -> dict[str, Any]:
        return {"test": {"masked": {metric: {"values": values} for metric in inputs.METRICS}}}

    results = {"ids": over_seeds([0.1, 0.5, 0.3]), "time": over_seeds([0.2, 0.5, 0.7])}
    found = inputs.differences(results, "time", "test")["HR@10"]
    assert found["values"] == pytest.approx([0.1, 0, 0.4])
    assert (found["mean"], found["sd"]) == pytest.approx((fmean([0.1, 0, 0.4]), stdev([0.1, 0, 0.4])))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--items", "tests"], "needs the names of its columns"),
        (["--item_attributes", "a"], "needs the names of its columns"),
        (["--users", "/no/such/file", "--user_attributes", "a"], "there is no /no/such/file"),
        (["--truth", "/no/such/file"], "there is no /no/such/file"),
        (["--no_time"], "nothing to compare"),
        (["--asked", "buy"], "needs the --event_column"),
        (["--arms", "events"], "--arms events is none of ids, time"),
        (["--arms", "ids"], "nothing to compare"),
        (["--seeds", "0"], "at least 1"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(words, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        inputs.main(["--input", __file__, *words, "--output", str(tmp_path / "out")])
    assert ended.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
