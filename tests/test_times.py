"""Logs in which the time of the request decides the next item: stages with features of time, and bad input."""

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from recgpt_torchrec.data.dataset import Manifest
from tests.support import SMALL, change_json, stage, walks, write_dataset

ITEMS, HOUR, DAY = 24, 3600, 86_400
NOON = 1_764_072_000  # 2025-11-25, a Tuesday
TRAINING = {
    **SMALL,
    "--model.dim": 16,
    "--model.dropout": 0.1,
    "--model.attention_dropout": 0.1,
    "--model.user_dropout": 1,
    "--batch.tokens": 160,
    "--loss.candidates": "all",
    "--train.epochs": 30,
    "--train.validate_every": 30,
    "--train.patience": 0,
    "--tables.lr": 0.1,
    "--optimizer.lr": 0.01,
}


def write_log(path: Path, decides: str, users: int = 160) -> None:
    """A log of users who go round a ring of items, and begin again at item 0 after a long gap, or on a weekend."""
    rng = np.random.default_rng(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user_id", "item_id", "timestamp"])
        for user in range(users):
            time, item = NOON + int(rng.integers(0, 8 * DAY)), int(rng.integers(1, ITEMS))
            for _ in range(int(rng.integers(8, 12))):
                writer.writerow([f"u{user}", f"i{item}", time])
                short = int(rng.integers(0, HOUR)) if rng.random() < 0.8 else 0
                gap = short if rng.random() < 0.5 else int(rng.integers(2 * DAY, 9 * DAY))
                time += gap
                # Independent of the package: 1970-01-01 was a Thursday.
                begins = gap > DAY if decides == "next_gap" else (time // DAY + 3) % 7 >= 5
                item = 0 if begins else item % (ITEMS - 1) + 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Datasets `next_gap` and `weekday`, a run for each cause, `plain` without times."""
    root = tmp_path_factory.mktemp("times")
    for cause in ("next_gap", "weekday"):
        write_log(root / f"{cause}.csv", cause)
        options = {"--input": root / f"{cause}.csv", "--output": root / cause, "--min_count": 1}
        assert stage("prepare", options) == 0
        run = {"--data": root / cause, "--output": root / f"{cause}_run", **TRAINING, "--time.use": [cause]}
        assert stage("pretrain", run) == 0
    assert stage("pretrain", {"--data": root / "next_gap", "--output": root / "plain", **TRAINING}) == 0
    return root


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by name, optimizer state included, read without the code under test."""
    metadata = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return state


def hit_rate(folder: Path, data: str, run: str) -> float:
    """HR@1 on the test items, without masking: items come again in these logs."""
    output = folder / f"{run}.json"
    options = {"--data": folder / data, "--checkpoint": folder / run, "--output": output, "--ks": 1}
    assert stage("evaluate", {**options, "--baselines": "false"}) == 0
    return json.loads(output.read_text())["results"]["pretrain"]["unmasked"]["HR@1"]


def test_where_the_time_of_the_request_decides_only_a_model_that_reads_it_knows_the_next_item(folder, capfd):
    assert Manifest.read(str(folder / "weekday")).time_unit == 1.0
    assert hit_rate(folder, "weekday", "weekday_run") > 0.9
    told = "The model is told the time of each request"
    assert f"{told} (weekday)" in capfd.readouterr().out
    assert json.loads((folder / "weekday_run.json").read_text())["request_time"] == ["weekday"]
    assert hit_rate(folder, "next_gap", "next_gap_run") > 0.9
    capfd.readouterr()
    # Half of the gaps are long: a model that knows no times is right about half of the time.
    assert hit_rate(folder, "next_gap", "plain") < 0.65
    assert told not in capfd.readouterr().out


def best_items(export: Path) -> np.ndarray:
    """[users] key of the best item of each user, by id and exact search."""
    items, users = pq.read_table(export / "items"), pq.read_table(export / "users").sort_by("user_id")
    vectors = [np.array(table["vector"].to_pylist()) for table in (users, items)]
    return np.array(items["key"].to_pylist())[(vectors[0] @ vectors[1].T).argmax(1)]


def export(folder: Path, output: str, run: str = "next_gap_run", **options: Any) -> int:
    words = {f"--{name}": value for name, value in options.items()}
    data = folder / "next_gap"
    return stage("export", {"--data": data, "--checkpoint": folder / run, "--output": folder / output, **words})


def test_vectors_are_for_the_time_that_export_is_given(folder, capfd):
    sequences = pq.read_table(folder / "next_gap" / "sequences").sort_by("user_id")["timestamps"].to_pylist()
    newest, oldest = max(map(max, sequences)), min(map(min, sequences))
    assert export(folder, "now") == 0
    out = capfd.readouterr().out
    assert "(the newest time of the dataset)" in out
    assert json.loads((folder / "now" / "manifest.json").read_text())["settings"]["time"] == newest
    waited = newest - np.array([row[-1] for row in sequences])
    long = (waited > 2 * DAY) & (waited < 9 * DAY)  # as long as gaps that were trained on
    assert long.sum() > 5 and (best_items(folder / "now") == "i0")[long].mean() > 0.95
    assert export(folder, "now", time=newest) == 0 and "Already there" in capfd.readouterr().out
    assert export(folder, "late", time="2026-11-28T12:00") == 0
    assert "2026-11-28 12:00:00 UTC (given with --time)" in capfd.readouterr().out
    assert export(folder, "early", time=oldest) == 0  # before the histories end, as if in their sessions
    assert "counts as active at that moment" in capfd.readouterr().out
    assert (best_items(folder / "early") == "i0").mean() < 0.1
    assert export(folder, "late", time=newest) == 2
    assert "time" in capfd.readouterr().err
    assert export(folder, "delta", time=newest, since=folder / "late") == 0
    assert "vectors of all users move with it" in capfd.readouterr().out
    assert export(folder, "plain_x", run="plain", time=newest) == 2
    assert "reads no times" in capfd.readouterr().err


def test_prompts_are_made_and_tuned_on_with_times(folder, capfd):
    root = {"--data": folder / "next_gap", "--checkpoint": folder / "next_gap_run"}
    assert stage("generate_prompts", {**root, "--output": folder / "prompts", "--prompts.k": 1}) == 0
    sequences = pq.read_table(folder / "prompts" / "sequences").to_pydict()
    follows = []  # of prompts that an item of a long gap follows, whether they are item 0
    keys = {row["item_id"]: row["key"] for row in pq.read_table(folder / "prompts" / "items").to_pylist()}
    for items, times, segments in zip(*(sequences[n] for n in ("item_ids", "timestamps", "segment_ids")), strict=True):
        for place, segment in enumerate(segments):
            if segment == 1:
                assert times[place] == times[place - 1] and segments[place - 1] == segments[place + 1] == 0
                home = next(number for number, key in keys.items() if key == "i0")
                if home not in items[:place] and times[place + 1] - times[place] > DAY:
                    follows.append(items[place] == home)
    assert len(follows) > 20 and np.mean(follows) > 0.8  # the prompt knows when the next item was asked for
    tuning = {name: value for name, value in TRAINING.items() if not name.startswith("--model.")}
    options = {"--data": folder / "prompts", "--checkpoint": folder / "next_gap_run", "--output": folder / "tuned"}
    assert stage("prompt_tune", {**options, **tuning, "--train.epochs": 1}) == 0
    capfd.readouterr()
    data = {"--data": folder / "prompts", "--checkpoint": folder / "tuned", "--output": folder / "tuned.json"}
    assert stage("evaluate", {**data, "--ks": [1, 2], "--baselines": "false"}) == 0
    assert json.loads((folder / "tuned.json").read_text())["results"]["recgpt_1"]["unmasked"]["HR@1"] > 0.85


def test_an_interrupted_run_resumes_to_the_same_result_and_another_starts_from_its_features_by_name(
    folder, tmp_path, capfd
):
    whole, again = folder / "next_gap_run", tmp_path / "run"
    (again / "checkpoints").mkdir(parents=True)
    shutil.copy(whole / "run.json", again)
    before, last = sorted((whole / "checkpoints").iterdir())[-2:]
    shutil.copytree(before, again / "checkpoints" / before.name)
    options = {"--data": folder / "next_gap", **TRAINING, "--time.use": ["next_gap"]}
    assert stage("pretrain", {**options, "--output": again}) == 0
    assert f"Resuming from {again}/checkpoints/{before.name}" in capfd.readouterr().out
    mine, theirs = (tensors(checkpoint) for checkpoint in (again / "checkpoints" / last.name, last))
    name = "model.dense.decoder.features.next_gap.weight"
    assert mine.keys() == theirs.keys() and theirs[name].abs().max() > 0.1
    for each, value in theirs.items():
        torch.testing.assert_close(mine[each], value, rtol=1e-5, atol=1e-6, msg=each)

    more = {**options, "--initial": whole, "--output": tmp_path / "more", "--train.epochs": 1, "--optimizer.lr": 0}
    assert stage("pretrain", {**more, "--time.use": ["weekday", "next_gap"]}) == 0
    started = tensors(next((tmp_path / "more" / "checkpoints").iterdir()))
    assert torch.equal(started[name], tensors(last)[name])
    assert not started[name.replace("next_gap", "weekday")].any()
    assert stage("pretrain", {**more, "--time.use": ["weekday"], "--output": tmp_path / "fewer"}) == 2
    assert "reads next_gap, which the run leaves out; give --time.use next_gap" in capfd.readouterr().err
    other = {**more, "--initial": folder / "weekday_run", "--output": tmp_path / "other", "--data": folder / "weekday"}
    assert stage("pretrain", {**other, "--time.use": ["weekday"], "--time.utc_offset_hours": 9}) == 2
    assert "was trained with --time.utc_offset_hours 0" in capfd.readouterr().err


def test_what_cannot_be_read_is_refused(folder, tmp_path, capfd):
    def refused(name: str, options: dict[str, Any], words: str) -> None:
        assert stage(name, options) == 2
        error = capfd.readouterr().err
        assert re.search(words, error) and "Traceback" not in error, error

    (tmp_path / "ids.txt").write_text("".join(f"u{u} a b c d\n" for u in range(5)))
    options = {"--input": tmp_path / "ids.txt", "--output": tmp_path / "ids", "--min_count": 1}
    refused("prepare", {**options, "--time_unit": "ms"}, "--time_unit ms: files of the format sequences")
    assert stage("prepare", options) == 0
    run = {"--data": tmp_path / "ids", "--output": tmp_path / "run", **TRAINING}
    refused("pretrain", {**run, "--time.use": ["past_gap"]}, "has no timestamps")
    counters = write_dataset(tmp_path / "counters", walks(40, ITEMS))
    run["--data"] = counters.path
    refused("pretrain", {**run, "--time.use": ["hour"]}, "unit of the times .* is not known")
    refused("pretrain", {**run, "--time.use": ["hour"], "--time.unit": "day"}, "have no hour")
    refused("pretrain", {**run, "--time.use": ["hour", "hour"]}, "twice")
    refused("pretrain", {**run, "--time.utc_offset_hours": 2}, "neither hour nor weekday")
    assert stage("pretrain", {**run, "--time.use": ["past_gap"], "--train.epochs": 1}) == 0  # gaps need no unit
    capfd.readouterr()
    options = {"--data": counters.path, "--checkpoint": tmp_path / "run", "--output": tmp_path / "x"}
    refused("export", {**options, "--time": "2026-11-28"}, "unit of the times .* is not known")
    refused("export", {**options, "--time": "soon"}, "--time is soon")
    refused("export", {**options, "--time": "5", "--history": "test"}, "leave one out")

    # Milliseconds where the log has seconds, the other way round, and before the log.
    options |= {"--data": folder / "next_gap", "--checkpoint": folder / "next_gap_run"}
    for time in (NOON * 1000, NOON // 1000, NOON - DAY, -NOON, "2125-12-31", "2025-11-24T12:00"):
        refused("export", {**options, "--time": time}, r"from 2025-1\d.* to 20.* number of seconds since 1970")

    options |= {"--data": counters.path, "--checkpoint": tmp_path / "run"}
    change_json(tmp_path / "counters" / "manifest.json", lambda values: values.update(time_unit=0.001))
    refused("evaluate", options, "trained on times in seconds, and those of .* are milliseconds")
    change_json(tmp_path / "counters" / "manifest.json", lambda values: values.update(time_unit=7))
    refused("evaluate", options, "time_unit is 7")

    data = {"--data": folder / "next_gap", "--output": tmp_path / "other", **TRAINING, "--time.use": ["hour"]}
    refused("pretrain", {**data, "--time.unit": "ms"}, "prepared with times in seconds")


def test_the_unit_of_a_log_is_told_given_or_not_known(tmp_path, capfd):
    def prepare(name: str, times: list[Any], **options: Any) -> float | None:
        rows = "".join(f"u{n % 3},i{n % 4},{time}\n" for n, time in enumerate(times))
        (tmp_path / f"{name}.csv").write_text("user_id,item_id,timestamp\n" + rows)
        words = {f"--{option}": value for option, value in options.items()}
        paths = {"--input": tmp_path / f"{name}.csv", "--output": tmp_path / name, "--min_count": 1}
        status = stage("prepare", {**paths, **words})
        if status:
            raise ValueError(capfd.readouterr().err)
        return Manifest.read(str(tmp_path / name)).time_unit

    seconds = [NOON + 100 * n for n in range(12)]
    assert prepare("s", seconds) == 1 and "time unit" not in capfd.readouterr().out
    assert prepare("ms", [1000 * time for time in seconds]) == 1e-3
    assert prepare("ns", [10**9 * time for time in seconds]) == 1e-9
    assert prepare("dates", [f"2025-11-{n + 1:02} 10:00:00" for n in range(12)]) == 1
    capfd.readouterr()
    assert prepare("counters", list(range(12))) is None
    assert re.search("time unit +not known: give --time_unit", capfd.readouterr().out)
    assert prepare("one_missing", [0, *seconds[1:]]) is None
    capfd.readouterr()
    assert prepare("days", list(range(20_000, 20_012)), time_unit="day") == 86_400
    page = capfd.readouterr().out
    assert re.search("time unit +days", page)
    assert "(as days since 1970: 2024-10-04 00:00:00 to 2024-10-15 00:00:00 UTC)" in page
    with pytest.raises(ValueError, match="times are date-times, which become seconds"):
        prepare("dates_ms", [f"2025-11-{n + 1:02}" for n in range(12)], time_unit="ms")
    with pytest.raises(ValueError, match="times are in seconds, those of the log in milliseconds"):
        prepare("later", [1000 * time for time in seconds], vocabulary=tmp_path / "s")
    with pytest.raises(ValueError, match="no column is named"):
        prepare("none", seconds, time_column="null", time_unit="s")
