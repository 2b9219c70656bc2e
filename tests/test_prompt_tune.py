"""`prompt_tune` and the recall paths of `evaluate` from the command line: what they write, and what they refuse."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from recgpt_torchrec.checkpoints.folder import find_checkpoint
from tests.support import SMALL, read_epochs, stage, walks, write_dataset

USERS, ITEMS = 60, 30
LOSS = {"--loss.candidates": "all", "--batch.tokens": 60}
TUNE = {**LOSS, "--train.epochs": 2, "--optimizer.warmup_steps": 2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A dataset, a model pre-trained on it, and its prompts."""
    folder = tmp_path_factory.mktemp("tune")
    write_dataset(folder / "data", walks(USERS, ITEMS, shortest=4, longest=14), items=ITEMS)
    training = {**SMALL, "--model.max_len": 8, **TUNE}
    assert stage("pretrain", {"--data": folder / "data", "--output": folder / "run", **training}) == 0
    options = {"--data": folder / "data", "--checkpoint": folder / "run", "--output": folder / "prompts"}
    assert stage("generate_prompts", {**options, "--prompts.k": 1}) == 0
    return folder


@pytest.fixture(scope="module")
def tuned(inputs) -> Path:
    options = {"--data": inputs / "prompts", "--checkpoint": inputs / "run", "--output": inputs / "tuned", **TUNE}
    assert stage("prompt_tune", options) == 0
    return inputs / "tuned"


def test_a_preset_chooses_loss_and_length_and_leaves_the_model_to_the_checkpoint(inputs, tmp_path):
    options = {"--data": inputs / "prompts", "--checkpoint": inputs / "run", "--output": tmp_path / "run"}
    assert stage("prompt_tune", {**options, "--preset": "auto", "--train.epochs": 1}) == 0
    recorded = [json.loads((run / "run.json").read_text())["config"] for run in (tmp_path / "run", inputs / "run")]
    assert recorded[0]["model"] == recorded[1]["model"] and recorded[0]["preset"] == "auto"
    assert recorded[0]["loss"]["candidates"] == "all" and recorded[0]["train"]["patience"] == 0
    assert [line["epoch"] for line in read_epochs(tmp_path / "run")] == [0, 1]


def figures(inputs: Path, checkpoint: Path, data: str, name: str, **options: Any) -> dict[str, Any]:
    output = inputs / f"{name}.json"
    arguments = {"--data": inputs / data, "--checkpoint": checkpoint, "--output": output, "--baselines": "false"}
    assert stage("evaluate", {**arguments, **options}) == 0
    return json.loads(output.read_text())


def tensor(checkpoint: Path, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    state = {name: torch.empty(shape)}
    dcp.load(state, checkpoint_id=find_checkpoint(str(checkpoint)))
    return state[name]


def test_a_tuned_checkpoint_has_a_table_of_its_own_and_segments(inputs, tuned):
    output = tensor(tuned, "model.tables.embedding_bags.output.weight", (ITEMS, 8))
    items = tensor(tuned, "model.tables.embedding_bags.item.weight", (ITEMS, 8))
    before = tensor(inputs / "run", "model.tables.embedding_bags.item.weight", (ITEMS, 8))
    segments = tensor(tuned, "model.dense.decoder.segment.weight", (3, 8))
    # Both began as the pre-trained table and have each gone a way of their own, not far.
    assert 0 < (output - before).norm() < before.norm() and 0 < (items - before).norm() < before.norm()
    assert not torch.equal(output, items)
    assert segments[1].abs().max() > 0  # generated entries were read
    assert torch.equal(segments[2], torch.zeros(8))  # none were shown


def test_every_recall_path_is_measured(inputs, tuned):
    prompted = figures(inputs, tuned, "prompts", "recgpt", **{"--recall.interests": 3})
    names = {"recgpt_1", "recgpt", "recgpt_1_interests_3_quota", "recgpt_1_interests_3_score"}
    assert set(prompted["results"]) == names
    chosen = prompted["recall"]
    assert chosen["m"] + chosen["n"] == 10
    best = max(chosen["validation"].values())
    assert chosen["validation"][f"{chosen['m']}_{chosen['n']}"] == best
    plain = figures(inputs, inputs / "run", "data", "plain", **{"--recall.m": 10})
    assert set(plain["results"]) == {"pretrain", "pretrain_two_step"}
    # Ten of the first interest and none of the second is the one-step list itself.
    for how in ("masked", "unmasked"):
        assert plain["results"]["pretrain_two_step"][how] == pytest.approx(plain["results"]["pretrain"][how])


def test_tuning_starts_from_exactly_the_pre_trained_parameters(inputs):
    """Fine-tuning with learning rates of 0 scores as the pre-trained model does, through W_l as well."""
    options = {"--data": inputs / "prompts", "--checkpoint": inputs / "run", "--output": inputs / "still", **TUNE}
    still = {"--tables.lr": 0, "--tables.user_lr": 0, "--optimizer.lr": 0, "--tuning.prompts": "false"}
    assert stage("prompt_tune", {**options, **still}) == 0
    plain = figures(inputs, inputs / "run", "data", "before", **{"--recall.m": 5})
    after = figures(inputs, inputs / "still", "prompts", "after", **{"--recall.m": 5})
    for how in ("masked", "unmasked"):
        assert after["results"]["fine_tuning"][how] == pytest.approx(plain["results"]["pretrain"][how])


@pytest.mark.parametrize("resumed", [False, True])
def test_tuning_that_makes_the_model_worse_ends_with_the_one_it_began_with(inputs, tmp_path, capfd, resumed):
    """The start is validated as `evaluate` would do it, and kept; also where the run is stopped in its first epoch."""
    run = tmp_path / "spoilt"
    options = {"--data": inputs / "prompts", "--checkpoint": inputs / "run", "--output": run, **TUNE}
    options |= {"--tuning.prompts": "false", "--tables.lr": 50, "--optimizer.lr": 1, "--saving.keep": 9}
    assert stage("prompt_tune", options) == 0
    lines = read_epochs(run)
    if resumed:
        for checkpoint in ("step-*[1-9]*", "best.json"):
            for path in [*(run / "checkpoints").glob(checkpoint), *run.glob(checkpoint)]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        capfd.readouterr()
        assert stage("prompt_tune", options) == 0
    assert [(line["epoch"], line["step"] > 0) for line in lines] == [(0, False), (1, True), (2, True)]
    again = read_epochs(run)
    assert [(line["epoch"], line["NDCG@10"]) for line in again] == [(line["epoch"], line["NDCG@10"]) for line in lines]
    plain = figures(inputs, inputs / "run", "data", "start", **{"--recall.m": 5, "--split": "validation"})
    assert lines[0]["NDCG@10"] == pytest.approx(plain["results"]["pretrain"]["masked"]["NDCG@10"])
    assert lines[0]["NDCG@10"] > max(line["NDCG@10"] for line in lines[1:])
    best = json.loads((run / "best.json").read_text())
    assert (best["epoch"], best["checkpoint"], best["value"]) == (0, "step-00000000", lines[0]["NDCG@10"])
    kept = figures(inputs, run, "data", "kept", **{"--recall.m": 5, "--split": "validation"})
    assert kept["results"]["fine_tuning"]["masked"] == pytest.approx(plain["results"]["pretrain"]["masked"])
    assert "before the first step (no epoch was better), in " in capfd.readouterr().out


def test_only_the_named_parameters_are_trained(inputs):
    options = {"--data": inputs / "prompts", "--checkpoint": inputs / "run", "--output": inputs / "part", **TUNE}
    assert stage("prompt_tune", {**options, "--tuning.trained": "[output]"}) == 0
    for name, shape in {
        "model.tables.embedding_bags.item.weight": (ITEMS, 8),
        "model.tables.embedding_bags.user.weight": (USERS, 8),
        "model.dense.decoder.position.weight": (8, 8),
    }.items():
        assert torch.equal(tensor(inputs / "part", name, shape), tensor(inputs / "run", name, shape)), name
    output = tensor(inputs / "part", "model.tables.embedding_bags.output.weight", (ITEMS, 8))
    assert not torch.equal(output, tensor(inputs / "run", "model.tables.embedding_bags.item.weight", (ITEMS, 8)))


def test_answers_become_soft_targets_and_are_the_same_without_prompts(inputs):
    """With all weight on the answers the model learns what it was taught, with prompts or without."""
    options = {"--data": inputs / "data", "--checkpoint": inputs / "run", "--output": inputs / "answers"}
    assert stage("generate_prompts", {**options, "--prompts.k": 1, "--prompts.answers": 3}) == 0
    losses = {}
    for prompts in ("true", "false"):
        for share in (0, 0.5):
            run = inputs / f"soft_{prompts}_{share}"
            options = {"--data": inputs / "answers", "--checkpoint": inputs / "run", "--output": run, **TUNE}
            options |= {"--tuning.prompts": prompts, "--tuning.soft_targets": share}
            assert stage("prompt_tune", options) == 0
            losses[prompts, share] = read_epochs(run)[1]["loss"]
    # The model's own answers are likelier than what came next: the loss falls where they share its place.
    for prompts in ("true", "false"):
        assert losses[prompts, 0.5] < losses[prompts, 0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--data": "data"}, "has no prompts"),
        ({"--checkpoint": "tuned"}, "was tuned already"),
        ({"--model.dim": 16}, "--model.dim is 16, the checkpoint"),
        ({"--checkpoint": "nowhere"}, "holds no finished checkpoint"),
        ({"--data": "other"}, "was trained on another dataset"),
        ({"--tuning.predict_from": "never"}, "tuning.predict_from"),
        ({"--tuning.soft_targets": 0.3}, "holds no answers of a model"),
        ({"--tuning.soft_targets": 1.5}, "it must be from 0 to 1"),
    ],
)
def test_unusable_input_is_refused_before_anything_is_written(inputs, tuned, capfd, changed, message):
    if not (inputs / "other").exists():
        write_dataset(inputs / "other", walks(USERS, ITEMS), items=ITEMS, vocabulary="another")
    arguments: dict[str, Any] = {"--data": "prompts", "--checkpoint": "run"} | changed
    if changed == {"--data": "other"}:
        arguments["--tuning.prompts"] = "false"
    for name in ("--data", "--checkpoint"):
        arguments[name] = inputs / arguments[name]
    assert stage("prompt_tune", {**arguments, "--output": inputs / "refused", **TUNE}) == 2
    said = capfd.readouterr().err
    assert message in said and "Traceback" not in said
    assert not (inputs / "refused").exists()


def test_an_m_beyond_the_list_is_refused(inputs, capfd):
    arguments = {"--data": inputs / "data", "--checkpoint": inputs / "run", "--output": inputs / "no.json"}
    assert stage("evaluate", {**arguments, "--recall.m": 11}) == 2
    assert "--recall.m is 11; it must be at most 10, the longest of --ks" in capfd.readouterr().err
