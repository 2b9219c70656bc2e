"""`tools/benchmarks/time_to_quality.py`: when a run has reached a value, and what was spent until then."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from recgpt_torchrec.data.dataset import histories_fingerprint
from tools.benchmarks import time_to_quality
from tools.benchmarks.time_to_quality import reach
from tools.small_run import walks, write_dataset

RUN = """
import json, os, time
time.sleep(0.5)  # start-up
os.makedirs({output!r} + "/tensorboard")
for step, value in enumerate({values}, 1):
    time.sleep(0.7)  # 0.3 s of training, 0.4 of validation
    text = json.dumps({{"epoch": 1, "step": step, "NDCG@10": value, "validate_s": 0.4}})
    with open({output!r} + "/history.jsonl", "a") as file:
        file.write(text[:9])
        file.flush()
        time.sleep(0.1)  # a line is read once it is whole
        file.write(text[9:] + "\\n")
time.sleep({sleep})
"""


def run(tmp_path: Path, values: list[float], sleep: float = 0) -> tuple[list[str], Path]:
    code = RUN.format(values=values, output=str(tmp_path), sleep=sleep)
    return [sys.executable, "-S", "-c", code], tmp_path


def test_a_run_ends_where_it_reaches_the_value_and_start_and_validations_are_left_out(tmp_path):
    since = time.perf_counter()
    found = reach(0.03, *run(tmp_path, [0.01, 0.03, 0.05], sleep=60))
    assert time.perf_counter() - since < 50
    assert (found["reached"], found["step"], found["value"]) == (True, 2, 0.03)
    assert found["wall_s"] >= 0.5 + 2 * 0.8
    # on a busy machine it may be more, and start-up takes longer too
    assert 2 * 0.4 - 0.1 <= found["train_s"] <= found["wall_s"] - 0.5 - 2 * 0.4 + 0.1


def test_a_run_that_does_not_reach_it_says_how_far_it_came(tmp_path):
    found = reach(0.5, *run(tmp_path, [0.04, 0.03]))
    assert (found["reached"], found["step"], found["value"]) == (False, 1, 0.04)


def test_a_run_that_fails_is_not_taken_for_a_slow_one(tmp_path):
    with pytest.raises(SystemExit, match="ended with status 3"):
        reach(0.5, [sys.executable, "-c", "raise SystemExit(3)"], tmp_path)


def test_both_are_told_side_by_side(tmp_path, monkeypatch, capsys):
    def train(options):
        assert (options.models, options.threads, options.model_options["n_layers"]) == (["SASRec"], 1, 1)
        best = {"masked": 0.03, "epochs": 1.5, "train_s": 600.0, "seconds": 660.0}
        Path(options.output, "SASRec.json").write_text(json.dumps({"best": best, "curve": [best], "setup_s": 10.0}))

    monkeypatch.setattr("tools.compare_recbole.run", train)
    ours = {"reached": True, "value": 0.031, "epoch": 2, "train_s": 10.0, "wall_s": 20.0}
    monkeypatch.setattr(time_to_quality, "reach", lambda value, command, output: ours)
    words = ["--data", "d", "--config", "c", "--minutes", "5", "--layers", "1", "--output", str(tmp_path / "o.json")]
    time_to_quality.main(words)
    written = json.loads((tmp_path / "o.json").read_text())
    assert written["ratios"] == {"train_s": 60.0, "wall_s": 33.5} and written["recbole"]["value"] == 0.03
    assert "ratio 60 (goal 50); with start and validations 34" in capsys.readouterr().out


def test_an_earlier_result_takes_the_place_of_training(tmp_path, monkeypatch, capsys):
    data = str(tmp_path / "data")
    histories = histories_fingerprint(write_dataset(data, walks(users=20, items=12)))
    best = {"masked": 0.03, "epochs": 1.5, "train_s": 600.0, "seconds": 660.0}
    settings = {"threads": 1, "histories": histories, "seed": 0, "minutes": 12}
    result: dict[str, Any] = {"model": "SASRec", "options": {"n_layers": 2}, "settings": settings}
    result |= {"best": best, "curve": [best], "setup_s": 10.0}
    file = tmp_path / "SASRec.json"
    ours = {"reached": True, "value": 0.031, "epoch": 2, "train_s": 10.0, "wall_s": 20.0}
    monkeypatch.setattr(time_to_quality, "reach", lambda value, command, output: ours)
    words = ["--data", data, "--config", "c", "--recbole", str(file), "--output", str(tmp_path / "o.json")]
    file.write_text(json.dumps(result))
    time_to_quality.main(words)
    assert "ratio 60 (goal 50)" in capsys.readouterr().out
    assert json.loads((tmp_path / "o.json").read_text())["options"]["minutes"] == 12
    for changed, said in (
        ({"settings": {**settings, "threads": 2}}, "2 threads"),
        ({"settings": {**settings, "histories": "x"}}, "other histories"),
        ({"model": "GRU4Rec", "options": {}}, "is of GRU4Rec"),
        ({"options": {"n_layers": 1}}, "SASRec with 1 layers"),
        ({"settings": {**settings, "seed": 1}}, "seed 1"),
    ):
        file.write_text(json.dumps({**result, **changed}))
        with pytest.raises(SystemExit, match=said):
            time_to_quality.main(words)
