"""Output of a run without a terminal, and in a job's log file."""

import re
import sys
from pathlib import Path

import pytest

from recgpt_torchrec import progress
from recgpt_torchrec.distributed.processes import log_message, print_result
from recgpt_torchrec.training.meter import Speed
from recgpt_torchrec.training.runlog import RunLog

SPEED = Speed(
    targets_per_s=1000.0,
    tokens_per_s=1500.0,
    flops_per_s=2e9,
    peak=8e9,
    memory_mib=300.0,
    host_memory_mib=300.0,
    split={"lookup": 0.25, "data wait": 0.75},
)


def test_a_line_of_progress_names_its_own_epoch_and_none_comes_before_something_was_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    with RunLog(str(tmp_path), total=100, done=10) as log:
        assert capsys.readouterr().err == ""  # a run that resumes
        log.advance(10, epoch=1)
        log.log_epoch({"epoch": 2, "step": 2, "loss": 1.5}, SPEED, step=2)
        log.advance(10, epoch=2)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("epoch 2:  20%")
    assert second.startswith("epoch 3:  30%") and second.endswith("loss 1.500")


def test_messages_of_a_job_have_time_and_rank_before_each_line_and_results_have_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    log_message("going", 2, "on")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    log_message("one\ntwo")
    print_result("a result")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    log_message("on a terminal")
    plain, one, two, result, shown = capsys.readouterr().out.splitlines()
    assert (plain, result, shown) == ("going 2 on", "a result", "on a terminal")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d rank 1: one", one) and two.endswith(" rank 1: two")
