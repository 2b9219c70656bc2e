"""`--train.profile` leaves a trace of the steps it names, and a table of the largest operations."""

import json
from pathlib import Path

import pytest

from recgpt_torchrec.training.trace import FIRST, LARGEST
from tests.support import SMALL, read_epochs, stage, walks, write_dataset


def train(folder: Path, profile: int, epochs: int = 2) -> Path:
    if not (folder / "data").exists():
        write_dataset(folder / "data", walks(users=60, items=20), items=20)
    options = {**SMALL, "--batch.tokens": 20, "--train.epochs": epochs, "--train.profile": profile}
    assert stage("pretrain", {"--data": folder / "data", "--output": folder / "run", **options}) == 0
    return folder / "run"


def steps_in(trace: Path) -> int:
    """Number of backward passes in a trace."""
    events = json.loads(trace.read_text())["traceEvents"]
    return sum(
        event.get("name", "").startswith("## backward") for event in events if event.get("cat") == "user_annotation"
    )


def test_the_steps_asked_for_are_traced(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path, 3)
    trace = run / "profile" / f"steps-{FIRST + 1}-{FIRST + 3}.json"
    assert sorted(path.name for path in (run / "profile").iterdir()) == [trace.name, "summary.txt"]
    assert steps_in(trace) == 3
    shown = capfd.readouterr()
    said = " ".join(shown.out.split())
    assert "profiler_start" not in shown.err
    assert f"Traced steps {FIRST + 1} to {FIRST + 3}: open {trace} at ui.perfetto.dev" in said
    rows = (run / "profile" / "summary.txt").read_text().split("---  \n")[2].splitlines()
    assert 5 < len([row for row in rows if not row.startswith("-")]) <= LARGEST


def test_a_trace_ends_with_its_epoch_so_that_it_holds_no_validation(tmp_path: Path) -> None:
    run = train(tmp_path, 1000)
    last = read_epochs(run)[0]["step"]
    trace = run / "profile" / f"steps-{FIRST + 1}-{last}.json"
    assert [path.name for path in (run / "profile").glob("*.json")] == [trace.name]
    assert steps_in(trace) == last - FIRST


def test_a_run_that_is_too_short_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(tmp_path / "data", walks(users=6, items=20), items=20)
    run = train(tmp_path, 3, epochs=1)
    assert not (run / "profile").exists()
    assert "No step was traced: --train.profile begins after 10 steps" in " ".join(capsys.readouterr().out.split())
