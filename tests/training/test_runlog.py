"""What a run shows of itself where there is no terminal."""

from pathlib import Path

import pytest

from recgpt_torchrec import progress
from recgpt_torchrec.training.runlog import RunLog


def test_a_line_of_progress_names_its_own_epoch_and_none_comes_before_something_was_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    with RunLog(str(tmp_path), total=100, done=10) as log:
        assert capsys.readouterr().err == ""  # a run that goes on
        log.read(10, epoch=1)
        log.epoch({"epoch": 2, "step": 2, "loss": 1.5}, step=2)
        log.read(10, epoch=2)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("epoch 2:  20%")
    assert second.startswith("epoch 3:  30%") and second.endswith("loss 1.500")
