"""The benchmark: every kind runs at toy size; turns, ratios and plain loops are what they claim to be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tools import benchmark
from tools.benchmarks.measuring import Kind, Measured, Ratio, repeat, rotated, table, take_turns
from tools.plain_packed import PackedLoop, pack
from tools.plain_padded import LENGTH, PaddedLoop, TrainingData
from tools.small_run import training_part, walks, write_dataset

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def histories() -> list[list[int]]:
    return [*walks(120, 300, shortest=5, longest=30), [1], [1, 2], [1, 2, 3], list(range(70))]


@pytest.fixture(scope="module")
def data(histories: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("benchmark") / "data", histories, items=300).path


@pytest.mark.timeout(290)
def test_every_kind_runs_at_toy_size_and_gives_its_figures(data: str, tmp_path: Path) -> None:
    """In a process of its own: the benchmark makes a process group."""
    command = [sys.executable, "-m", "tools.benchmark", "--data", data, "--output", "figures.json", "--quick"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--rounds", "1"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kinds = json.loads((tmp_path / "figures.json").read_text())["kinds"]
    assert list(kinds) == list(benchmark.KINDS)
    for name, kind in kinds.items():
        assert kind["ways"], name
        for ratio, value in kind["ratios"].items():
            assert 0 < value["min"] <= value["median"] <= value["max"], f"{name}: {ratio}"
            assert f"= {ratio}: " in done.stdout
    for name in ("sampled, split", "all, split"):
        shares = [share["median"] for share in kinds["floor"]["ways"][name].values()]
        assert len(shares) == 7 and sum(shares) == pytest.approx(1) and min(shares) >= 0
    assert {"ranks", "stream", "epoch"} <= kinds.keys()


def test_a_kind_that_does_not_exist_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        benchmark.main(["--data", "x", "--output", str(tmp_path / "y.json"), "--only", "speed"])
    assert caught.value.code == 2 and "speed" in capsys.readouterr().err


def test_ways_take_turns_and_ratios_are_of_the_same_round() -> None:
    order: list[str] = []
    rates = {"a": [10.0, 100.0, 30.0], "b": [5.0, 25.0, 10.0]}

    def way(name: str):
        def turn() -> dict[str, float]:
            order.append(name)
            return {"rate_s": rates[name][order.count(name) - 1]}

        return turn

    kind = Kind({"a": way("a"), "b": way("b")}, {"a over b": Ratio(("a", "rate_s"), ("b", "rate_s"), 2.5)})
    measured = {"kind": Measured(kind)}
    for number in range(3):
        take_turns(measured, number, lambda text: None)
    assert order == ["a", "b", "b", "a", "a", "b"]
    values = measured["kind"].to_json()
    assert values["ratios"]["a over b"] == {
        "median": 3.0,
        "min": 2.0,
        "max": 4.0,
        "values": [2.0, 4.0, 3.0],
        "goal": 2.5,
    }
    assert values["ways"]["a"]["rate_s"]["median"] == 30.0
    assert "= a over b: 3.00 (2.00-4.00; goal 2.5)" in table(measured)


def test_names_are_rotated() -> None:
    assert [rotated(["a", "b", "c"], by) for by in range(4)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
        ["a", "b", "c"],
    ]


def test_a_repeated_function_is_called_at_least_once_and_its_sum_is_a_rate() -> None:
    figures = repeat(lambda: 7.0, 0.0)
    assert figures["calls"] == 1 and figures["rate_s"] * figures["seconds"] == pytest.approx(7.0)


def test_plain_loops_train_on_the_training_parts_newest_items(data: str, histories: list[list[int]]) -> None:
    plain = TrainingData(data)
    expected = [training_part(history)[-(LENGTH + 1) :] for history in histories if len(training_part(history)) > 1]
    # Of two items a plain loop holds out both; the project trains on histories too short to hold out from.
    expected = [history for history in expected if list(history) != [1, 2]]
    assert [history.tolist() for history in plain.histories] == expected
    targets = sum(len(history) - 1 for history in expected)
    assert PaddedLoop(plain).run(1) == PackedLoop(plain).run(1) == targets  # one batch holds all


def test_plain_loops_learn(data: str) -> None:
    for make in (PaddedLoop, PackedLoop):
        loop = make(TrainingData(data))
        for _ in range(30):
            loop.run(1)
        assert np.mean(loop.losses[-5:]) < np.mean(loop.losses[:5]) - 0.1, make


def test_first_fit_fills_rows_without_overlap() -> None:
    assert pack([40, 30, 24]) == (2, [0, 64, 40])
    lengths = np.random.default_rng(0).integers(1, 51, 200).tolist()
    rows, starts = pack(lengths)
    used = np.concatenate([np.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)])
    assert np.unique(used).size == used.size == sum(lengths) and used.max() < rows * 64
    assert all(start // 64 == (start + length - 1) // 64 for start, length in zip(starts, lengths, strict=True))


def test_the_packed_model_gives_a_history_the_same_outputs_wherever_it_lies(data: str) -> None:
    loop = PackedLoop(TrainingData(data))
    model = loop.model.eval()
    items = torch.arange(10)[None]
    alone = model(items, torch.zeros(1, 10, dtype=torch.int64), torch.arange(10)[None], torch.zeros_like(items))
    shared_items = torch.cat([torch.full((1, 5), 7), items], 1)
    positions = torch.cat([torch.arange(5), torch.arange(10)])[None]
    sequences = torch.tensor([[0] * 5 + [1] * 10])
    beside = model(shared_items, torch.zeros(1, 15, dtype=torch.int64), positions, sequences)
    torch.testing.assert_close(beside[:, 5:], alone)
