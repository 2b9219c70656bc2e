"""The fuzzing tool: a part of its cases on every run, and that it notices what it is for."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tools import fuzz
from tools.fuzz import Kind, judge
from tools.stage_process import MEMORY, End, run_in_process

ROOT = Path(__file__).parents[2]
KIND = Kind("a file", "a.json", "evaluate", "json")
REFUSED = "recgpt_torchrec.evaluate: error: a.json is damaged\n"


@pytest.mark.timeout(290)
def test_every_kind_of_file_with_changed_bytes_is_refused_or_gives_the_right_result() -> None:
    """Three cases of each kind; `python -m tools.fuzz --cases 300` tries more."""
    kinds = ["log", "table", "dataset", "neighbours", "prompts", "run", "export", "index", "delta", "lists", "keys"]
    kinds += ["evaluation", "configuration"]
    command = [sys.executable, "-m", "tools.fuzz", "--cases", "3", "--seed", "7", "--kinds", *kinds]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].split()[:2] == ["all", str(3 * len(fuzz.KINDS))]


def test_the_same_seed_tries_the_same_cases() -> None:
    for kind in fuzz.KINDS:
        names = [[name for name, *_ in fuzz.cases_of(kind, 20, seed, "c")] for seed in (1, 1, 2)]
        assert names[0] == names[1] != names[2] and len(names[0]) == 20


@pytest.fixture
def case(tmp_path: Path) -> Path:
    (tmp_path / "cases/case").mkdir(parents=True)
    return tmp_path / "cases/case"


@pytest.mark.parametrize(
    ("end", "is_chosen", "outcome"),
    [
        (End(2, REFUSED), False, "refused"),
        (End(2, ""), False, "messages"),
        (End(2, REFUSED + REFUSED), False, "messages"),
        (End(2, f"Traceback (most recent call last):\n{REFUSED}"), False, "traceback"),
        (End(1, "Traceback (most recent call last):\n"), False, "traceback"),
        (End(1, "recgpt_torchrec.evaluate: error: OSError: x\n"), False, "status 1"),
        (End(-9, ""), False, "killed"),
        (End(None, ""), False, "hang"),
        (End(0, "", "expected"), False, "right"),
        (End(0, "", "other"), False, "wrong"),
        (End(0, "", "other"), True, "another"),
        (End(0, "Damaged: 8 rows were left out, listed in x", "other"), False, "left out"),
        (End(0, "Damaged: no row", "other"), False, "wrong"),
    ],
)
def test_outcomes(end: End, is_chosen: bool, outcome: str, case: Path) -> None:
    assert judge(KIND, end, "expected", is_chosen, case, f"{case}/canary") == outcome


def test_a_command_that_ran_and_a_path_outside_the_folder_are_noticed(case: Path) -> None:
    (case / "canary").touch()
    assert judge(KIND, End(2, REFUSED), "", False, case, f"{case}/canary") == "canary"
    assert judge(KIND, End(2, REFUSED), "", False, case, f"{case}/canary") == "refused"
    (case.parent / "x").touch()
    assert judge(KIND, End(2, REFUSED), "", False, case, f"{case}/canary") == "outside"


def interrupt() -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def sleep() -> int:
    time.sleep(60)
    return 0


def allocate() -> int:
    bytearray(2 * MEMORY)
    return 0


def fail() -> int:
    raise ValueError("x")


@pytest.mark.parametrize(
    ("function", "status", "text"),
    [(interrupt, -signal.SIGKILL, ""), (sleep, None, ""), (allocate, 1, "MemoryError"), (fail, 1, "Traceback")],
)
def test_processes_end_within_their_limits(function: Any, status: int | None, text: str, case: Path) -> None:
    end = run_in_process(case, function, "none", seconds=5)
    assert end.status == status and text in end.text
