"""Steps that are done once: what is run again, what is refused, and what an interruption leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from pipelines.steps import ROOT, RecordedSteps, clock


def write(path: Path, text: str = "made") -> list[str]:
    return ["python", "-c", f"open({str(path)!r}, 'w').write({text!r}); print('written')"]


def run(
    folder: Path, commands: dict[str, list[str]], needs: Mapping[str, tuple[str, ...]] | None = None, **more
) -> int:
    with RecordedSteps("test", folder, ["x made"] * len(commands)) as steps:
        for title, command in commands.items():
            options = {"proof": folder / title, "needs": (needs or {}).get(title, ()), **more}
            steps.run(title, command, kind="x made", **options)
        return steps.executed


def test_a_step_is_done_once_and_its_words_are_kept(tmp_path, capsys):
    commands = {"a": write(tmp_path / "a"), "b": write(tmp_path / "b")}
    assert run(tmp_path, commands) == 2
    assert run(tmp_path, commands) == 0
    assert "step 2 of 2: b: done before" in capsys.readouterr().out
    assert (tmp_path / "steps/a.log").read_text().endswith("written\n")
    (tmp_path / "b").unlink()
    assert run(tmp_path, commands) == 1


def test_a_step_made_from_other_inputs_is_refused_or_run_again(tmp_path, capsys):
    commands, needs = {"a": write(tmp_path / "a"), "b": write(tmp_path / "b")}, {"b": ("a",)}
    assert run(tmp_path, commands, needs, repeatable=True) == 2
    (tmp_path / "a").unlink()
    assert run(tmp_path, commands, needs, repeatable=True) == 2  # a anew, so b as well
    (tmp_path / "a").unlink()
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, commands, needs)
    assert ended.value.code == 2 and "the step b was run with other options or inputs before" in capsys.readouterr().err


def test_a_failing_step_ends_the_pipeline_with_its_status(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, {"a": ["python", "-c", "print('the reason'); raise SystemExit(7)"]})
    assert ended.value.code == 7
    shown = capsys.readouterr()
    assert "the reason" in shown.out and "the step a failed with exit status 7" in shown.err
    with pytest.raises(SystemExit):
        run(tmp_path, {"a": ["python", "-c", "pass"]}, repeatable=True)
    assert "left no" in capsys.readouterr().err


def test_an_interrupted_pipeline_leaves_nothing_running_and_no_finished_step(tmp_path):
    pid = tmp_path / "pid"
    sleeper = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    program = (
        "from pipelines.steps import pipeline\n"
        f"with pipeline('test', {str(tmp_path)!r}, ['x made']) as steps:\n"
        f"    steps.run('a', ['python', '-c', {sleeper!r}], kind='x made', proof={str(pid)!r})\n"
    )
    pipeline = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    try:
        until = time.monotonic() + 60
        while not (pid.exists() and pid.read_text()) and time.monotonic() < until:
            time.sleep(0.05)
        with pytest.raises(SystemExit) as ended:
            run(tmp_path, {"other": write(tmp_path / "other")})
        assert ended.value.code == 2  # one process at a time
        pipeline.send_signal(signal.SIGTERM)
        assert pipeline.wait(30) == 143
    finally:
        pipeline.kill()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    record = json.loads((tmp_path / "steps/a.json").read_text())
    assert record["id"] is None and record["seconds"] > 0


def test_clock():
    assert [clock(s) for s in (5, 65, 3661)] == ["0:05", "1:05", "1:01:01"]
