"""Where refusals tell what a user wants, prompts of them pay; where they are noise, they cost nothing beyond noise."""

import json
from pathlib import Path
from typing import Any

import pytest

from recgpt_torchrec.data.dataset import Dataset
from tests.support import stage
from tools import feedback_log

CLICKS = {"--click_column": "label", "--click_values": "click", "--dislike_values": "dislike", "--min_count": 1}
MODEL = {"--model.dim": 16, "--model.layers": 1, "--model.max_len": 40, "--model.dropout": 0.1}
TRAIN = {"--loss.candidates": "all", "--optimizer.lr": 0.01, "--optimizer.warmup_steps": 10}
TUNE = {**TRAIN, "--train.epochs": 5, "--train.validate_every": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both logs, which have the same clicks, and a model that was pre-trained on these."""
    folder = tmp_path_factory.mktemp("feedback")
    for truth in ("refusals", "noise"):
        log, data = folder / f"{truth}.csv", folder / truth
        feedback_log.main(["--output", str(log), "--users", "1200", "--regions", "3", "--truth", truth])
        made = {"--input": log, "--output": data, "--position_column": "place"}
        assert stage("prepare", {**made, **CLICKS}) == 0
    options = {**MODEL, **TRAIN, "--batch.tokens": 500, "--train.epochs": 10, "--train.validate_every": 10}
    assert stage("pretrain", {"--data": folder / "refusals", "--output": folder / "run", **options}) == 0
    return folder


def tune(folder: Path, truth: str, name: str, options: dict[str, Any]) -> float:
    """HR@10 of a tuned run, masked, on validation."""
    data = folder / truth
    if options.get("--tuning.prompts") != "false":
        data = folder / f"{truth}_prompts"
        made = {"--data": folder / truth, "--checkpoint": folder / "run", "--output": data}
        assert stage("generate_prompts", {**made, "--prompts.source": "exposed", "--prompts.k": 3}) == 0
        assert Dataset.open(str(data)).manifest.feedback == ["shown", "disliked"]
    run = {"--data": data, "--checkpoint": folder / "run", "--output": folder / name}
    assert stage("prompt_tune", {**run, **TUNE, **options}) == 0
    lines = map(json.loads, (folder / name / "history.jsonl").read_text().splitlines())
    return [line["HR@10"] for line in lines if "HR@10" in line][-1]


@pytest.mark.timeout(300)
def test_refusals_pay_where_they_tell_and_cost_nothing_where_they_do_not(folder: Path) -> None:
    """Best possible from clicks alone about .56, with refusals 1; the standard error of a figure is .015."""
    without = tune(folder, "refusals", "without", {"--tuning.prompts": "false", "--batch.tokens": 250})
    assert 0.45 < without < 0.6
    telling = tune(folder, "refusals", "telling", {"--batch.tokens": 1000, "--tuning.places": "true"})
    assert telling > without + 0.2
    noise = tune(folder, "noise", "noise_run", {"--batch.tokens": 1000})
    assert noise > without - 0.04
    settings = json.loads((folder / "telling/best.json").read_text())
    record = json.loads((folder / "telling" / "checkpoints" / settings["checkpoint"] / "checkpoint.json").read_text())
    assert record["inputs"]["segments"] == 5 and record["config"]["tuning"]["predict_from"] == "last"
    results = folder / "test.json"
    given = {"--data": folder / "refusals_prompts", "--checkpoint": folder / "telling", "--output": results}
    assert stage("evaluate", {**given, "--baselines": "false"}) == 0
    assert json.loads(results.read_text())["results"]["recgpt_1"]["masked"]["HR@10"] > without + 0.2
