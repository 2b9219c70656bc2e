"""The benchmark of large catalogues: it measures every rank, goes on after a failure, and runs nothing twice."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from recgpt_torchrec.errors import STOPPED
from tools.benchmarks import catalogue
from tools.benchmarks.processes import Ended, base_bytes, run_stage_measured

OPTIONS = ["--users", "100", "--dim", "8", "--tokens", "64", "--steps", "4"]


def test_every_ranks_peak_is_measured_and_a_signal_is_sent_once() -> None:
    options: dict[str, object] = {"--items": 1000, "--users": 10, "--gpu": "cpu", "--peak": 1, "--hbm_bandwidth": 1}
    asked: list[float] = []

    def until(said: str, seconds: float) -> bool:
        asked.append(seconds)
        return False

    ended = run_stage_measured("plan", options, 2, timeout=120, until=until)
    assert ended.status == 0 and ended.said.count("Smallest cluster") == 2
    assert set(ended.peaks) == {0, 1} and all(10**8 < peak < 4 * 10**9 for peak in ended.peaks.values())
    assert asked == sorted(asked) and asked
    alone = run_stage_measured("plan", options, 1, timeout=120, until=lambda said, seconds: True)
    assert alone.status == -15 and list(alone.peaks) == [0]  # it has no handler of its own: SIGTERM ends it
    late = run_stage_measured("plan", options, 1, timeout=0.3)
    assert late.status == -9 and late.seconds < 30
    assert 10**8 < base_bytes() < 2 * 10**9


def test_pretraining_is_stopped_some_seconds_after_its_header() -> None:
    watch = catalogue.Watch(stop_after=5.0)
    assert not watch("starting", 3.0) and watch.began is None
    assert not watch("Training on 2 ranks", 4.0) and not watch("Training on 2 ranks", 8.9)
    assert watch.began == 4.0 and watch("Training on 2 ranks", 9.0)
    assert not catalogue.Watch(None)("Training on 2 ranks", 99.0)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """The stages that were run, none of which does anything; the second pretrain of a size fails."""
    done: list[tuple[str, dict[str, Any]]] = []

    def run(stage: str, options: dict[str, Any], ranks: int, *, timeout: float, until: Any) -> Ended:
        done.append((stage, options))
        Path(options["--data"], "read").touch()
        first = stage == "pretrain" and [each for each, _ in done].count("pretrain") % 2
        if until.stop_after is not None:
            until("Training on 2 ranks", 1.5)
        return Ended(STOPPED if first else 3 if stage == "pretrain" else 0, 2.0, {0: 2**30, 1: 2**29}, "why it failed")

    monkeypatch.setattr(catalogue, "run_stage_measured", run)
    monkeypatch.setattr(catalogue, "base_bytes", lambda: 2**28)
    monkeypatch.setattr(catalogue.Size, "_step_ms", lambda self: self.items / 100)
    return done


def test_a_failed_stage_is_recorded_and_the_next_one_is_run(runs: Any, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "figures.json"
    words = [*OPTIONS, "--folder", str(tmp_path), "--output", str(output)]
    assert catalogue.main(["--items", "1e3", "2e3", *words]) == 1
    stages = ["pretrain", "pretrain", "evaluate", "generate_prompts"]
    assert [stage for stage, _ in runs] == 2 * stages
    first, second = (options for stage, options in runs[:2])
    assert first == second and first["--train.steps"] == 4
    figures = json.loads(output.read_text())
    assert figures["base"] == 2**28 and set(figures["sizes"]) == {"1000", "2000"}
    of_size = figures["sizes"]["1000"]
    assert list(of_size) == list(catalogue.STAGES)
    assert of_size["resume"]["status"] == 3 and of_size["resume"]["said"] == "why it failed"
    assert of_size["pretrain"]["began"] == 1.5 and of_size["pretrain"]["peaks"] == {"0": 2**30, "1": 2**29}
    assert of_size["write"]["status"] == 0 and of_size["write"]["peaks"]["0"] > 10**7
    said = capsys.readouterr().out
    assert "FAILED with status 3, going on with the next stage\nwhy it failed" in said
    assert "time of a step at 2,000 items over that at 1,000: 2.00" in said
    assert not [path for path in tmp_path.iterdir() if path != output]

    runs.clear()
    catalogue.main(["--items", "1e3", "3e3", *words])
    assert len(runs) == 4 and "1,000 items: in" in capsys.readouterr().out  # only the size that was not there
    with pytest.raises(SystemExit):
        catalogue.main(["--items", "1e3", *words, "--dim", "16"])
    assert "holds figures of other options" in capsys.readouterr().err


def test_the_bytes_of_the_shards_are_those_of_the_fullest_rank(tmp_path: Path) -> None:
    options = argparse.Namespace(users=1000, ranks=2, dim=32, tokens=512)
    size = catalogue.Size(10**6, options, tmp_path, lambda name, values: None)
    # Half of each item's vector, and a copy of the users, with a moment per row.
    assert size.shard_bytes(trained=True) == 4 * (10**6 * (16 + 1) + 1000 * (32 + 1))
    assert size.shard_bytes(trained=False) == pytest.approx(4 * (10**6 * 16 + 1000 * 32), rel=0.001)
