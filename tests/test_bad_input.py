"""One table of bad input over all stages: what is wrong, the command, how it ends, and the message to the user.

`python -m tests.test_bad_input table.md` writes the table. Each kind must end with a status that is not 0, without a
traceback, with a message that names the file or option and a way out, and must leave nothing half-written.
"""

import contextlib
import io
import json
import os
import re
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.bad_inputs import CASES, PLACE, Bad
from tests.damage import ITEMS, PART, USERS, row
from tests.support import SMALL, stage, walks, write_dataset
from tools.ranks import run_ranks

ANSWERS = 2
TUNE = {"--optimizer.warmup_steps": 2, "--train.epochs": 1, "--loss.candidates": "all", "--batch.tokens": 60}
TRAINING = {**SMALL, "--model.max_len": 8, **TUNE}
OPTIONS: dict[str, dict[str, Any]] = {
    "prepare": {"--input": "log.csv", "--output": "new", "--min_count": 1},
    "pretrain": {"--data": "data", "--output": "new", **TRAINING},
    "generate_prompts": {"--data": "data", "--checkpoint": "run", "--output": "new", "--prompts.k": 1},
    "prompt_tune": {"--data": "prompts", "--checkpoint": "run", "--output": "new", **TUNE},
    "evaluate": {"--data": "data", "--checkpoint": "run", "--output": "new.json"},
    "export": {"--data": "data", "--checkpoint": "run", "--output": "new"},
}
SHOWN = ("--data", "--input", "--output", "--checkpoint")
"""Options that the table shows although every case of the stage has them."""
LEFT_BY_TRAINING = re.compile(
    r"new/(run\.json|run\.lock|history\.jsonl|damaged\.jsonl|tensorboard/.*|checkpoints)?$|new$|new/tensorboard$"
    r"|new/best\.json$|new/checkpoints/step-00000000(/.*)?$"
)
"""Files that a run may leave if the error ends it during training; no partial checkpoint, and of tuning that of what it
began with."""


def write_inputs(folder: Path) -> None:
    """Write a dataset, a run on it and a dataset with prompts and answers."""
    write_dataset(folder / "data", walks(USERS, ITEMS, shortest=4), items=ITEMS, rows_per_group=4)
    with contextlib.chdir(folder):
        assert stage("pretrain", OPTIONS["pretrain"] | {"--output": "run"}) == 0
        more = {"--output": "prompts", "--prompts.answers": ANSWERS}
        assert stage("generate_prompts", OPTIONS["generate_prompts"] | more) == 0


def run_case(bad: Bad, inputs: Path, folder: Path) -> tuple[str, int, str]:
    """Run one case in its own `folder`; returns the command, its exit status and its message.

    Raises:
        AssertionError: the case does not end as it should.
    """
    for name in ("data", "run", "prompts"):
        shutil.copytree(inputs / name, folder / name)
    bad.harm(folder)
    options = OPTIONS[bad.stage] | bad.options
    before = tree(folder)
    said = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = stage(bad.stage, options)
    message = said.getvalue().strip().replace(f"{folder}/", "")
    assert status == 2, (status, message)
    assert "Traceback" not in message
    assert bad.names in message and bad.remedy in message, message
    after = tree(folder)
    left = {name for name in after if after[name] != before.get(name)}
    assert before.keys() <= after.keys() and all(
        name == "run/run.lock" or (bad.in_training and LEFT_BY_TRAINING.match(name)) for name in left
    ), left
    shown = {o: v for o, v in options.items() if o in (*SHOWN, *bad.options)}
    words = " ".join(f"{option} {value}" for option, value in shown.items())
    return f"{bad.stage} {words}", status, message


def tree(folder: Path) -> dict[str, bytes | None]:
    """Read every path of a folder, with the content of files."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def table(rows: list[tuple[str, str, int, str]]) -> str:
    """The rows as Markdown."""

    def cell(text: str) -> str:
        return " ".join(text.partition("error: ")[2].split()).replace("|", "\\|")

    lines = ["| kind | command | exit status | message |", "|---|---|---|---|"]
    lines += [f"| {kind} | `{command}` | {status} | {cell(said)} |" for kind, command, status, said in rows]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    write_inputs(folder)
    return folder


@pytest.mark.parametrize("bad", CASES, ids=str)
def test_bad_input_ends_with_a_message_that_names_the_place_and_the_remedy(bad, inputs, tmp_path):
    run_case(bad, inputs, tmp_path)


def test_the_table_has_every_kind_once():
    kinds = [str(bad) for bad in CASES]
    assert len(set(kinds)) == len(kinds) >= 30
    assert {bad.stage for bad in CASES} == set(OPTIONS)
    row = ("a | b", "pretrain --data x", 2, "pretrain: error: Bad\n  thing")
    assert table([row]).splitlines()[-1] == "| a | b | `pretrain --data x` | 2 | Bad thing |"


def test_a_run_continues_without_damaged_rows_if_allowed_and_reports_their_number(inputs, tmp_path, capfd):
    shutil.copytree(inputs / "data", tmp_path / "data")
    row("item_ids", 77, 0)(tmp_path)
    (tmp_path / "data" / PART.replace("1.parquet", "2.parquet")).unlink()
    options = OPTIONS["pretrain"] | {"--train.epochs": 2, "--stream.damaged": "skip", "--stream.damaged_limit": 9}
    with contextlib.chdir(tmp_path):
        assert stage("pretrain", options) == 0
    assert "Damaged: 9 rows were left out, listed in new/damaged.jsonl" in capfd.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "new/damaged.jsonl").read_text().splitlines()]
    found = sorted((line["part"], line["row_group"], line["row"], line["rows"]) for line in lines)
    assert found == [(PART, 1, 1, 1), (PART.replace("1.parquet", "2.parquet"), None, None, 8)]
    assert len((tmp_path / "new/history.jsonl").read_text().splitlines()) == 2


def on_rank(rank: int, world_size: int, ports: tuple[int, ...], folder: str) -> list[tuple[int, str]]:
    """Run pretrain and generate_prompts on one of several ranks; returns the status and message of each."""
    dist.destroy_process_group()  # the stages join their own
    ends = []
    for port, name in zip(ports, ("pretrain", "generate_prompts"), strict=True):
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        said = io.StringIO()
        with contextlib.chdir(folder), contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            status = stage(name, OPTIONS[name] | {"--output": f"new-{name}"})
        ends.append((status, said.getvalue()))
    return ends


def test_damage_found_by_one_rank_ends_every_rank_with_its_place(inputs, tmp_path):
    for name in ("data", "run"):
        shutil.copytree(inputs / name, tmp_path / name)
    row("item_ids", 77, 0)(tmp_path)
    with socket.socket() as first, socket.socket() as second:
        for free in (first, second):
            free.bind(("127.0.0.1", 0))
        ports = first.getsockname()[1], second.getsockname()[1]
    ends = run_ranks(on_rank, 2, ports, str(tmp_path), timeout=120)
    for of_stage in zip(*ends, strict=True):
        assert [status for status, _ in of_stage] == [2, 2]
        told = [said for _, said in of_stage if said]  # what all ranks refuse may be said by one of them
        assert told and all(f": data: {PLACE}: item id 77 is outside" in said for said in told)
        assert not any("Traceback" in said for said in told)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "new-pretrain", "run"]


def main(output: str) -> None:
    """Try every case and write the table."""
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            write_inputs(Path(folder))
        rows = []
        for number, bad in enumerate(CASES):
            own = Path(folder, str(number))
            own.mkdir()
            rows.append((str(bad), *run_case(bad, Path(folder), own)))
    Path(output).write_text(table(rows))
    print(f"Written: {output}: {len(rows)} kinds of bad input")


if __name__ == "__main__":
    main(sys.argv[1])
