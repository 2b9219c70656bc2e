"""Attributes, event types, times, places and feedback at once: trained, tuned, stopped, resumed and evaluated."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recgpt_torchrec.data.dataset import Dataset
from tests.support import SMALL, stage
from tests.test_pretrain import checkpoints, tensors

USERS, ITEMS, LENGTH = 40, 25, 12
CLICKS = {
    "--click_column": "label",
    "--click_values": "click",
    "--dislike_values": "dislike",
    "--position_column": "place",
}
ATTRIBUTES = {"--item_attributes": "brand,tags:list", "--user_attributes": "age:number"}
OFTEN = {"--saving.every_steps": 3, "--saving.keep": 100}
PRETRAIN = {
    **SMALL,
    **OFTEN,
    "--model.dropout": 0.2,
    "--events.targets": "buy=3,view=0.5",
    "--time.use": ["past_gap", "next_gap", "hour", "weekday"],
    "--attributes.id_dropout": 0.3,
}
TUNE = {
    "--train.epochs": 2,
    "--batch.tokens": 120,
    "--tuning.places": "true",
    "--events.targets": "buy=2,view",
    **OFTEN,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with everything, a model pre-trained on it, and its refusals as prompts."""
    folder, rng = tmp_path_factory.mktemp("all"), np.random.default_rng(0)
    with (folder / "log.csv").open("w", newline="") as file:
        log = csv.writer(file)
        log.writerow(["user_id", "item_id", "timestamp", "label", "place", "event"])
        for user in range(USERS):
            time = 1_700_000_000 + int(rng.integers(10**6))
            for _ in range(int(rng.integers(4, LENGTH))):
                time += int(rng.choice([40, 5000, 200_000]))
                places = rng.permutation(5)[:3] + 1
                for place, item in zip(places, rng.permutation(ITEMS)[:3], strict=True):
                    label = "click" if place == places[0] else str(rng.choice(["dislike", "show"]))
                    log.writerow([f"u{user}", f"i{item}", time, label, place, rng.choice(["view", "buy"])])
    with (folder / "items.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["item_id", "brand", "tags"])
        # An item with many values, some with none, and one that is in no interaction.
        lists = [range(200), *(rng.integers(0, 200, rng.integers(0, 4)) for _ in range(ITEMS))]
        table.writerows([f"i{n}", f"b{n % 4}", "|".join(map(str, each))] for n, each in enumerate(lists))
    ages = "".join(f"u{user},{user % 7}\n" for user in range(0, USERS, 2))  # the others have no row
    (folder / "users.csv").write_text("user_id,age\n" + ages)
    made = {"--input": folder / "log.csv", "--output": folder / "data", "--event_column": "event", "--min_count": 1}
    made |= {"--items": folder / "items.csv", "--users": folder / "users.csv", "--catalogue": "items"}
    assert stage("prepare", {**made, **CLICKS, **ATTRIBUTES}) == 0
    assert stage("pretrain", {"--data": folder / "data", "--output": folder / "run", **PRETRAIN}) == 0
    given = {"--data": folder / "data", "--checkpoint": folder / "run", "--output": folder / "prompts"}
    assert stage("generate_prompts", {**given, "--prompts.source": "exposed", "--prompts.k": 3}) == 0
    return folder


def resume(whole: Path, output: Path, name: str, options: dict[str, Any]) -> None:
    """Resume a run from its third checkpoint beside the start's, in an epoch, and compare the results bit for bit."""
    assert stage(name, {**options, "--output": whole}) == 0
    stopped = [each for each in checkpoints(whole) if each.name != "step-00000000"][2]
    assert json.loads((stopped / "checkpoint.json").read_text())["progress"]["position"]["queues"], "within an epoch"
    shutil.copytree(stopped, output / "checkpoints" / stopped.name)
    shutil.copy(whole / "run.json", output)
    assert stage(name, {**options, "--output": output}) == 0
    mine, theirs = tensors(checkpoints(output)[-1]), tensors(checkpoints(whole)[-1])
    assert mine.keys() == theirs.keys()
    for each, value in theirs.items():
        assert torch.equal(mine[each], value), each


def test_pre_training_with_all_inputs_resumes_to_the_same_bits(folder, tmp_path):
    resume(folder / "run", tmp_path / "resumed", "pretrain", {"--data": folder / "data", **PRETRAIN})


def test_tuning_with_all_inputs_resumes_to_the_same_bits_and_is_evaluated(folder, tmp_path):
    manifest = Dataset.open(str(folder / "prompts")).manifest
    assert manifest.segments == 5 and len(manifest.attributes) == 3 and manifest.events == ["view", "buy"]
    options = {"--data": folder / "prompts", "--checkpoint": folder / "run", **TUNE}
    resume(folder / "tuned", tmp_path / "resumed", "prompt_tune", options)
    found = tensors(checkpoints(folder / "tuned")[-1])
    for name in ("features.place.weight", "features.next_gap.weight", "refused.at_output", "refused.at_input"):
        assert found[f"model.dense.decoder.{name}"].any(), name
    given = {"--data": folder / "prompts", "--checkpoint": folder / "tuned"}
    for more in ({}, {"--event": "buy"}):
        assert stage("evaluate", {**given, **more, "--output": tmp_path / f"{len(more)}.json"}) == 0
    assert stage("export", {**given, "--output": tmp_path / "vectors", "--event": "buy", "--interests": 2}) == 0
