"""The check of estimates against runs: it fails where they differ by more than allowed, or a run fails."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from tools import check_plan
from tools.benchmarks.processes import Ended

WORDS = ["--items", "20000", "--users", "100", "--ranks", "2", "--tokens", "64", "--steps", "4"]
BASE = 300 * 2**20


@pytest.mark.parametrize(("factor", "status"), [(1.0, 0), (1.1, 0), (1.3, 1), (0.8, 1)])
def test_the_status_says_whether_the_fullest_rank_is_near_the_estimate(
    factor: float, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    def train(options: argparse.Namespace, data: str, output: str, ranks: int) -> Ended:
        assert Path(data, "manifest.json").exists()
        memory = check_plan.estimate_of(options, 20_000, ranks).memory
        process = next(item.device for item in memory.items if item.name == "process")
        used = (memory.total("device") - process) / factor
        Path(output).mkdir()
        Path(output, "history.jsonl").write_text(json.dumps({"tokens_per_s": 1280.0}) + "\n")
        return Ended(0, 1.0, {0: BASE, 1: int(BASE + used)}, "")

    monkeypatch.setattr(check_plan, "train", train)
    monkeypatch.setattr(check_plan, "base_bytes", lambda: BASE)
    assert check_plan.main([*WORDS, "--output", str(tmp_path / "plan.json")]) == status
    (row,) = json.loads((tmp_path / "plan.json").read_text())["runs"]
    assert row["ratio"] == pytest.approx(factor, rel=0.02) and row["step"] == 0.1  # 128 tokens at 1,280 per second
    assert f"{1 - status} of 1 within 15%" in capsys.readouterr().out


def test_a_run_that_fails_is_shown_and_counts_as_off(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(check_plan, "train", lambda *_: Ended(1, 1.0, {0: BASE}, "first\nno memory left"))
    monkeypatch.setattr(check_plan, "base_bytes", lambda: BASE)
    assert check_plan.main(WORDS) == 1
    said = capsys.readouterr().out
    assert "failed with status 1:\nfirst\nno memory left" in said and "0 of 1 within 15%" in said
