"""`pipelines/demo.py` on a log of one's own: the options of prepare come after `--`."""

import contextlib
import json
import sys
from pathlib import Path

import pytest

from pipelines import demo, steps
from pipelines.experiment import from_root
from tests.pipelines.test_paper import CONFIG, InProcess
from tools import synthetic_log


class WithoutTorchx(InProcess):
    """Runs the training in this process too, which the demo starts by torchx."""

    def __call__(self, command: list[str], log: Path | None = None) -> int:
        if command[0] == "torchx":
            command = ["python", "-m", "recgpt_torchrec.pretrain", *command[command.index("--") + 1 :]]
        with contextlib.chdir(steps.ROOT):  # where a step runs
            return super().__call__(command, log)


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch) -> WithoutTorchx:
    made = WithoutTorchx()
    monkeypatch.setattr(steps, "execute", made)
    return made


def stages(executor: WithoutTorchx) -> list[str]:
    return [command[2].rpartition(".")[2] for command in executor.ran]


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> Path:
    log = tmp_path / "log.csv"
    synthetic_log.main(["--output", str(log), "--users", "150", "--items", "40", "--mean_events", "10"])
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    own = ["--output", str(tmp_path / "out"), "--config", str(tmp_path / "tiny.yaml")]
    monkeypatch.setattr(sys, "argv", ["demo", *own, "--", "--input", "log.csv", *words])
    demo.main()
    return tmp_path / "out"


def test_a_split_by_time_from_one_command_to_lists(tmp_path, monkeypatch, executor, capsys):
    output = run(tmp_path, monkeypatch, "--hold_out", "time", "--test_from", "85%")
    assert stages(executor) == ["prepare", "pretrain", "evaluate", "export", "retrieve"]
    assert json.loads((output / "test.json").read_text())["hold_out"] == "time"
    assert (output / "lists/manifest.json").exists()
    assert "co-occurrence" in capsys.readouterr().out


def test_where_nothing_is_held_out_nothing_is_evaluated(tmp_path, monkeypatch, executor, capsys):
    output = run(tmp_path, monkeypatch, "--hold_out", "none")
    assert stages(executor) == ["prepare", "pretrain", "export", "retrieve"]
    assert (output / "lists/manifest.json").exists()
    assert "evaluation    none: nothing is held out for test" in capsys.readouterr().out


def test_paths_are_seen_from_the_folder_of_the_user(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--input", "a.csv", "s3://b/c.csv", "--user_column", "a.csv", "--test_input", "t.csv", "--min_count", "2"]
    here = [from_root(str(tmp_path / name)) for name in ("a.csv", "t.csv")]
    found = demo.paths_from_root(words)
    assert found == ["--input", here[0], "s3://b/c.csv", "--user_column", "a.csv", "--test_input", here[1], *words[-2:]]


def test_without_an_input_after_the_dashes_it_says_what_belongs_there(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo", "--", "--hold_out", "none"])
    with pytest.raises(SystemExit):
        demo.main()
    assert "come after --, with its --input" in capsys.readouterr().err
