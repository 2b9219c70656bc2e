"""A folder to which days are appended, trained day after day: each new target once, wherever the job is stopped."""

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from recgpt_torchrec import pretrain
from recgpt_torchrec.checkpoints.folder import find_checkpoint
from recgpt_torchrec.config import Pretrain, TimeChoice
from recgpt_torchrec.config.reports.plan import Plan
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.planning.workload import Workload
from recgpt_torchrec.retrieval.exports.reading import open_export
from tests.preparation.prepare_helpers import Row, random_log
from tests.preparation.test_append import append_day
from tests.support import SMALL, stage, stay_in_group
from tests.test_pretrain import checkpoints, tensors
from tools import observed_pretrain
from tools.observed_pretrain import observe, read_targets
from tools.ranks import run_ranks

OPTIONS = {**SMALL, "--loss.candidates": "all", "--saving.every_steps": 3, "--saving.keep": 100}
CUTS = [0, 300, 420, 560]
EPOCHS = 2


def log_of_days() -> list[list[Row]]:
    rows = sorted(random_log(CUTS[-1], users=30, items=40), key=lambda row: row[2])
    return [rows[first:last] for first, last in zip(CUTS, CUTS[1:], strict=False)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three days, and a run on the first two and then the third, of which every target was written down."""
    folder = tmp_path_factory.mktemp("days")
    with observing(folder / "trained.jsonl"):
        for number, rows in enumerate(log_of_days(), 1):
            append_day(folder, rows, number, hold_out="none", history=12)
            if number > 1:
                assert run(folder, folder / "run") == 0
            if number == 2:
                shutil.copytree(folder / "run", folder / "two")
    return folder


@contextlib.contextmanager
def observing(path: Path) -> Iterator[None]:
    """Write down every target that is trained within the `with`, see `tools.observed_pretrain`."""
    from recgpt_torchrec.data.stream import Share
    from recgpt_torchrec.training.trainer import Trainer

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((Share, "__iter__"), (Share, "done"), (Trainer, "fit")):
            patch.setattr(module, name, getattr(module, name))  # restored after the runs
        observe(str(path))
        yield


def run(folder: Path, output: Path, **more: Any) -> int:
    options = {"--data": folder / "data", "--output": output, **OPTIONS}
    return stage("pretrain", options | {f"--{name}": value for name, value in more.items()})


def expected_targets() -> list[Counter[tuple[str, str, str]]]:
    """Per day, (user, item before, item) of every interaction but the first of its user."""
    newest: dict[str, str] = {}
    days = []
    for rows in log_of_days():
        counted: Counter[tuple[str, str, str]] = Counter()
        for user, item, _ in rows:
            if user in newest:
                counted[user, newest[user], item] += 1
            newest[user] = item
        days.append(counted)
    return days


def test_every_new_target_is_trained_once_per_epoch(folder):
    manifest = Dataset.open(str(folder / "data")).manifest
    users, items = (
        [key for part in parts for key in pq.read_table(folder / "data" / part.path)["key"].to_pylist()]
        for parts in (manifest.user_parts, manifest.item_parts)
    )
    found = [
        Counter((users[user], items[after], items[item]) for user, after, item in targets)
        for _, targets in sorted(read_targets(folder / "trained.jsonl").items())
    ]
    assert found == [Counter({key: EPOCHS * n for key, n in day.items()}) for day in expected_targets()]


def test_checkpoints_of_the_newest_trained_day_are_kept_and_found(folder, capfd):
    kept = [(folder / f"run/days/{day:04d}/checkpoints").exists() for day in (1, 2, 3)]
    assert kept == [False, False, True]
    assert find_checkpoint(str(folder / "run")) == str(checkpoints(folder / "run/days/0003")[-1])
    assert run(folder, folder / "run") == 0
    assert "is already trained on all 3 days" in capfd.readouterr().out
    record = json.loads((folder / "run/trained_days.json").read_text())
    assert [day["targets"] for day in record["days"]] == [sum(day.values()) for day in expected_targets()]


@pytest.mark.parametrize("kept", [0, 1, 2, None])
def test_a_run_that_is_stopped_within_a_day_ends_as_one_that_is_not(folder, tmp_path, kept):
    shutil.copytree(folder / "two", tmp_path / "run")  # as a kill leaves it: two days, and a part of the third
    day = tmp_path / "run/days/0003"
    shutil.copytree(folder / "run/days/0003", day)
    for checkpoint in checkpoints(day)[kept:] if kept is not None else []:
        shutil.rmtree(checkpoint)
    assert run(folder, tmp_path / "run") == 0
    assert not (tmp_path / "run/days/0002/checkpoints").exists()
    mine, theirs = (tensors(checkpoints(path / "days/0003")[-1]) for path in (tmp_path / "run", folder / "run"))
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_the_export_of_a_folder_of_days_has_each_user_once_with_the_newest_history(folder, tmp_path):
    given = {"--data": folder / "data", "--checkpoint": folder / "run", "--output": tmp_path / "vectors"}
    assert stage("export", given) == 0
    found = {
        row["user_id"]: row["vector"]
        for batch in open_export(str(tmp_path / "vectors")).users()
        for row in batch.to_pylist()
    }
    whole = Dataset.open(str(folder / "data")).manifest
    assert sorted(found) == list(range(whole.users))
    newest = {}
    for day in (1, 2, 3):
        output = tmp_path / f"vectors{day}"
        assert whole.extends(Dataset.open(str(folder / f"data/days/{day:04d}")).manifest.vocabulary)
        for row in pq.read_table(folder / f"data/days/{day:04d}/sequences").to_pylist():
            newest[row["user_id"]] = (day, row["item_ids"])
        if day == 3:
            assert stage("export", {**given, "--data": folder / "data/days/0003", "--output": output}) == 0
            own = {
                row["user_id"]: row["vector"] for batch in open_export(str(output)).users() for row in batch.to_pylist()
            }
            assert sorted(own) == sorted(user for user, (last, _) in newest.items() if last == 3)
            for user, vector in own.items():
                np.testing.assert_allclose(found[user], vector, rtol=1e-4, atol=1e-5)
    lists = {"--export": tmp_path / "vectors", "--data": folder / "data", "--output": tmp_path / "lists", "--k": 5}
    assert stage("retrieve", lists) == 0
    for row in pq.read_table(tmp_path / "lists/lists").to_pylist():
        assert not {*row["item_ids"]} & {*newest[row["user_id"]][1]}


def test_a_folder_of_days_is_planned_for_as_everything_in_it(folder):
    workload = Workload.of(Plan(data=str(folder / "data"), gpu="cpu", time=TimeChoice(use=["past_gap"])))
    manifest = Dataset.open(str(folder / "data")).manifest
    assert (workload.users, workload.items) == (manifest.users, manifest.items)
    assert workload.plan.interactions == manifest.interactions and workload.inputs.reads("past_gap")
    assert workload.history == pytest.approx(manifest.interactions / manifest.users - 1)


def test_prompts_of_a_folder_of_days_have_each_user_once(folder, tmp_path):
    given = {"--data": folder / "data", "--checkpoint": folder / "run", "--output": tmp_path / "prompts"}
    assert stage("generate_prompts", given) == 0
    made = Dataset.open(str(tmp_path / "prompts"))
    rows = pq.read_table(tmp_path / "prompts/sequences").to_pylist()
    assert sorted(row["user_id"] for row in rows) == list(range(made.manifest.users))
    tune = {"--data": tmp_path / "prompts", "--checkpoint": folder / "run", "--output": tmp_path / "tuned"}
    assert stage("prompt_tune", {**tune, "--train.epochs": 1, "--batch.tokens": 200}) == 0


def test_plan_takes_the_sizes_of_the_newest_day(folder, capfd):
    manifest = Dataset.open(str(folder / "data")).manifest
    assert (
        stage("plan", {"--data": folder / "data", "--gpu": "cpu", "--gpus": 1, "--peak": 1, "--hbm_bandwidth": 9}) == 0
    )
    assert f"{manifest.items} items, {manifest.users} users on 1 ranks (1 x 1)" in capfd.readouterr().out


def test_what_does_not_fit_a_folder_of_days_is_refused(folder, tmp_path, capfd):
    def said() -> str:
        return " ".join(capfd.readouterr().err.split())

    assert run(folder, tmp_path / "new", **{"model.max_len": 13}) == 2
    assert "keeps the newest 12 interactions of earlier days; give --model.max_len 12" in said()
    assert run(folder, tmp_path / "new", targets="new", initial=folder / "run") == 2
    assert "of which each new target is trained once" in said()
    (tmp_path / "other").mkdir()
    append_day(tmp_path / "other", log_of_days()[0][:-1], 1, hold_out="none", history=12)
    assert run(tmp_path / "other", folder / "run") == 2
    assert "was trained on 3 days" in said()
    for number in (2, 3):
        append_day(tmp_path / "other", log_of_days()[number - 1], number, hold_out="none", history=12)
    assert run(tmp_path / "other", folder / "run") == 2
    assert "was trained on another day 1" in said()
    plain = {"--data": folder / "data/days/0001", "--output": tmp_path / "plain", **OPTIONS, "--train.epochs": 1}
    assert stage("pretrain", plain) == 0
    assert run(folder, tmp_path / "plain") == 2
    assert "holds a run on a dataset" in said()
    assert stage("pretrain", {**plain, "--output": folder / "run"}) == 2
    assert "holds something that is not a run" in said()
    assert not (tmp_path / "new").exists()


def days_on_ranks(rank: int, world_size: int, folder: str, output: str, tokens: int) -> None:
    """Train a folder of days on several ranks, all of an epoch in a step."""
    stay_in_group()
    observed_pretrain.observe(f"{output}.{rank}.jsonl")
    values: dict[str, Any] = {}
    config = Pretrain(data=f"{folder}/data", output=output, **values)
    config.model.dim, config.model.max_len, config.model.layers, config.model.heads = 8, 10, 1, 1
    config.model.user_dropout = config.model.dropout = config.model.attention_dropout = 0.0
    config.batch.tokens, config.train.epochs, config.loss.candidates = tokens, 2, "all"
    config.train.precision = "fp32"  # auto may choose another on each start
    pretrain.main(config)


def test_two_ranks_train_days_as_one_does(folder, tmp_path):
    for ranks in (1, 2):
        run_ranks(days_on_ranks, ranks, str(folder), str(tmp_path / f"run{ranks}"), 2000)
    one, two = (tensors(checkpoints(tmp_path / f"run{ranks}/days/0003")[-1]) for ranks in (1, 2))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=name)
    found = [
        Counter(
            target
            for rank in range(ranks)
            for targets in read_targets(tmp_path / f"run{ranks}.{rank}.jsonl").values()
            for target in targets
        )
        for ranks in (1, 2)
    ]
    assert found[0] == found[1] and sum(found[0].values()) == 2 * sum(sum(day.values()) for day in expected_targets())
