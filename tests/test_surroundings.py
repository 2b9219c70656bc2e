"""Stages whose standard streams are closed, cannot write every letter or are no longer read; a folder that is gone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from recgpt_torchrec.data.dataset import Dataset

COMMAND = f"{sys.executable} -m recgpt_torchrec prepare --input ünï.csv --output data --time_column null"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [f"u{user},i{item}" for user in range(8) for item in range(8)]
    (tmp_path / "ünï.csv").write_text("\n".join(["user_id,item_id", *rows, ""]), encoding="utf-8")
    return tmp_path


def run(folder: Path, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **environment}
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=given, capture_output=True, encoding="utf-8", errors="replace"
    )


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_a_stage_works_where_streams_are_closed(folder, closed):
    done = run(folder, f"{COMMAND} {closed}")
    assert done.returncode == 0, done.stderr
    assert Dataset.open(str(folder / "data")).manifest.users == 8
    assert ("dataset     8 users" in done.stdout) == (closed == "2>&-")


def test_a_failure_is_a_failure_where_nothing_can_be_said(folder):
    assert run(folder, f"{COMMAND} --nope 1 2>&-").returncode == 2
    assert run(folder, f"{COMMAND}/below.csv/x --input none.csv 2>&-").returncode == 2


@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C"}]
)
def test_letters_that_a_stream_lacks_end_no_stage(folder, environment):
    done = run(folder, COMMAND, **environment)
    assert done.returncode == 0, done.stderr
    assert ("\\xfcn\\xef.csv" in done.stdout) == (environment.get("PYTHONIOENCODING") == "ascii")


def test_an_argument_that_is_no_text_is_refused(folder):
    done = run(folder, COMMAND, **POSIX)
    assert done.returncode == 2
    assert "csv' in the command cannot be decoded as ascii; set LC_ALL=C.UTF-8 or PYTHONUTF8=1, or" in done.stderr


POSIX = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""A locale whose letters are ASCII; Python takes UTF-8 all the same unless it is told not to."""


def test_letters_that_the_locale_lacks_are_escaped(folder):
    code = "from recgpt_torchrec.progress import open_streams; open_streams(); print(chr(233))"
    assert run(folder, f'{sys.executable} -c "{code}"', **POSIX).stdout == "\\xe9\n"


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_programs_that_a_stage_starts_have_streams_too(folder, closed):
    """Else the first file that they open takes the number of one, and a library's warning is written into it."""
    inner = "import os; open(chr(97), chr(119)).write(str([os.fstat(number).st_mode > 0 for number in range(3)]))"
    code = "from recgpt_torchrec.progress import open_streams; open_streams(); import subprocess, sys\n"
    code += f"subprocess.run([sys.executable, '-c', '{inner}'], check=True)"
    (folder / "outer.py").write_text(code)
    assert run(folder, f"{sys.executable} outer.py {closed}").returncode == 0
    assert (folder / "a").read_text() == "[True, True, True]"


@pytest.mark.parametrize(
    ("to", "said"),
    [
        ("| true", "what reads standard output has closed it"),
        ("> /dev/full", "standard output cannot be written (No sp"),
    ],
)
def test_output_that_is_lost_is_named(folder, to, said):
    done = run(folder, f"{COMMAND} {to}; exit ${{PIPESTATUS[0]}}")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"recgpt prepare: error: {said}") and line.endswith("; what should come next is lost")
    assert Dataset.open(str(folder / "data")).manifest.users == 8


def test_a_current_folder_that_is_gone_is_named(folder):
    gone = folder / "gone"
    gone.mkdir()
    done = run(folder, f"cd {gone} && rmdir {gone} && {COMMAND}")
    assert done.returncode == 1
    assert "error: the current folder has been removed; change into another one" in done.stderr
