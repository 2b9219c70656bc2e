"""Event types through all stages: what asking for a type is worth, growth over days, resume, what is refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from recgpt_torchrec.data.dataset import Dataset
from tests.preparation.prepare_helpers import make
from tests.support import stage
from tests.test_pretrain import checkpoints, tensors

ITEMS, USERS = 20, 250
OPTIONS = {
    "--model.dim": 32,
    "--model.max_len": 16,
    "--model.dropout": 0.1,
    "--model.attention_dropout": 0.1,
    "--model.user_dropout": 1,
    "--batch.tokens": 250,
    "--loss.candidates": "all",
    "--train.epochs": 20,
    "--train.validate_every": 20,
    "--train.patience": 0,
    "--optimizer.lr": 0.004,
    "--tables.lr": 0.2,
}
SHORT = {**OPTIONS, "--train.epochs": 2, "--saving.every_steps": 3, "--saving.keep": 100}


def write_log(path: Path, users: int, words: tuple[str, ...] = ("view", "buy"), seed: int = 0) -> Path:
    """Users view neighbours on a ring, and now and then buy the partner of what they viewed last."""
    rng = np.random.default_rng(seed)
    partner = np.random.default_rng(1).permutation(ITEMS)
    lines = ["user_id,item_id,timestamp,event"]
    for user in range(users):
        item, time = int(rng.integers(ITEMS)), 0
        for _ in range(4):
            for _ in range(int(rng.integers(1, 4))):
                item = (item + int(rng.integers(1, 3))) % ITEMS
                lines.append(f"{user},v{item},{time},{words[0]}")
                time += 1
            lines.append(f"{user},b{partner[item]},{time},{words[1 + user % (len(words) - 1)]}")
            time += 1
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset whose held-out items are purchases, and a run on it."""
    folder = tmp_path_factory.mktemp("events")
    targets = {"event_column": "event", "hold_out": "targets", "target_events": ["buy"]}
    make(write_log(folder / "log.csv", USERS), folder / "data", **targets)
    assert stage("pretrain", {"--data": folder / "data", "--output": folder / "run", **OPTIONS}) == 0
    return folder


def evaluate(folder: Path, run: str, output: Path, **options: Any) -> dict[str, Any]:
    given = {"--data": folder / "data", "--checkpoint": folder / run, "--output": output, "--baselines": "false"}
    assert stage("evaluate", {**given, **{f"--{name}": value for name, value in options.items()}}) == 0
    return json.loads(output.read_text())


def test_asked_for_purchases_a_model_ranks_what_is_bought_above_what_is_viewed(folder, tmp_path):
    told = evaluate(folder, "run", tmp_path / "told.json", event="buy")
    untold = evaluate(folder, "run", tmp_path / "untold.json", event="buy", ask="false")
    assert told["event"] == untold["event"] == "buy" and told["asked"] and not untold["asked"]
    assert told["users"] == untold["users"] == USERS
    best, other = (each["results"]["pretrain"]["unmasked"]["NDCG@5"] for each in (told, untold))
    assert best > 0.8 and other < 0.75 and best > other + 0.15, (best, other)
    anything = evaluate(folder, "run", tmp_path / "any.json")
    assert "event" not in anything and anything["results"] == untold["results"], "any type is what is asked for"


def test_vectors_for_a_type_differ_and_an_export_says_what_it_was_made_for(folder, tmp_path, capsys):
    vectors = {}
    for name, event in (("any", None), ("buy", "buy")):
        options = {"--data": folder / "data", "--checkpoint": folder / "run", "--output": tmp_path / name}
        assert stage("export", {**options, "--event": event, "--interests": 2}) == 0
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        assert manifest["settings"]["event"] == event
        table = pq.read_table(tmp_path / name / "users").sort_by("user_id")
        vectors[name] = np.array(table["vectors"].combine_chunks().flatten().flatten())
    assert np.abs(vectors["any"] - vectors["buy"]).max() > 0.1
    options = {"--data": folder / "data", "--checkpoint": folder / "run", "--interests": 2, "--event": "buy"}
    assert stage("export", {**options, "--output": tmp_path / "any"}) == 2
    assert "event: None there, buy now" in capsys.readouterr().err
    assert stage("export", {**options, "--output": tmp_path / "delta", "--since": tmp_path / "any"}) == 2
    assert "has event None, but the delta would have buy" in capsys.readouterr().err


def test_prompts_and_tuning_keep_the_types(folder, tmp_path):
    options = {"--data": folder / "data", "--checkpoint": folder / "run"}
    assert stage("generate_prompts", {**options, "--output": tmp_path / "prompts", "--prompts.k": 1}) == 0
    assert Dataset.open(str(tmp_path / "prompts")).manifest.events == ["view", "buy"]
    tune = {"--checkpoint": folder / "run", "--output": tmp_path / "tuned", "--train.epochs": 1}
    tune |= {"--events.targets": "buy=3,view", "--events.validate": "buy", "--batch.tokens": 250}
    assert stage("prompt_tune", {"--data": tmp_path / "prompts", **tune}) == 0
    result = tmp_path / "tuned.json"
    options = {"--data": tmp_path / "prompts", "--checkpoint": tmp_path / "tuned", "--output": result}
    assert stage("evaluate", {**options, "--event": "buy", "--baselines": "false"}) == 0
    assert json.loads(result.read_text())["results"].keys() == {"recgpt_1", "recgpt"}


@pytest.mark.parametrize("choice", [{"--events.history": "view,buy", "--events.targets": "buy=4,view=0.5"}])
def test_a_stopped_run_resumes_to_the_same_bits(folder, tmp_path, choice):
    options = {"--data": folder / "data", **SHORT, **choice}
    assert stage("pretrain", {**options, "--output": tmp_path / "whole"}) == 0
    stopped = checkpoints(tmp_path / "whole")[1]
    shutil.copytree(stopped, tmp_path / "resumed/checkpoints" / stopped.name)
    shutil.copy(tmp_path / "whole/run.json", tmp_path / "resumed")
    assert stage("pretrain", {**options, "--output": tmp_path / "resumed"}) == 0
    mine, theirs = (tensors(checkpoints(tmp_path / run)[-1]) for run in ("resumed", "whole"))
    assert mine.keys() == theirs.keys() and any("features.asked_event" in name for name in mine)
    for name, value in theirs.items():
        assert torch.equal(mine[name], value), name


def test_a_run_on_a_later_day_starts_from_one_that_knew_fewer_types_or_none(folder, tmp_path):
    options = {"vocabulary": str(folder / "data"), "event_column": "event", "hold_out": "last"}
    make(write_log(tmp_path / "log.csv", USERS, ("view", "buy", "wish")), tmp_path / "data", **options)
    assert Dataset.open(str(tmp_path / "data")).manifest.events == ["view", "buy", "wish"]
    run = {"--data": tmp_path / "data", "--output": tmp_path / "run", "--initial": folder / "run", **SHORT}
    assert stage("pretrain", {**run, "--optimizer.lr": 0}) == 0
    best = json.loads((folder / "run/best.json").read_text())["checkpoint"]
    before, after = tensors(folder / "run/checkpoints" / best), tensors(checkpoints(tmp_path / "run")[0])
    for name in ("event", "asked_event"):
        key = f"model.dense.decoder.features.{name}.weight"
        assert after[key].shape == (4, 32) and before[key].shape == (3, 32)
        assert torch.equal(after[key][:3], before[key]) and not after[key][3].any(), "a rate of 0 moves nothing"
        assert after[f"optimizer.state.{key.removeprefix('model.')}.exp_avg_sq"].shape == (4, 32)
    plain = {"--events.input": "false", "--events.ask": "false"}
    first = {"--data": folder / "data", "--output": tmp_path / "plain", **SHORT, **plain}
    assert stage("pretrain", first) == 0
    assert not any("features" in name for name in tensors(checkpoints(tmp_path / "plain")[-1]))
    run |= {"--output": tmp_path / "second", "--initial": tmp_path / "plain"}
    assert stage("pretrain", run) == 0
    assert tensors(checkpoints(tmp_path / "second")[-1])["model.dense.decoder.features.event.weight"].any()


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("evaluate", {"--event": "by"}, "--event by: {data} has no such event type; it has view, buy"),
        ("evaluate", {"--event": "view"}, "no user with a history that the model reads has a test item of the event"),
        ("export", {"--event": "by"}, "--event by: the checkpoint .* was trained without events of this type"),
    ],
)
def test_types_that_nobody_knows_are_refused(folder, tmp_path, capsys, name, options, message):
    given = {"--data": folder / "data", "--checkpoint": folder / "run", "--output": tmp_path / "new"}
    assert stage(name, {**given, **options}) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and not (tmp_path / "new").exists()
    assert re.search(message.format(data=folder / "data"), error), error


def test_a_dataset_without_types_and_a_checkpoint_with_them_do_not_fit(folder, tmp_path, capsys):
    make(folder / "log.csv", tmp_path / "data")
    given = {"--data": tmp_path / "data", "--checkpoint": folder / "run", "--output": tmp_path / "new.json"}
    assert stage("evaluate", given) == 2
    assert "reads the event types view, buy, and" in capsys.readouterr().err
    assert stage("evaluate", {**given, "--event": "buy"}) == 2
    run = {"--data": tmp_path / "data", "--output": tmp_path / "run", **SHORT}
    assert stage("pretrain", {**run, "--events.targets": "buy"}) == 2
    assert f"--events.targets buy: {tmp_path / 'data'} has no event types" in capsys.readouterr().err
    assert stage("pretrain", run) == 0
    exported = {"--data": tmp_path / "data", "--checkpoint": tmp_path / "run", "--output": tmp_path / "vectors"}
    assert stage("export", {**exported, "--event": "buy"}) == 2
    assert "is not told which event type is asked for" in capsys.readouterr().err
