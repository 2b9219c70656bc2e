"""Runs of a number of steps, and validations within an epoch: every batch once, and nothing else changes."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from recgpt_torchrec.data.dataset import Manifest
from recgpt_torchrec.distributed.signals import Stopped
from recgpt_torchrec.evaluation.validation import Validation
from recgpt_torchrec.training.run import describe_users
from recgpt_torchrec.training.runlog import TIMINGS
from tests.support import SMALL, read_epochs, read_files, stage, walks, write_dataset

USERS, ITEMS = 90, 30
PLAIN = {**SMALL, "--saving.keep": 100, "--train.patience": 0, "--train.precision": "fp32"}


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by name, read without the code under test."""
    metadata = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return state


def assert_same(one: Path, other: Path, *, rtol: float = 0, atol: float = 0) -> None:
    """The same tensors in two checkpoints: to the last bit without a tolerance."""
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=rtol, atol=atol, msg=name)


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").iterdir())


def metadata(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "checkpoint.json").read_text())


def without_timings(run: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in read_epochs(run)]


def keep_until(whole: Path, step: int, interrupted: Path) -> None:
    """Copy a run as a kill leaves it once the checkpoint of `step` is committed; its history is further."""
    (interrupted / "checkpoints").mkdir(parents=True)
    for name in ("run.json", "history.jsonl"):
        shutil.copy(whole / name, interrupted)
    for checkpoint in checkpoints(whole):
        if checkpoint.name <= f"step-{step:08d}":
            shutil.copytree(checkpoint, interrupted / "checkpoints" / checkpoint.name)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steps") / "data"
    write_dataset(folder, walks(USERS, ITEMS, shortest=1, longest=14), items=ITEMS, rows_per_group=8, groups_per_part=4)
    return folder


def trained(data: Path, output: Path, **options: Any) -> Path:
    given = {f"--{name.replace('__', '.')}": value for name, value in options.items()}
    assert stage("pretrain", {"--data": data, "--output": output, **PLAIN, **given}) == 0
    return output


@pytest.fixture(scope="module")
def plain(data: Path) -> Path:
    """A run that validates at the ends of its epochs alone."""
    return trained(data, data.parent / "plain")


@pytest.fixture(scope="module")
def often(data: Path) -> Path:
    """The same run, which also validates after every three steps."""
    return trained(data, data.parent / "often", train__validate_steps=3)


@pytest.fixture(scope="module")
def by_steps(data: Path) -> Path:
    """A run of 13 steps, which end within an epoch."""
    return trained(data, data.parent / "by_steps", train__steps=13, train__validate_steps=3)


def test_validations_within_an_epoch_change_no_weight_and_lose_no_batch(plain: Path, often: Path) -> None:
    assert checkpoints(plain)[-1].name == checkpoints(often)[-1].name
    assert_same(checkpoints(often)[-1], checkpoints(plain)[-1])
    ends = [line for line in without_timings(often) if "partial" not in line]
    for ours, theirs in zip(ends, without_timings(plain), strict=True):
        assert ours == {**theirs, "loss": pytest.approx(theirs["loss"], rel=1e-12)}


def test_each_validation_within_an_epoch_has_a_line_and_a_checkpoint(often: Path) -> None:
    lines = read_epochs(often)
    first, last = (line["step"] for line in lines if "partial" not in line)
    within = [line for line in lines if line.get("partial")]
    assert [line["step"] for line in within] == [step for step in range(3, last, 3) if step != first]
    assert [line["epoch"] for line in within] == [1 + (line["step"] > first) for line in within]
    assert all({"loss", "NDCG@10", "HR@10"} <= line.keys() for line in within)
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)) and [c.name for c in checkpoints(often)] == [f"step-{s:08d}" for s in steps]
    for line, checkpoint in zip(lines, checkpoints(often), strict=True):
        progress = metadata(checkpoint)["progress"]
        assert (progress["validated"], progress["step"]) == (line["step"], line["step"])
    best = max(lines, key=lambda line: (line["NDCG@10"], -line["step"]))
    expected = {"checkpoint": f"step-{best['step']:08d}", "epoch": best["epoch"], "value": best["NDCG@10"]}
    assert json.loads((often / "best.json").read_text()).items() >= expected.items()


def test_the_best_checkpoint_of_an_epoch_s_middle_is_kept(data: Path, tmp_path: Path) -> None:
    # Without learning, no later validation is better than the first.
    still = {"tables__lr": 0, "tables__user_lr": 0, "optimizer__lr": 0}
    run = trained(data, tmp_path / "run", train__validate_steps=3, saving__keep=1, **still)
    best = json.loads((run / "best.json").read_text())
    assert best["checkpoint"] == "step-00000003" and best["epoch"] == 1
    assert [c.name for c in checkpoints(run)] == ["step-00000003", f"step-{read_epochs(run)[-1]['step']:08d}"]


@pytest.mark.parametrize("after", [3, 6])
def test_a_run_resumed_from_a_validation_within_an_epoch_equals_an_uninterrupted_one(
    after: int, often: Path, data: Path, tmp_path: Path
) -> None:
    keep_until(often, after, tmp_path / "run")
    resumed = trained(data, tmp_path / "run", train__validate_steps=3)
    assert_same(checkpoints(resumed)[-1], checkpoints(often)[-1], rtol=1e-5, atol=1e-6)
    assert [c.name for c in checkpoints(resumed)] == [c.name for c in checkpoints(often)]
    for ours, theirs in zip(without_timings(resumed), without_timings(often), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("options", [{"--train.validate_steps": 3}, {"--train.validate_steps": 3, "--train.steps": 13}])
def test_a_run_stopped_within_a_validation_resumes_with_it(
    options: dict[str, Any], often: Path, by_steps: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = by_steps if "--train.steps" in options else often
    arguments = {"--data": data, "--output": tmp_path / "run", **PLAIN, **options}
    measure, calls = Validation.__call__, []

    def stop_at_first(self: Validation) -> dict[str, float]:
        calls.append(self)
        if len(calls) in (1, 4, 8):
            raise Stopped
        return measure(self)

    monkeypatch.setattr(Validation, "__call__", stop_at_first)
    for stopped_after in (3, 8, 13 if whole == by_steps else 15):
        assert stage("pretrain", arguments) not in (0, 2)
        progress = metadata(checkpoints(tmp_path / "run")[-1])["progress"]
        assert progress["step"] >= stopped_after > progress["validated"] and not progress["finished"]
    assert stage("pretrain", arguments) == 0
    assert without_timings(tmp_path / "run") == [
        {name: pytest.approx(value, rel=1e-4) for name, value in line.items()} for line in without_timings(whole)
    ]
    assert_same(checkpoints(tmp_path / "run")[-1], checkpoints(whole)[-1], rtol=1e-5, atol=1e-6)
    assert (
        json.loads((tmp_path / "run/best.json").read_text())["checkpoint"]
        == (json.loads((whole / "best.json").read_text())["checkpoint"])
    )


# ----------------------------------------------------------------------------------------------------- train.steps


def test_a_run_of_steps_ends_after_them_within_an_epoch(by_steps: Path, plain: Path, capfd: Any) -> None:
    progress = metadata(checkpoints(by_steps)[-1])["progress"]
    epoch_steps = read_epochs(plain)[0]["step"]
    assert (progress["step"], progress["finished"], progress["validated"]) == (13, True, 13)
    assert progress["position"]["epoch"] == 13 // epoch_steps == 1 and progress["position"]["queues"]
    last = read_epochs(by_steps)[-1]
    assert (last["step"], last["partial"]) == (13, True) and {"NDCG@10", "train_s", "targets_per_s"} <= last.keys()


def test_the_learning_rate_spans_the_steps(data: Path, by_steps: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trained(data, tmp_path / "run", train__steps=40, optimizer__final_lr=0.1, optimizer__warmup_steps=0)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    shares = {event.step: event.value for event in events.Scalars("train/lr_share")}
    expected = {step: 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 1) / 40)) / 2 for step in (20, 40)}
    assert shares == pytest.approx(expected, rel=1e-5)
    assert metadata(checkpoints(run)[-1])["progress"]["position"]["epoch"] >= 3  # epochs are no limit


def test_a_run_of_steps_is_trained_already_and_refuses_more_steps(by_steps: Path, data: Path, capfd: Any) -> None:
    before = read_files(by_steps)
    options = {"--data": data, "--output": by_steps, **PLAIN, "--train.steps": 13, "--train.validate_steps": 3}
    assert stage("pretrain", options) == 0
    said = capfd.readouterr().out
    assert "is already trained" in said and "step " in said
    assert stage("pretrain", {**options, "--train.steps": 20}) == 2
    said = capfd.readouterr().err
    assert "--train.steps: 13 there, 20 now" in said and "ends with its last step" in said and "--initial" in said
    assert read_files(by_steps) == before


@pytest.mark.parametrize("after", [3, 12])
def test_a_run_of_steps_that_was_killed_equals_one_left_alone(
    after: int, by_steps: Path, data: Path, tmp_path: Path
) -> None:
    keep_until(by_steps, after, tmp_path / "run")
    resumed = trained(data, tmp_path / "run", train__steps=13, train__validate_steps=3)
    assert_same(checkpoints(resumed)[-1], checkpoints(by_steps)[-1], rtol=1e-5, atol=1e-6)
    assert (
        metadata(checkpoints(resumed)[-1])["progress"]["position"]
        == (metadata(checkpoints(by_steps)[-1])["progress"]["position"])
    )
    assert [line["step"] for line in read_epochs(resumed)] == [line["step"] for line in read_epochs(by_steps)]


def test_a_run_starts_from_one_that_ended_within_an_epoch(by_steps: Path, data: Path, tmp_path: Path) -> None:
    further = trained(data, tmp_path / "further", initial=by_steps, train__steps=2)
    progress = metadata(checkpoints(further)[-1])["progress"]
    best = json.loads((by_steps / "best.json").read_text())["checkpoint"]
    assert progress["before"] == int(best.removeprefix("step-")) and progress["step"] == 2


def test_steps_that_end_with_an_epoch_end_it(plain: Path, data: Path, tmp_path: Path) -> None:
    steps = read_epochs(plain)[0]["step"]
    run = trained(data, tmp_path / "run", train__steps=steps)
    (line,) = read_epochs(run)
    assert line["step"] == steps and "partial" not in line
    assert metadata(checkpoints(run)[-1])["progress"]["position"] == {"epoch": 1, "queues": None}


def test_the_header_tells_steps_and_epochs(data: Path, tmp_path: Path, capfd: Any) -> None:
    trained(data, tmp_path / "run", train__steps=15, train__validate_steps=4)
    said = capfd.readouterr().out
    assert "  steps    at most 15, about " in said and "epochs\n" in said
    assert "  validation on all users, every 4 steps\n" in said


def test_the_users_that_are_validated_on_are_told() -> None:
    known = Manifest(users=9, preparation={"split": {"validation_users": 22363}})
    assert describe_users(known, 1000) == "1,000 of 22,363 users (sample)"
    assert describe_users(known, 0) == "all 22,363 users"
    assert describe_users(Manifest(users=9), 5) == "a sample of 5 users"


def test_a_run_validates_on_a_sample_and_says_so(data: Path, tmp_path: Path, capfd: Any) -> None:
    run = trained(data, tmp_path / "run", train__validate_users=10)
    assert capfd.readouterr().out.count("a sample of 10 users") == 2  # header and summary
    for line in read_epochs(run):
        assert line["HR@10"] * 10 == pytest.approx(round(line["HR@10"] * 10))


def test_patience_counts_from_the_start_whose_validation_is_not_lost_to_a_stop(
    by_steps: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on from a good model with a learning rate that spoils it."""
    output, measure, calls = tmp_path / "run", Validation.__call__, []
    options = {**PLAIN, "--initial": by_steps, "--train.validate_start": "true", "--train.patience": 2}
    options |= {"--tables.lr": 50, "--optimizer.lr": 1, "--train.epochs": 5, "--saving.keep": 9}

    def stop_at_first(self: Validation) -> dict[str, float]:
        calls.append(self)
        if len(calls) == 1:
            raise Stopped
        return measure(self)

    monkeypatch.setattr(Validation, "__call__", stop_at_first)
    arguments = {"--data": data, "--output": output, **options}
    assert stage("pretrain", arguments) not in (0, 2) and not (output / "history.jsonl").exists()
    assert stage("pretrain", arguments) == 0
    lines = read_epochs(output)
    assert [line["epoch"] for line in lines] == [0, 1, 2] and lines[0]["step"] == 0
    assert max(lines[1:], key=lambda line: line["NDCG@10"])["NDCG@10"] < lines[0]["NDCG@10"]
    best = json.loads((output / "best.json").read_text())
    assert (best["checkpoint"], best["epoch"], best["value"]) == ("step-00000000", 0, lines[0]["NDCG@10"])
