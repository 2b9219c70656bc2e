"""Every stage on datasets that hold out by time, by the user's own files, or nothing; prompts know nothing of later."""

import csv
import json
import math
import os
import shlex
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch.distributed as dist

from recgpt_torchrec.data.dataset import Dataset
from tests.data.stream_helpers import MAX_LEN, pairs, stream_of
from tests.support import SMALL, read_epochs, stage, walks, write_dataset
from tools.ranks import run_ranks

USERS, ITEMS = 60, 25
TRAINING = {**SMALL, "--loss.candidates": "all", "--train.epochs": 1}
TUNING = {"--batch.tokens": 60, "--optimizer.warmup_steps": 2, "--loss.candidates": "all", "--train.epochs": 1}
HOLD_OUT = ("time", "given", "none")


def write_log(path: Path, rows: list[tuple[str, str, int]]) -> Path:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("user_id", "item_id", "timestamp"), *rows])
    return path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder with a dataset per hold_out, of one log; `given` has no validation part."""
    folder = tmp_path_factory.mktemp("splits")
    histories = walks(USERS, ITEMS, shortest=2)
    rows = [(f"u{u}", f"i{i}", 40 * u % 500 + 30 * n) for u, h in enumerate(histories) for n, i in enumerate(h)]
    edge = sorted(row[2] for row in rows)[int(0.8 * len(rows))]
    log = write_log(folder / "log.csv", rows)
    train = write_log(folder / "train.csv", [row for row in rows if row[2] < edge])
    test = write_log(folder / "test.csv", [row for row in rows if row[2] >= edge])
    common = {"--min_count": 1, "--rows_per_group": 8}
    datasets: dict[str, dict[str, Any]] = {
        "time": {"--input": log, "--test_from": "80%"},
        "given": {"--input": train, "--test_input": test},
        "none": {"--input": log},
        "last": {"--input": log},
    }
    for name, options in datasets.items():
        assert stage("prepare", {**options, **common, "--hold_out": name, "--output": folder / name}) == 0
    return folder


@pytest.fixture(scope="module")
def runs(prepared) -> dict[str, Path]:
    """A run on each dataset."""
    found = {}
    for name in HOLD_OUT:
        found[name] = prepared / f"run-{name}"
        assert stage("pretrain", {"--data": prepared / name, "--output": found[name], **TRAINING}) == 0
    return found


def parts_of(folder: Path) -> list[tuple[list[int], int, int]]:
    """Items of each user, and where the validation and the test part start."""
    table = pq.read_table(folder / "sequences").to_pydict()
    lengths = [len(items) for items in table["item_ids"]]
    starts = [table.get(f"{split}_start", lengths) for split in ("validation", "test")]
    return list(zip(table["item_ids"], *starts, strict=True))


@pytest.mark.parametrize("name", HOLD_OUT)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_training_target_comes_once_on_any_number_of_ranks(prepared, name, world_size):
    dataset = Dataset.open(str(prepared / name))
    stream = stream_of(dataset, tokens=30)
    found = Counter(
        pair for rank in range(world_size) for b in stream.batches(0, None, rank, world_size) for pair in pairs(b)
    )
    wanted: Counter = Counter()
    for user, (items, validation, _) in enumerate(parts_of(prepared / name)):
        newest = items[:validation][-(MAX_LEN + 1) :]
        wanted.update((user, tuple(newest[:place]), newest[place]) for place in range(1, len(newest)))
    assert found == wanted and found


@pytest.mark.parametrize("name", ["time", "given"])
def test_from_a_run_to_lists_measured_by_the_first_item_after_the_boundary(prepared, runs, name, tmp_path, capfd):
    where = {"--data": prepared / name, "--checkpoint": runs[name]}
    assert stage("evaluate", {**where, "--output": tmp_path / "test.json"}) == 0
    said = capfd.readouterr().out
    parts = parts_of(prepared / name)
    targets = {user: items[t] for user, (items, _, t) in enumerate(parts) if 0 < t < len(items)}
    evaluation = json.loads((tmp_path / "test.json").read_text())
    assert (evaluation["users"], evaluation["hold_out"]) == (len(targets), name)
    assert f"{len(targets)} of {len(parts)} users have a test item" in said
    assert ("best of m" if name == "time" else "nine tenths, as no user has a validation item") in said
    popular = Counter(item for items, v, _ in parts for item in items[:v])
    better = [sum(popular[other] > popular[item] for other in set(range(ITEMS)) - {item}) for item in targets.values()]
    equal = [sum(popular[other] == popular[item] for other in set(range(ITEMS)) - {item}) for item in targets.values()]
    measured = evaluation["results"]["popularity"]["unmasked"]["HR@10"]
    most, least = ([sum(b + e * worst < 10 for b, e in zip(better, equal, strict=True))] for worst in (0, 1))
    assert least[0] / len(targets) <= measured <= most[0] / len(targets)

    export = {**where, "--history": "test", "--output": tmp_path / "vectors"}
    assert stage("export", export) == 0
    assert "they have no interaction in the test part, or none before it" in capfd.readouterr().out
    lists = {"--export": tmp_path / "vectors", "--data": prepared / name, "--output": tmp_path / "lists", "--k": 10}
    assert stage("retrieve", lists) == 0
    found = pq.read_table(tmp_path / "lists/lists").to_pydict()
    assert sorted(found["user_id"]) == sorted(targets)
    gains = []
    for user, items in zip(found["user_id"], found["item_ids"], strict=True):
        history, target = parts[user][0][: parts[user][2]], targets[user]
        assert not {*items} & {*history}
        gains.append(1 / math.log2(items.index(target) + 2) if target in items else 0)
    measured = json.loads((tmp_path / "lists/manifest.json").read_text())["measured"]["hits"]
    assert measured["NDCG@10"] == pytest.approx(sum(gains) / len(gains))
    if name == "time":  # the export is not measured by another split's histories
        other = {**lists, "--data": prepared / "last", "--output": tmp_path / "other"}
        assert stage("retrieve", other) == 2
        assert "was made from a dataset with --hold_out time" in capfd.readouterr().err


def test_with_none_all_epochs_are_trained_the_newest_checkpoint_counts_and_nothing_is_measured(
    prepared, runs, tmp_path, capfd
):
    output = tmp_path / "run"
    options = {"--data": prepared / "none", "--output": output, **TRAINING, "--train.epochs": 3, "--train.patience": 1}
    assert stage("pretrain", options) == 0
    said = capfd.readouterr().out
    assert "nothing is held out for validation: the newest checkpoint is the result" in said
    assert "Trained: 3 epochs, nothing held out for validation" in said and "recgpt_torchrec.export --data" in said
    assert [epoch["epoch"] for epoch in read_epochs(output)] == [1, 2, 3]
    assert not (output / "best.json").exists()
    assert all("NDCG@10" not in epoch for epoch in read_epochs(output))
    assert stage("pretrain", options) == 0
    assert "is already trained" in capfd.readouterr().out
    where = {"--data": prepared / "none", "--checkpoint": output}
    assert stage("evaluate", {**where, "--output": tmp_path / "x.json"}) == 2
    assert "no user has a test item, because it was prepared with --hold_out none" in capfd.readouterr().err
    assert stage("export", {**where, "--output": tmp_path / "x", "--history": "test"}) == 2
    assert "--hold_out none. Export whole histories: --history all" in capfd.readouterr().err
    assert stage("export", {**where, "--output": tmp_path / "vectors"}) == 0
    newest = sorted((output / "checkpoints").iterdir())[-1]
    assert json.loads((tmp_path / "vectors/manifest.json").read_text())["checkpoint"] == str(newest)
    lists = {"--export": tmp_path / "vectors", "--data": prepared / "none", "--output": tmp_path / "lists", "--k": 5}
    assert stage("retrieve", lists) == 0
    assert len(pq.read_table(tmp_path / "lists/lists")) == USERS
    # The same sequences with other training parts are not the same run, and a leak is named.
    assert stage("pretrain", {**options, "--data": prepared / "last"}) == 2
    assert "other histories" in capfd.readouterr().err
    measured = {"--data": prepared / "last", "--checkpoint": output, "--output": tmp_path / "leak.json"}
    assert stage("evaluate", measured) == 0
    assert "with --hold_out none; it may have seen items that" in capfd.readouterr().out


@pytest.mark.parametrize("name", HOLD_OUT)
def test_prompts_are_generated_and_tuned_on_whatever_is_held_out(prepared, runs, name, tmp_path, capfd):
    where = {"--data": prepared / name, "--checkpoint": runs[name], "--output": tmp_path / "prompts"}
    assert stage("generate_prompts", {**where, "--prompts.k": 1, "--prompts.answers": 2}) == 0
    manifest, source = (Dataset.open(str(path)).manifest for path in (tmp_path / "prompts", prepared / name))
    assert manifest.hold_out == name and manifest.preparation["split"] == source.preparation["split"]
    if name != "none":
        assert [part[1:] for part in parts_of(tmp_path / "prompts")] == [part[1:] for part in parts_of(prepared / name)]
    tuned = {"--data": tmp_path / "prompts", "--checkpoint": runs[name], "--output": tmp_path / "tuned", **TUNING}
    assert stage("prompt_tune", {**tuned, "--tuning.soft_targets": 0.3}) == 0
    assert (tmp_path / "tuned/best.json").exists() == (name == "time")
    measured = {"--data": tmp_path / "prompts", "--checkpoint": tmp_path / "tuned", "--output": tmp_path / "x.json"}
    assert stage("evaluate", measured) == (2 if name == "none" else 0)
    assert stage("generate_prompts", {**where, "--prompts.k": 1, "--prompts.answers": 2}) == 0
    assert "Already there" in capfd.readouterr().out
    again = {**where, "--output": tmp_path / "again", "--prompts.k": 1, "--previous": tmp_path / "prompts"}
    if name != "none":
        assert stage("generate_prompts", {**again, "--prompts.answers": 2}) == 2
        assert "leave --previous out" in capfd.readouterr().err


@pytest.mark.parametrize("shown", [False, True])
def test_prompts_of_what_a_split_reads_are_those_of_the_history_alone(tmp_path, shown):
    """However much comes after it: as if the dataset ended where the part begins."""
    histories = walks(40, ITEMS, shortest=1, longest=30)
    segments = [[2 if shown and n % 3 == 1 and n + 1 < len(h) else 0 for n in range(len(h))] for h in histories]
    places = [[n for n, segment in enumerate(row) if segment == 0] for row in segments]
    starts = [(len(p) // 3, len(p) * 2 // 3 + u % 2 * (len(p) % 3 > 0)) for u, p in enumerate(places)]
    common: dict[str, Any] = {"items": ITEMS, "rows_per_group": 7}
    by_time: dict[str, Any] = {"starts": starts, "hold_out": "time"}
    kept = [[len(h) for h in histories]]
    kept += [
        [p[pair[part] - 1] + 1 if pair[part] else 0 for p, pair in zip(places, starts, strict=True)] for part in (0, 1)
    ]
    for name, ends in zip(("whole", "before-validation", "before-test"), kept, strict=True):
        more: dict[str, Any] = (
            {"segments": [row[:end] for row, end in zip(segments, ends, strict=True)]} if shown else {}
        )
        more |= {"hold_out": "none"} if name == "before-validation" else by_time
        write_dataset(tmp_path / name, [h[:end] for h, end in zip(histories, ends, strict=True)], **common, **more)
    run = tmp_path / "run"
    assert stage("pretrain", {"--data": tmp_path / "whole", "--output": run, **TRAINING, "--model.max_len": 7}) == 0
    options = {"--checkpoint": run, "--prompts.k": 2, "--prompts.answers": 2, "--batch_users": 11}
    options["--prompts.source"] = "both" if shown else "generated"
    found = {}
    for name in ("whole", "before-validation", "before-test"):
        made = tmp_path / f"{name}-prompts"
        assert stage("generate_prompts", {**options, "--data": tmp_path / name, "--output": made}) == 0
        found[name] = pq.read_table(made / "sequences").to_pydict()
    prompts = 0
    for user, (validation, test) in enumerate(starts):
        whole = intervals(found, "whole", user)
        before_validation, before_test = (intervals(found, f"before-{part}", user) for part in ("validation", "test"))
        assert len(before_validation) == validation and len(before_test) == test
        # The last interaction has no prompts after it where the dataset ends there.
        assert whole[: max(validation - 1, 0)] == before_validation[:-1]
        assert whole[: max(test - 1, 0)] == before_test[:-1]
        prompts += sum(len(entries) > 1 for entries, _ in whole[: max(validation - 1, 0)])
    assert prompts > 40


def intervals(found: dict[str, dict[str, list[Any]]], name: str, user: int) -> list[tuple[list[Any], list[int]]]:
    """Per interaction: itself and the prompts after it, with their segments, and its answers."""
    table = found[name]
    result: list[tuple[list[Any], list[int]]] = []
    for entry in zip(table["item_ids"][user], table["segment_ids"][user], strict=True):
        if entry[1] == 0:
            answers = table["answer_ids"][user][2 * len(result) : 2 * len(result) + 2]
            result.append(([], answers))
        result[-1][0].append(entry)
    return result


def evaluate_on_rank(rank: int, world_size: int, port: int, options: dict[str, Any]) -> int:
    dist.destroy_process_group()  # the stage joins its own
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return stage("evaluate", options)


def test_two_ranks_measure_a_split_by_time_as_one_does(prepared, runs, tmp_path):
    options = {"--data": prepared / "time", "--checkpoint": runs["time"], "--recall.interests": 2}
    assert stage("evaluate", {**options, "--output": tmp_path / "one.json"}) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    two = {**options, "--output": tmp_path / "two.json"}
    assert run_ranks(evaluate_on_rank, 2, port, two, timeout=120) == [0, 0]
    one, other = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["users"] == other["users"] and one["recall"]["m"] == other["recall"]["m"]
    for path, protocols in one["results"].items():
        for protocol, figures in protocols.items():
            assert other["results"][path][protocol] == pytest.approx(figures, abs=1e-9), (path, protocol)


@pytest.mark.parametrize("epochs", [{}, {"--train.validate_every": 9}])
def test_where_nobody_has_a_validation_item_training_is_refused_before_it_begins(tmp_path, capfd, epochs):
    log = write_log(tmp_path / "log.csv", [(f"u{u}", f"i{(u + n) % 7}", n) for u in range(20) for n in range(2)])
    assert stage("prepare", {"--input": log, "--output": tmp_path / "last", "--min_count": 1}) == 0
    assert "of 20 users none has a held-out item" in capfd.readouterr().out
    options = {"--data": tmp_path / "last", "--output": tmp_path / "run", **TRAINING, **epochs}
    assert stage("pretrain", options) == 2
    said = capfd.readouterr().err
    assert "takes 3 interactions and the longest history has 2" in said and "--hold_out none" in said
    assert not (tmp_path / "run").exists()
    # By time, each user is on one side of the boundaries only.
    rows = [(f"u{u}", f"i{(u + n) % 7}", 100 * u + n) for u in range(20) for n in range(4)]
    by_time = {"--input": write_log(tmp_path / "apart.csv", rows), "--hold_out": "time", "--test_from": "1500"}
    assert stage("prepare", {**by_time, "--output": tmp_path / "time", "--min_count": 1}) == 0
    assert stage("pretrain", {**options, "--data": tmp_path / "time"}) == 2
    assert "nobody has an interaction in the validation part and one before it" in capfd.readouterr().err


def test_the_header_says_how_many_items_are_never_a_target(tmp_path, capfd):
    rows = [(f"u{u}", f"i{(u + n) % 5}", n) for u in range(20) for n in range(6)]
    rows += [(f"u{u}", "fresh", 10 + n) for u in range(6) for n in range(2)]
    log = write_log(tmp_path / "log.csv", rows)
    assert stage("prepare", {"--input": log, "--output": tmp_path / "data", "--min_count": 1}) == 0
    assert "targets     1 of 6 items (16.7%) are never a training target" in capfd.readouterr().out
    assert stage("pretrain", {"--data": tmp_path / "data", "--output": tmp_path / "run", **TRAINING}) == 0
    assert "targets  1 of the items are never one" in capfd.readouterr().out


def test_a_finished_run_that_is_asked_for_more_epochs_names_the_way(prepared, runs, tmp_path, capfd):
    options = {"--data": prepared / "time", "--output": runs["time"], **TRAINING, "--train.epochs": 5}
    assert stage("pretrain", options) == 2
    said = capfd.readouterr().err
    assert "--train.epochs: 1 there, 5 now" in said
    assert "4 more, from its model, in a run of their own: python -m recgpt_torchrec.pretrain " in said
    words = shlex.split(said.strip().splitlines()[-1].partition("recgpt_torchrec.pretrain ")[2])
    further = dict(zip(words[::2], words[1::2], strict=True))
    assert (further["--initial"], further["--train.epochs"]) == (str(runs["time"]), "4")
    assert further["--model.dim"] == str(TRAINING["--model.dim"]) and further["--loss.candidates"] == "all"
    assert stage("pretrain", {**further, "--output": tmp_path / "further", "--train.epochs": 1}) == 0


def test_a_dataset_continues_one_that_held_out_otherwise(prepared, runs, tmp_path, capfd):
    """For production: the model chosen by time is trained further on what was held out."""
    log, data = prepared / "log.csv", tmp_path / "all"
    options = {"--input": log, "--output": data, "--min_count": 1, "--hold_out": "none"}
    assert stage("prepare", {**options, "--vocabulary": prepared / "time"}) == 0
    split = json.loads((data / "manifest.json").read_text())["preparation"]
    held_out = sum(len(items) - max(validation, 1) for items, validation, _ in parts_of(prepared / "time"))
    assert split["extends"]["new_targets"] == held_out
    continued = {"--data": data, "--output": tmp_path / "run", "--initial": runs["time"], "--targets": "new"}
    assert stage("pretrain", {**continued, **TRAINING}) == 0
    assert "nothing held out for validation" in capfd.readouterr().out
