"""`tools/benchmarks/time_to_quality.py`: when a run has reached a value, and what was spent until then."""

import json
import sys
import time
from pathlib import Path

import pytest

from tools.benchmarks import time_to_quality
from tools.benchmarks.time_to_quality import reach

RUN = """
import json, sys, time
for epoch, value in enumerate({values}, 1):
    with open({history!r}, "a") as file:
        file.write(json.dumps({{"epoch": epoch, "NDCG@10": value, "train_s": 2.0 * epoch}})[:9])
        file.flush()
        time.sleep(0.1)  # a line is read once it is whole
        file.write(json.dumps({{"epoch": epoch, "NDCG@10": value, "train_s": 2.0 * epoch}})[9:] + "\\n")
time.sleep({sleep})
"""


def run(tmp_path: Path, values: list[float], sleep: float = 0) -> tuple[list[str], Path]:
    history = tmp_path / "history.jsonl"
    return [sys.executable, "-c", RUN.format(values=values, history=str(history), sleep=sleep)], history


def test_a_run_ends_where_it_reaches_the_value_and_its_epochs_are_summed(tmp_path):
    since = time.perf_counter()
    found = reach(0.03, *run(tmp_path, [0.01, 0.02, 0.03, 0.05], sleep=60))
    assert time.perf_counter() - since < 50
    assert (found["reached"], found["epoch"], found["value"], found["train_s"]) == (True, 3, 0.03, 2 + 4 + 6)
    assert 0.3 < found["wall_s"] < 50


def test_a_run_that_does_not_reach_it_says_how_far_it_came(tmp_path):
    found = reach(0.5, *run(tmp_path, [0.01, 0.04, 0.03]))
    assert (found["reached"], found["epoch"], found["value"], found["train_s"]) == (False, 2, 0.04, 2 + 4)


def test_a_run_that_fails_is_not_taken_for_a_slow_one(tmp_path):
    with pytest.raises(SystemExit, match="ended with status 3"):
        reach(0.5, [sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "history.jsonl")


def test_both_are_told_side_by_side(tmp_path, monkeypatch, capsys):
    def train(options):
        assert (options.models, options.threads, options.model_options) == (["SASRec"], 1, {"n_layers": 1})
        best = {"masked": 0.03, "epochs": 1.5, "train_s": 600.0, "seconds": 660.0}
        Path(options.output, "SASRec.json").write_text(json.dumps({"best": best, "curve": [best], "setup_s": 10.0}))

    monkeypatch.setattr("tools.compare_recbole.run", train)
    ours = {"reached": True, "value": 0.031, "epoch": 2, "train_s": 10.0, "wall_s": 20.0}
    monkeypatch.setattr(time_to_quality, "reach", lambda value, command, history: ours)
    words = ["--data", "d", "--config", "c", "--minutes", "5", "--layers", "1", "--output", str(tmp_path / "o.json")]
    time_to_quality.main(words)
    written = json.loads((tmp_path / "o.json").read_text())
    assert written["ratios"] == {"train_s": 60.0, "wall_s": 33.5} and written["recbole"]["value"] == 0.03
    assert "ratio 60 (goal 50); with start and validations 34" in capsys.readouterr().out
