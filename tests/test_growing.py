"""Day after day: a dataset that extends another, and a run on it that starts from the run of the day before."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from recgpt_torchrec import export
from recgpt_torchrec.config import Export
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.retrieval.exports.reading import open_delta, open_export
from tests.preparation.prepare_helpers import make, random_log, read_keys, write_csv
from tests.support import SMALL, stage, stay_in_group
from tests.test_pretrain import checkpoints, tensors
from tools.ranks import run_ranks

OPTIONS = {**SMALL, "--loss.candidates": "all", "--saving.every_steps": 4, "--saving.keep": 100}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three days of a log; the run of the first one, and that of the second, which begins from it."""
    folder = tmp_path_factory.mktemp("days")
    rows = sorted(random_log(900, users=60, items=70), key=lambda row: row[2])
    for day, count in enumerate((500, 700, 900)):
        log = write_csv(folder / f"{day}.csv", rows[:count])
        extended = {"vocabulary": str(folder / f"data{day - 1}")} if day else {}
        make(log, folder / f"data{day}", min_count=5, **extended)
    make(write_csv(folder / "other.csv", [(f"x{u}", i, t) for u, i, t in rows]), folder / "other", min_count=1)
    assert stage("pretrain", {"--data": folder / "data0", "--output": folder / "run0", **OPTIONS}) == 0
    assert stage("pretrain", second_run_options(folder)) == 0
    return folder


def second_run_options(folder: Path, **more: Any) -> dict[str, Any]:
    options = {"--data": folder / "data1", "--output": folder / "run1", "--initial": folder / "run0", **OPTIONS}
    return {**options, "--targets": "new", **{f"--{name}": value for name, value in more.items()}}


def test_a_run_records_its_initial_checkpoint_and_its_optimizers_keep_counting(folder):
    record = json.loads((folder / "run1/run.json").read_text())
    best = json.loads((folder / "run0/best.json").read_text())["checkpoint"]
    assert record["initial"] == str(folder / "run0/checkpoints" / best)
    metadata = [json.loads((checkpoints(folder / run)[-1] / "checkpoint.json").read_text()) for run in ("run0", "run1")]
    first = json.loads((Path(record["initial"]) / "checkpoint.json").read_text())["progress"]["step"]
    assert metadata[1]["progress"]["before"] == first
    assert metadata[1]["progress"]["step"] > 0
    entries = Dataset.open(str(folder / "data1")).manifest.entries
    assert metadata[1]["progress"]["read"] == pytest.approx(2 * entries)  # the learning-rate schedule started again
    counted = tensors(checkpoints(folder / "run1")[-1])
    steps = {float(value) for name, value in counted.items() if name.endswith(".step")}
    assert steps == {first + metadata[1]["progress"]["step"]}


def test_a_stopped_run_resumes_without_its_initial_run(folder, tmp_path):
    stopped = checkpoints(folder / "run1")[0]
    shutil.copytree(stopped, tmp_path / "run1/checkpoints" / stopped.name)
    shutil.copy(folder / "run1/run.json", tmp_path / "run1")
    options = second_run_options(folder, output=tmp_path / "run1")
    hidden = (folder / "run0").rename(folder / "gone")
    try:
        assert stage("pretrain", options) == 0
    finally:
        hidden.rename(folder / "run0")
    mine, theirs = (tensors(checkpoints(run)[-1]) for run in (tmp_path / "run1", folder / "run1"))
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "name, options",
    [
        ("evaluate", {"--output": "test.json"}),
        ("export", {"--output": "vectors"}),
        ("generate_prompts", {"--output": "prompts"}),
        ("prompt_tune", {"--output": "tuned", "--tuning.prompts": "false"}),
    ],
)
def test_a_checkpoint_that_lacks_items_is_told_from_one_of_another_dataset(folder, tmp_path, capsys, name, options):
    options = {**options, "--output": tmp_path / options["--output"], "--checkpoint": folder / "run0"}
    assert stage(name, {"--data": folder / "data1", **options}) == 2
    said = capsys.readouterr().err
    assert "has no vectors for" in said and f"pretrain --data {folder / 'data1'} --initial" in said
    assert "--model.max_len 10" in said and "--model.dim 8" in said and "--model.layers" not in said  # 1 by default
    assert stage(name, {"--data": folder / "other", **options}) == 2
    said = capsys.readouterr().err
    assert "was trained on another dataset" in said and "--initial" not in said


@pytest.mark.parametrize(
    "options, message",
    [
        ({"data": "other"}, "whose ids mean other items"),
        ({"data": "data0"}, "does not mark which targets are new"),
        ({"data": "data2"}, "targets added in between would never be trained on"),
        ({"initial": "data0"}, "holds no finished checkpoint"),
        ({"initial": None}, "name it with --initial"),
        ({"model.dim": 16}, "was trained with --model.dim 8; give the same here"),
        ({"tables.optimizer": "sgd"}, "was trained with --tables.optimizer rowwise_adagrad"),
    ],
)
def test_an_unusable_initial_checkpoint_is_refused(folder, tmp_path, capsys, options, message):
    options = {n: folder / v if n in ("data", "initial") and v else v for n, v in options.items()}
    targets = "all" if options.get("data") == folder / "other" else "new"
    assert (
        stage("pretrain", second_run_options(folder, **{"output": tmp_path / "run", "targets": targets, **options}))
        == 2
    )
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_users_who_do_not_occur_any_more_have_no_vector_and_the_others_have(folder, tmp_path, capsys):
    rows = [(f"u{user}", f"i{item}", 9000 + item) for user in range(20) for item in range(8)]
    made = make(write_csv(tmp_path / "log.csv", rows), tmp_path / "data", vocabulary=str(folder / "data1")).manifest
    absent = made.preparation["extends"]["absent_users"]
    assert absent
    options = {
        **second_run_options(folder),
        "--data": tmp_path / "data",
        "--output": tmp_path / "run",
        "--initial": folder / "run1",
    }
    assert stage("pretrain", {**options, "--targets": "all", "--train.epochs": 1}) == 0
    began = json.loads((tmp_path / "run/run.json").read_text())["initial"]
    of_yesterday, own = (
        json.loads((Path(checkpoint) / "checkpoint.json").read_text())["progress"]
        for checkpoint in (began, checkpoints(tmp_path / "run")[-1])
    )
    assert own["before"] == of_yesterday["before"] + of_yesterday["step"] > of_yesterday["step"]  # of all days
    export = {"--data": tmp_path / "data", "--checkpoint": tmp_path / "run", "--output": tmp_path / "vectors"}
    assert stage("export", export) == 0
    assert f"{made.users - absent:,} users; {absent:,} users left out: " in capsys.readouterr().out


@pytest.mark.parametrize("more", [{}, {"--interests": 2, "--dtype": "int8"}])
def test_an_export_since_the_day_before_holds_what_has_changed(folder, tmp_path, capfd, more):
    def run_export(output: str, day: int, run: str, **others: Any) -> int:
        options = {"--data": folder / f"data{day}", "--checkpoint": folder / run, "--output": tmp_path / output}
        return stage("export", {**options, **more, **{f"--{name}": value for name, value in others.items()}})

    def rows(name: str) -> dict[str, dict[int, Any]]:
        found = open_export(str(tmp_path / name))
        both = {"item": found.items(), "user": found.users()}
        return {
            kind: {row[f"{kind}_id"]: row for batch in batches for row in batch.to_pylist()}
            for kind, batches in both.items()
        }

    first = tmp_path / "first"
    assert run_export("first", 0, "run0") == 0 and run_export("second", 1, "run1") == 0
    assert run_export("delta", 1, "run1", since=[first]) == 0
    before, now = (Dataset.open(str(folder / f"data{day}")).manifest for day in (0, 1))
    said = capfd.readouterr().out
    assert f"items    {now.items - before.items:,} new, {before.items:,} moved, 0 removed" in said
    assert f"{now.items:,} of {now.items:,} sent (100.00%)" in said
    assert f"apply --export {first} --deltas {tmp_path / 'delta'} --output NEW_EXPORT" in said
    applying = {"--export": first, "--deltas": [tmp_path / "delta"], "--output": tmp_path / "applied"}
    assert stage("apply", applying) == 0 and rows("applied") == rows("second")
    assert stage("apply", applying) == 0 and "Already there" in capfd.readouterr().out
    assert run_export("delta", 1, "run1", since=[first]) == 0
    assert "Already there" in capfd.readouterr().out

    # Nothing has changed since a delta of the same checkpoint, nor within a large tolerance.
    assert run_export("none", 1, "run1", since=[first, tmp_path / "delta"]) == 0
    assert f"0 new, 0 moved, 0 removed: 0 of {now.items:,} sent" in capfd.readouterr().out
    assert run_export("far", 1, "run1", since=[first], tolerance=1e6) == 0
    assert f"{now.items - before.items:,} new, 0 moved" in capfd.readouterr().out

    for others, message in (
        ({"output": "delta", "since": [first], "tolerance": 0.5}, "tolerance: 0.0 there, 0.5 now"),
        ({"output": "delta", "since": [tmp_path / "second"]}, "holds another delta"),
        ({"output": "new", "since": [first], "history": "test"}, "has history all, but the delta would have test"),
        ({"output": "new", "since": [first], "dtype": "float16"}, "but the delta would have float16"),
        ({"output": "new", "since": [tmp_path / "delta"]}, "is a delta, not an export"),
        ({"output": "new", "since": [first, tmp_path / "second"]}, "is an export, not a delta"),
        ({"output": "new", "tolerance": 0.1}, "there is nothing to compare with; give --since EXPORT"),
        ({"output": "new", "since": [first], "index.kind": "flat"}, "--since writes a delta, which holds no index"),
        ({"output": "new", "since": [tmp_path / "second"], "day": 0, "run": "run0"}, "its ids mean other items"),
    ):
        given: dict[str, Any] = {"day": 1, "run": "run1", **others}
        assert run_export(given.pop("output"), given.pop("day"), given.pop("run"), **given) == 2
        assert message in capfd.readouterr().err and not (tmp_path / "new").exists()


def test_between_two_trainings_a_delta_holds_the_users_who_did_something(folder, tmp_path, capfd):
    users, items = (read_keys(folder / "data0", kind, f"{kind[:-1]}_id") for kind in ("users", "items"))
    since = write_csv(tmp_path / "since.csv", [(user, items[0], 10_000) for user in (*users[:3], "somebody")])
    log = [str(folder / "0.csv"), str(since)]
    make(log, tmp_path / "hour", vocabulary=str(folder / "data0"), new_keys="leave_out")
    given = {"--checkpoint": folder / "run0", "--tolerance": 1e-5}
    first = {"--data": folder / "data0", "--checkpoint": folder / "run0", "--output": tmp_path / "first"}
    assert stage("export", first) == 0
    hour = {**given, "--data": tmp_path / "hour", "--since": [tmp_path / "first"], "--output": tmp_path / "delta"}
    assert stage("export", hour) == 0
    assert "items    0 new, 0 moved" in capfd.readouterr().out
    sent = [key for batch in open_delta(str(tmp_path / "delta")).users() for key in batch["key"].to_pylist()]
    assert sorted(sent) == sorted(users[:3])


def delta_on_ranks(rank: int, world_size: int, folder: str, output: str) -> None:
    """Export a day and its delta on several ranks."""
    stay_in_group()
    here = Path(folder)
    given: dict[str, Any] = {"data": str(here / "data1"), "checkpoint": str(here / "run1"), "interests": 2}
    for name, since in (("full", []), ("delta", [f"{output}/first"])):
        export.main(Export(**given, output=f"{output}/{name}", since=since))


def test_two_ranks_write_one_delta(folder, tmp_path):
    first = {"--data": folder / "data0", "--checkpoint": folder / "run0", "--output": tmp_path / "first"}
    assert stage("export", {**first, "--interests": 2}) == 0
    run_ranks(delta_on_ranks, 2, str(folder), str(tmp_path))
    applying = {"--export": tmp_path / "first", "--deltas": [tmp_path / "delta"], "--output": tmp_path / "applied"}
    assert stage("apply", applying) == 0
    applied, full = (open_export(str(tmp_path / name)) for name in ("applied", "full"))
    for kind in ("items", "users"):
        one, other = ([row for batch in getattr(of, kind)() for row in batch.to_pylist()] for of in (applied, full))
        assert sorted(one, key=str) == sorted(other, key=str)
