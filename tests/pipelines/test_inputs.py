"""`pipelines/inputs.py` from a structured log to its report; which arm reads what."""

import json
from pathlib import Path
from statistics import fmean, stdev

import pytest

from pipelines import inputs
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


def table_words(log: Path) -> list[str]:
    words = ["--input", str(log / "log.parquet"), "--items", str(log / "items.parquet"), "--users"]
    words += [str(log / "users.parquet"), "--item_attributes", "category", "tags", "--user_attributes", "age:number"]
    return words


def test_from_a_log_to_the_report_and_done_once(log: Path, tmp_path: Path, executor: InProcess) -> None:  # noqa: F811
    configs, out = tmp_path / "configs", tmp_path / "out"
    configs.mkdir()
    (configs / "tiny.yaml").write_text(CONFIG)
    words = [*table_words(log), "--output", str(out), "--configs", str(configs), "--name", "tiny", "--seeds", "2"]
    words += ["--event_column", "event", "--truth", str(log / "truth.json")]
    inputs.main(words)
    options = inputs.parse(words)
    assert len(executor.ran) == len(options.planned())

    report = json.loads((out / "report.json").read_text())
    arms = ["ids", "attributes", "item_attributes", "user_attributes", "time", "events", "all"]
    assert list(report["results"]) == list(options.arms) == arms
    tests = {arm: [json.loads((out / f"tiny/seed{s}/{arm}_test.json").read_text()) for s in (0, 1)] for arm in arms}
    figures = {arm: [each["results"]["pretrain"]["masked"]["NDCG@10"] for each in tests[arm]] for arm in arms}
    of_all = report["results"]["all"]["test"]["masked"]["NDCG@10"]
    assert of_all["mean"] == pytest.approx(fmean(figures["all"])) and of_all["sd"] == pytest.approx(
        stdev(figures["all"])
    )
    paired = [a - b for a, b in zip(figures["all"], figures["ids"], strict=True)]
    assert report["differences"]["test"]["all"]["NDCG@10"]["values"] == pytest.approx(paired)
    best = json.loads((out / "tiny/seed1/time/best.json").read_text())["value"]
    assert report["results"]["time"]["validation"]["masked"]["NDCG@10"]["values"][1] == best
    for lines in report["groups"].values():
        assert sum(line["users"] for line in lines) == 80
        of_users = sum(line["users"] * line["arms"]["ids"]["HR@10"]["values"][0] for line in lines) / 80
        assert of_users == pytest.approx(tests["ids"][0]["results"]["pretrain"]["masked"]["HR@10"])
    text = (out / "report.md").read_text()
    for part in ("best possible", "popularity", "Minus `ids`", "items in the history", "--item_attributes category"):
        assert part in text

    read = {}
    for arm in arms:
        newest = json.loads((out / f"tiny/seed0/{arm}/best.json").read_text())["checkpoint"]
        (settings,) = (out / f"tiny/seed0/{arm}/checkpoints" / Path(newest).name).glob("manifest.json")
        recorded = json.loads(settings.read_text())["inputs"]
        attributes = {f"{each['entity']}.{each['name']}" for each in recorded.get("attributes", [])}
        read[arm] = attributes, {each["name"] for each in recorded.get("features", [])}
    items, users, times = {"item.category", "item.tags"}, {"user.age"}, {"past_gap", "next_gap", "hour", "weekday"}
    events = {"event", "asked_event"}
    assert read == {
        "ids": (set(), set()),
        "attributes": (items | users, set()),
        "item_attributes": (items, set()),
        "user_attributes": (users, set()),
        "time": (set(), times),
        "events": (set(), events),
        "all": (items | users, times | events),
    }

    inputs.main(words)
    assert len(executor.ran) == len(options.planned())  # a second run starts no stage


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--items", "tests"], "needs the names of its columns"),
        (["--item_attributes", "a"], "needs the names of its columns"),
        (["--users", "/no/such/file", "--user_attributes", "a"], "there is no /no/such/file"),
        (["--truth", "/no/such/file"], "there is no /no/such/file"),
        (["--no_time"], "nothing to compare"),
        (["--seeds", "0"], "at least 1"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(words, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        inputs.main(["--input", __file__, *words, "--output", str(tmp_path / "out")])
    assert ended.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
