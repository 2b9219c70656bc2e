"""A teacher's answers: made with neighbours by `generate_prompts`, learnt by `pretrain --soft_targets`."""

import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from recgpt_torchrec.data.dataset import Dataset
from tests.support import SMALL, read_epochs, read_sequences, stage, walks, write_dataset
from tests.test_pretrain import checkpoints, tensors
from tools.ranks import run_ranks

USERS, ITEMS, ANSWERS = 40, 30, 5
TRAIN = {
    **SMALL,
    "--model.max_len": 8,
    "--loss.candidates": "all",
    "--train.epochs": 1,
    "--train.precision": "fp32",
    "--saving.every_steps": 2,
    "--saving.keep": 100,
}
ONE_STEP = {
    **TRAIN,
    "--batch.tokens": 2000,
    "--batch.thinning": 0,
    "--model.dropout": 0,
    "--model.attention_dropout": 0,
    "--model.user_dropout": 0,
}
"""All of an epoch is one step, on any number of ranks, and nothing is drawn at random."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A dataset, its neighbours, a teacher and its answers."""
    folder = tmp_path_factory.mktemp("teacher")
    write_dataset(
        folder / "data", walks(USERS, ITEMS, shortest=4, longest=14), items=ITEMS, rows_per_group=8, groups_per_part=2
    )
    assert stage("find_neighbours", {"--data": folder / "data", "--output": folder / "neighbours"}) == 0
    assert stage("pretrain", {"--data": folder / "data", "--output": folder / "run", **TRAIN}) == 0
    assert stage("generate_prompts", answering(folder, folder / "answers")) == 0
    return folder


def answering(folder: Path, output: Path, **changed: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"--data": folder / "data", "--checkpoint": folder / "run", "--output": output}
    options |= {"--prompts.k": 0, "--prompts.answers": ANSWERS, "--neighbours.path": folder / "neighbours"}
    return options | {f"--{name.replace('__', '.')}": value for name, value in changed.items()}


def losses(output: Path) -> list[float]:
    return [epoch["loss"] for epoch in read_epochs(output) if epoch["epoch"]]


def test_answers_alone_leave_the_histories_as_they_are(folder):
    result, source = read_sequences(folder / "answers"), read_sequences(folder / "data")
    assert {name: result[name] for name in source} == source
    assert {s for row in result["segment_ids"] for s in row} == {0}
    assert [len(row) for row in result["answer_ids"]] == [ANSWERS * len(row) for row in source["item_ids"]]
    for items, answers in zip(source["item_ids"], result["answer_ids"], strict=True):
        training = items[:-2] if len(items) >= 3 else items
        assert not {*training} & {*answers} and max(answers, default=0) >= 0
    record = Dataset.open(str(folder / "answers")).manifest.settings["prompts"]
    assert record["neighbours"].pop("fingerprint") and record["k"] == 0
    assert record["neighbours"] == {"path": None, "weight": 2.0, "memory": 10, "recency": 0.7}


def test_where_neighbours_are_does_not_matter_and_which_they_are_does(folder, tmp_path, capfd):
    shutil.copytree(folder / "neighbours", tmp_path / "moved")
    assert stage("generate_prompts", answering(folder, folder / "answers", neighbours__path=tmp_path / "moved")) == 0
    said = capfd.readouterr().out
    assert "Already there" in said and "recgpt_torchrec.pretrain" in said and "--soft_targets 0.3" in said
    assert stage("find_neighbours", {"--data": folder / "data", "--output": tmp_path / "one", "--count": 1}) == 0
    for changed in ({"neighbours__path": tmp_path / "one"}, {"neighbours__weight": 4}, {"neighbours__path": None}):
        assert stage("generate_prompts", answering(folder, folder / "answers", **changed)) == 2
        assert "neighbours" in capfd.readouterr().err


def on_rank(rank: int, world_size: int, ports: list[int], runs: list[tuple[str, dict[str, Any]]]) -> list[int]:
    dist.destroy_process_group()  # the stages join their own
    statuses = []
    for port, (name, options) in zip(ports, runs, strict=True):
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        statuses.append(stage(name, options))
    return statuses


def test_two_ranks_make_the_same_answers_and_have_the_losses_of_one(folder, tmp_path):
    learning = {"--data": folder / "answers", **ONE_STEP, "--train.epochs": 2, "--soft_targets": 0.4}
    assert stage("pretrain", {**learning, "--output": tmp_path / "one"}) == 0
    with socket.create_server(("127.0.0.1", 0)) as free, socket.create_server(("127.0.0.1", 0)) as other:
        ports = [each.getsockname()[1] for each in (free, other)]
    runs = [
        ("generate_prompts", answering(folder, tmp_path / "out", batch_users=3)),
        ("pretrain", {**learning, "--output": tmp_path / "two"}),
    ]
    assert run_ranks(on_rank, 2, ports, runs, timeout=120) == [[0, 0], [0, 0]]
    mine, theirs = read_sequences(tmp_path / "out"), read_sequences(folder / "answers")
    assert mine["answer_ids"] == theirs["answer_ids"] and mine["item_ids"] == theirs["item_ids"]
    torch.testing.assert_close(
        torch.tensor(sum(mine["answer_scores"], [])), torch.tensor(sum(theirs["answer_scores"], []))
    )
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 2 and two == pytest.approx(one, rel=1e-4)


@pytest.fixture(scope="module")
def second(folder) -> Path:
    """The answers of another teacher."""
    assert stage("pretrain", {"--data": folder / "data", "--output": folder / "run_2", **TRAIN, "--seed": 1}) == 0
    assert stage("generate_prompts", answering(folder, folder / "second", checkpoint=folder / "run_2")) == 0
    return folder / "second"


def test_answers_of_two_teachers_are_those_with_the_highest_mean_scores(folder, second, tmp_path, capfd):
    averaged = answering(folder, tmp_path / "mean", averaged_with=second)
    assert stage("generate_prompts", averaged) == 0
    assert f"answers averaged with those of {second}" in capfd.readouterr().out
    lists = [read_sequences(path) for path in (folder / "answers", second)]
    mean = read_sequences(tmp_path / "mean")
    assert mean["item_ids"] == lists[0]["item_ids"]
    changed = 0
    for row, (ids, scores) in enumerate(zip(mean["answer_ids"], mean["answer_scores"], strict=True)):
        for at in range(0, len(ids), ANSWERS):
            place = slice(at, at + ANSWERS)
            expected = reference_mean(
                [(each["answer_ids"][row][place], each["answer_scores"][row][place]) for each in lists]
            )
            assert ids[place] == [item for item, _ in expected]
            assert scores[place] == pytest.approx([score for _, score in expected], rel=1e-5)
            changed += ids[place] != lists[0]["answer_ids"][row][place]
    assert changed
    assert stage("generate_prompts", averaged) == 0 and "Already there" in capfd.readouterr().out
    assert stage("generate_prompts", answering(folder, tmp_path / "mean")) == 2
    assert "averaged_with" in capfd.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    runs = [("generate_prompts", answering(folder, tmp_path / "two", averaged_with=second, batch_users=3))]
    assert run_ranks(on_rank, 2, [port], runs, timeout=120) == [[0], [0]]
    assert read_sequences(tmp_path / "two")["answer_ids"] == mean["answer_ids"]


def reference_mean(lists: list[tuple[list[int], list[float]]]) -> list[tuple[int, float]]:
    """A list that lacks an item counts with its lowest score."""
    known = [{item: score for item, score in zip(*each, strict=True) if item >= 0} for each in lists]
    lowest = [min(each.values(), default=0.0) for each in known]
    items = {item for each in known for item in each}
    means = {
        item: sum(each.get(item, low) for each, low in zip(known, lowest, strict=True)) / len(lists) for item in items
    }
    best = sorted(means.items(), key=lambda pair: (-pair[1], pair[0]))[:ANSWERS]
    return best + (ANSWERS - len(best)) * [(-1, 0.0)]


def test_what_cannot_be_averaged_is_refused(folder, second, tmp_path, capfd):
    assert stage("generate_prompts", answering(folder, tmp_path / "mean", averaged_with=second)) == 0
    weighed = answering(folder, tmp_path / "weighed", checkpoint=folder / "run_2", neighbours__weight=4)
    assert stage("generate_prompts", weighed) == 0
    for others, changed, said in (
        (folder / "answers", {}, "made by the same checkpoint as --checkpoint"),
        (tmp_path / "mean", {"checkpoint": folder / "run_2"}, "is a mean of several already"),
        (tmp_path / "weighed", {}, "holds another folder of answers"),
        (folder / "data", {}, "is no folder of answers alone"),
        (tmp_path / "nowhere", {}, "is not a dataset"),
        (second, {"prompts__k": 1}, "--averaged_with averages answers alone"),
        (second, {"previous": second, "neighbours__path": None}, "leave one out"),
    ):
        capfd.readouterr()
        words = answering(folder, tmp_path / "out", averaged_with=others, **changed)
        assert stage("generate_prompts", words) == 2
        assert said in capfd.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("k", [0, 1])
def test_the_loss_is_that_of_tuning_on_the_same_answers_without_prompts(folder, tmp_path, k):
    """Both begin as the teacher and take one step, whose loss is computed before it."""
    data = folder / "answers"
    if k:
        data = tmp_path / "prompted"
        assert stage("generate_prompts", answering(folder, data, prompts__k=1)) == 0
        assert any(1 in row for row in read_sequences(data)["segment_ids"])
    common = {"--data": data, "--batch.tokens": 2000, "--loss.candidates": "all", "--train.epochs": 1}
    found = {}
    for share in (0, 0.4, 1):
        options = {**ONE_STEP, **common, "--initial": folder / "run", "--soft_targets": share}
        assert stage("pretrain", {**options, "--output": tmp_path / f"run_{share}"}) == 0
        (found[share],) = losses(tmp_path / f"run_{share}")
    tuning = {"--checkpoint": folder / "run", "--tuning.prompts": "false", "--tuning.soft_targets": 0.4}
    dropout = {name: value for name, value in ONE_STEP.items() if "dropout" in name or "precision" in name}
    layers = {name: value for name, value in SMALL.items() if name.startswith("--model.")}
    tuning |= {**common, **layers, **dropout, "--model.max_len": 8, "--batch.thinning": 0}
    assert stage("prompt_tune", {**tuning, "--output": tmp_path / "tuned"}) == 0
    assert [found[0.4]] == pytest.approx(losses(tmp_path / "tuned"), rel=1e-5)
    # Cross-entropy is linear in the share; targets without any answer keep all of their weight.
    assert found[0.4] == pytest.approx(0.6 * found[0] + 0.4 * found[1], rel=1e-5)
    assert abs(found[0] - found[1]) > 1e-3


def test_by_default_answers_are_not_read_and_a_resumed_run_is_the_same(folder, tmp_path):
    for data in ("data", "answers"):
        assert stage("pretrain", {"--data": folder / data, "--output": tmp_path / data, **ONE_STEP}) == 0
    assert losses(tmp_path / "answers") == pytest.approx(losses(tmp_path / "data"), rel=1e-6)
    options = {"--data": folder / "answers", **TRAIN, "--soft_targets": 0.4}
    assert stage("pretrain", {**options, "--output": tmp_path / "whole"}) == 0
    assert losses(tmp_path / "whole") != pytest.approx(losses(folder / "run"), rel=1e-3)
    whole, half = checkpoints(tmp_path / "whole"), tmp_path / "half"
    assert len(whole) > 1
    (half / "checkpoints").mkdir(parents=True)
    shutil.copy(tmp_path / "whole/run.json", half)
    shutil.copytree(whole[0], half / "checkpoints" / whole[0].name)
    assert stage("pretrain", {**options, "--output": half}) == 0
    mine, theirs = tensors(checkpoints(half)[-1]), tensors(whole[-1])
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"prompts__answers": 0}, "--prompts.answers is 0; give a number of answers"),
        ({"prompts__source": "exposed"}, "nothing is generated with --prompts.source exposed"),
        ({"previous": "answers"}, "none can be reused; leave --previous out"),
        ({"neighbours__path": "foreign"}, "they are of other items than those of"),
        ({"neighbours__path": "nowhere"}, "nowhere"),
        ({"neighbours__weight": 0}, "--neighbours.weight is 0"),
        ({"neighbours__memory": 21}, "--neighbours.memory is 21"),
    ],
)
def test_answers_that_cannot_be_made_are_refused_before_any_work(folder, tmp_path, capfd, changed, said):
    if "foreign" in changed.values() and not (folder / "foreign").exists():
        write_dataset(folder / "other", walks(USERS, ITEMS), items=ITEMS, vocabulary="another")
        assert stage("find_neighbours", {"--data": folder / "other", "--output": folder / "foreign"}) == 0
    named = {
        name: folder / value if name in ("previous", "neighbours__path") else value for name, value in changed.items()
    }
    capfd.readouterr()
    assert stage("generate_prompts", answering(folder, tmp_path / "out", **named)) == 2
    error = capfd.readouterr().err
    assert said in error and "Traceback" not in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"--data": "data"}, "holds no answers of a model; run generate_prompts with --prompts.answers"),
        ({"--loss.candidates": "bce"}, "--soft_targets is 0.4, but --loss.candidates bce has no softmax"),
        ({"--soft_targets": 1.5}, "it must be from 0 to 1"),
        ({"--neighbours.path": "neighbours", "--neighbours.share": 0.7}, "together they must be at most 1"),
    ],
)
def test_soft_targets_that_cannot_be_learnt_are_refused_before_any_work(folder, tmp_path, capfd, changed, said):
    options = {**TRAIN, "--data": "answers", "--soft_targets": 0.4, **changed}
    options |= {name: folder / options[name] for name in ("--data", "--neighbours.path") if name in options}
    assert stage("pretrain", {**options, "--output": tmp_path / "run"}) == 2
    error = capfd.readouterr().err
    assert said in error and "Traceback" not in error and not (tmp_path / "run").exists()
