"""`generate_prompts` from the command line: what it writes, on one rank and on two, and what it refuses."""

import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from recgpt_torchrec.data.dataset import Dataset
from tests.support import SMALL, change_json, read_files, read_sequences, stage, walks, write_dataset
from tools.ranks import run_ranks

USERS, ITEMS, MAX_LEN = 60, 30, 8
TRAINING = {
    **SMALL,
    "--model.max_len": MAX_LEN,
    "--loss.candidates": "all",
    "--train.epochs": 1,
    "--optimizer.warmup_steps": 2,
}

DRAWING = {"--prompts.temperature": 2.0, "--prompts.top_k": 10, "--prompts.seed": 7}


def histories() -> list[list[int]]:
    """Some empty or of one item, some longer than max_len; the last row groups longer than the first."""
    return [
        [],
        [3],
        *walks(USERS - 20, ITEMS, shortest=1, longest=9),
        *walks(18, ITEMS, seed=1, shortest=9, longest=14),
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prompts") / "data"
    write_dataset(folder, histories(), items=ITEMS, rows_per_group=8, groups_per_part=2)
    return folder


@pytest.fixture(scope="module")
def run(data) -> Path:
    output = data.parent / "run"
    assert stage("pretrain", {"--data": data, "--output": output, **TRAINING}) == 0
    return output


@pytest.fixture(scope="module")
def prompted(data, run) -> Path:
    output = data.parent / "prompted"
    assert stage("generate_prompts", {"--data": data, "--checkpoint": run, "--output": output, "--batch_users": 7}) == 0
    return output


def test_the_result_is_the_dataset_with_two_prompts_between_the_newest_items(prompted, data, run):
    result = read_sequences(prompted)
    assert result["user_id"] == list(range(USERS))
    for history, items, segments, times in zip(
        histories(), result["item_ids"], result["segment_ids"], result["timestamps"], strict=True
    ):
        kept = min(len(history), MAX_LEN)
        assert segments == [0] * (len(history) - kept) + [0, 1, 1] * (kept - 1) + [0] * (kept > 0)
        assert [i for i, s in zip(items, segments, strict=True) if s == 0] == history
        assert (
            times == [n for n in range(len(history)) for _ in range(1 if n < len(history) - kept else 3)][: len(items)]
        )
        before: set[int] = set()
        for item, segment in zip(items, segments, strict=True):
            assert segment == 0 or item not in before
            before |= {item} if segment == 0 else set()
    manifest, source = Dataset.open(str(prompted)).manifest, Dataset.open(str(data)).manifest
    assert (manifest.users, manifest.items, manifest.interactions) == (source.users, source.items, source.interactions)
    assert manifest.vocabulary == source.vocabulary
    record = manifest.settings["prompts"]
    assert (record["k"], record["source"], record["exclude_seen"], record["max_len"]) == (2, "generated", True, MAX_LEN)
    assert record["checkpoint"].startswith(str(run)) and len(record["checkpoint_fingerprint"]) == 32
    for name in ("items", "users"):
        assert read_files(prompted / name) == read_files(data / name)


def test_the_summary_names_result_and_next_command_and_a_second_run_finds_the_result(data, run, tmp_path, capfd):
    options = {"--data": data, "--checkpoint": run, "--output": tmp_path / "out", "--prompts.k": 1}
    assert stage("generate_prompts", options) == 0
    said = capfd.readouterr().out
    generated = sum(s.count(1) for s in read_sequences(tmp_path / "out")["segment_ids"])
    assert f"{USERS} users, {generated:,} generated and 0 shown prompts" in said and "users/s" in said
    following = f"python -m recgpt_torchrec.prompt_tune --data {tmp_path}/out --checkpoint {run} --output RUN"
    assert following in said
    before = read_files(tmp_path / "out")
    assert stage("generate_prompts", options) == 0
    said = capfd.readouterr().out
    assert f"Already there: {tmp_path}/out" in said and following in said
    assert read_files(tmp_path / "out") == before


def test_no_prompts_returns_the_input(data, run, tmp_path):
    options = {"--data": data, "--checkpoint": run, "--output": tmp_path / "out", "--prompts.k": 0}
    assert stage("generate_prompts", options) == 0
    result = read_sequences(tmp_path / "out")
    assert {name: result[name] for name in read_sequences(data)} == read_sequences(data)


def on_rank(rank: int, world_size: int, port: int, options: dict[str, Any]) -> int:
    dist.destroy_process_group()  # the stage joins its own
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return stage("generate_prompts", options)


@pytest.fixture(scope="module")
def drawn(data, run) -> Path:
    output = data.parent / "drawn"
    assert stage("generate_prompts", {"--data": data, "--checkpoint": run, "--output": output, **DRAWING}) == 0
    return output


def test_drawn_prompts_are_told_in_the_record_and_differ_from_the_best_ones(drawn, prompted):
    record = Dataset.open(str(drawn)).manifest.settings["prompts"]
    assert [record[name] for name in ("temperature", "top_k", "seed")] == [2.0, 10, 7]
    assert not {"temperature", "top_k", "seed"} & set(Dataset.open(str(prompted)).manifest.settings["prompts"])
    first, second = read_sequences(drawn), read_sequences(prompted)
    assert first["segment_ids"] == second["segment_ids"] and first["item_ids"] != second["item_ids"]


@pytest.mark.parametrize(
    ("sharding", "of", "drawing"),
    [("data_parallel", "prompted", {}), ("row_wise", "prompted", {}), ("row_wise", "drawn", DRAWING)],
)
def test_two_ranks_make_the_same_prompts(data, run, request, tmp_path, sharding, of, drawing):
    prompted = request.getfixturevalue(of)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"--data": data, "--checkpoint": run, "--output": tmp_path / "out", "--batch_users": 2}
    options |= {"--tables.sharding": sharding, **drawing}
    assert run_ranks(on_rank, 2, port, options, timeout=120) == [0, 0]
    assert read_sequences(tmp_path / "out") == read_sequences(prompted)
    assert Dataset.open(str(tmp_path / "out")).manifest.settings == Dataset.open(str(prompted)).manifest.settings
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("source", ["generated", "both"])
def test_reusing_an_earlier_result_equals_generation_from_scratch(run, tmp_path, capfd, source):
    whole = histories()
    shown = [[2 if n % 4 == 2 else 0 for n in range(len(history))] for history in whole]
    earlier_lengths = [max(len(h) - u % 3, 0) for u, h in enumerate(whole)]
    for name, cut in (("old", earlier_lengths), ("new", [len(h) for h in whole])):
        items = [h[:n] for h, n in zip(whole, cut, strict=True)]
        segments = [s[:n] for s, n in zip(shown, cut, strict=True)]
        write_dataset(tmp_path / name, items, items=ITEMS, segments=segments, rows_per_group=7 + len(name + source))
    common = {"--checkpoint": run, "--batch_users": 5, "--prompts.source": source}
    assert stage("generate_prompts", {"--data": tmp_path / "old", "--output": tmp_path / "old_prompts", **common}) == 0
    assert stage("generate_prompts", {"--data": tmp_path / "new", "--output": tmp_path / "scratch", **common}) == 0
    capfd.readouterr()
    continued = {"--data": tmp_path / "new", "--output": tmp_path / "continued", "--previous": tmp_path / "old_prompts"}
    assert stage("generate_prompts", {**continued, **common}) == 0
    said = capfd.readouterr().out
    assert "intervals reused from" in said and "of 0 intervals" not in said
    assert read_sequences(tmp_path / "continued") == read_sequences(tmp_path / "scratch")
    assert {1, 2} <= {
        s for row in read_sequences(tmp_path / "scratch")["segment_ids"] for s in row
    } or source == "generated"


def other_vocabulary(options: dict[str, Any], folder: Path) -> str:
    write_dataset(folder / "other", histories(), items=ITEMS, vocabulary="another")
    options["--data"] = folder / "other"
    return "was trained on another dataset"


def too_many(options: dict[str, Any], folder: Path) -> str:
    options["--prompts.k"] = 9
    return "--prompts.k is 9; it must be from 0 to 8"


def negative(options: dict[str, Any], folder: Path) -> str:
    options["--prompts.k"] = -1
    return "--prompts.k is -1"


def nothing_shown(options: dict[str, Any], folder: Path) -> str:
    options["--prompts.source"] = "exposed"
    return "has no items that were shown and not clicked"


def only_clicked(options: dict[str, Any], folder: Path) -> str:
    write_dataset(folder / "clicked", histories(), items=ITEMS, segments=[[0] * len(h) for h in histories()])
    options |= {"--prompts.source": "both", "--data": folder / "clicked"}
    return "has no items that were shown and not clicked"


def with_prompts_already(options: dict[str, Any], folder: Path) -> str:
    options["--data"] = options.pop("prompted")
    return "has prompts already"


def something_else(options: dict[str, Any], folder: Path) -> str:
    options["--output"] = folder / "thesis"
    (folder / "thesis").mkdir()
    (folder / "thesis/thesis.txt").write_text("years of work")
    return "already holds something that is not a finished prompt dataset (thesis.txt)"


def other_prompts(options: dict[str, Any], folder: Path) -> str:
    shutil.copytree(options["prompted"], folder / "out")
    options["--prompts.k"] = 1
    return "k: 2 there, 1 now"


def a_plain_dataset(options: dict[str, Any], folder: Path) -> str:
    shutil.copytree(options["--data"], folder / "out")
    return "holds a dataset without prompts"


def previous_of_other_options(options: dict[str, Any], folder: Path) -> str:
    options |= {"--previous": options["prompted"], "--prompts.exclude_seen": "false"}
    return "exclude_seen: True there, False now"


def previous_without_prompts(options: dict[str, Any], folder: Path) -> str:
    options["--previous"] = options["--data"]
    return "has no prompts"


def previous_of_averaged_answers(options: dict[str, Any], folder: Path) -> str:
    shutil.copytree(options["prompted"], folder / "averaged")
    change_json(
        folder / "averaged/manifest.json", lambda made: made["settings"]["prompts"].update(averaged_with=["another"])
    )
    options["--previous"] = folder / "averaged"
    return "holds answers averaged with those of other checkpoints"


def previous_that_was_not_drawn(options: dict[str, Any], folder: Path) -> str:
    options |= {"--previous": options["prompted"], "--prompts.temperature": 1.0}
    return "temperature: None there, 1.0 now"


def drawn_from_too_many(options: dict[str, Any], folder: Path) -> str:
    options |= {"--prompts.temperature": 1.0, "--prompts.top_k": 1001}
    return "--prompts.top_k is 1001; it must be from 1 to 1000"


def drawing_without_temperature(options: dict[str, Any], folder: Path) -> str:
    options["--prompts.top_k"] = 20
    return "--prompts.top_k is 20, but prompts are the best items; give --prompts.temperature"


def drawing_what_was_shown(options: dict[str, Any], folder: Path) -> str:
    options |= {"--prompts.temperature": 1.0, "--prompts.source": "exposed"}
    return "no prompt is generated with --prompts.source exposed"


def no_checkpoint(options: dict[str, Any], folder: Path) -> str:
    options["--checkpoint"] = folder
    return "holds no finished checkpoint"


def a_tuned_checkpoint(options: dict[str, Any], folder: Path) -> str:
    source = next(Path(options["--checkpoint"]).glob("checkpoints/*/checkpoint.json"))
    shutil.copytree(source.parent, folder / "tuned")
    change_json(folder / "tuned/checkpoint.json", lambda metadata: metadata["config"].update(tuning={"prompts": False}))
    options["--checkpoint"] = folder / "tuned"
    return "was tuned already"


@pytest.mark.parametrize(
    "wrong",
    [
        other_vocabulary,
        too_many,
        negative,
        nothing_shown,
        only_clicked,
        with_prompts_already,
        something_else,
        other_prompts,
        a_plain_dataset,
        previous_of_other_options,
        previous_without_prompts,
        previous_of_averaged_answers,
        previous_that_was_not_drawn,
        drawn_from_too_many,
        drawing_without_temperature,
        drawing_what_was_shown,
        no_checkpoint,
        a_tuned_checkpoint,
    ],
)
def test_unusable_input_is_refused_with_one_message_before_any_work(wrong, data, run, prompted, tmp_path, capfd):
    options = {"--data": data, "--checkpoint": run, "--output": tmp_path / "out", "prompted": prompted}
    expected = wrong(options, tmp_path)
    options.pop("prompted", None)
    before = read_files(tmp_path)
    assert stage("generate_prompts", options) == 2
    said = capfd.readouterr()
    assert expected in said.err and "Traceback" not in said.err and said.out == ""
    assert said.err.count("error:") == 1 and "users/s" not in said.err
    assert read_files(tmp_path) == before
