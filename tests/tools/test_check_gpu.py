"""The GPU check on CPU at toy size: every rung and stage, its time limit, and that its first part needs torch alone."""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from recgpt_torchrec.training.execution import Execution
from tools import check_gpu
from tools.gpu import ladder
from tools.gpu.presets import Preset, make_inputs

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TORCH_ALONE = """
import sys

sys.modules |= dict.fromkeys(("torchrec", "pyarrow", "fbgemm_gpu", "jsonargparse"))  # importing one of these fails
import recgpt_torchrec.config, recgpt_torchrec.model.dense
import tools.gpu.ladder, tools.gpu.worker
print(tools.gpu.worker.smoke.missing("cpu"))
"""


def run(arguments: list[str], folder: Path, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
    )


def check(part: str, folder: Path) -> dict[str, Any]:
    """Run one part on CPU, and read what it found."""
    output = folder / "gpu.json"
    command = ["-m", "tools.check_gpu", "--device", "cpu", "--toy", "--only", part, "--output", str(output)]
    done = run([*command, "--time_limit", "270"], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(output.read_text())
    assert not found["cut_at_time_limit"]
    return found


@pytest.mark.timeout(290)
def test_every_rung_runs_on_cpu_at_toy_size_or_says_why_it_cannot(tmp_path: Path) -> None:
    found = check("ladder", tmp_path)
    for name in check_gpu.PRESETS:
        rungs = {rung["rung"]: rung for rung in found["ladder"] if rung["preset"] == name}
        assert list(rungs) == list(ladder.LADDER)
        for rung in ("fp32", "bf16"):
            assert rungs[rung]["targets_s"] > 0 and 0 < rungs[rung]["share_of_measured"] < 1
            assert rungs[rung]["parity"]["ok"]
        for rung in ("tf32", "varlen", "fused loss"):
            assert "CUDA" in rungs[rung]["reason"]


@pytest.mark.timeout(290)
def test_stages_run_on_cpu_and_a_killed_run_resumes_to_the_same_result(tmp_path: Path) -> None:
    found = check("stages", tmp_path)
    assert found["smoke"] and all(done["ok"] for done in found["smoke"])
    checks = " ".join(done["check"] for done in found["smoke"])
    for word in ("prepare", "killed", "resumed", "evaluate", "export", "as not disturbed"):
        assert word in checks


def test_the_time_limit_cuts_what_runs_and_leaves_a_whole_file(tmp_path: Path) -> None:
    since = time.monotonic()
    output = tmp_path / "gpu.json"
    command = ["-m", "tools.check_gpu", "--device", "cpu", "--toy", "--output", str(output), "--time_limit", "0.5"]
    done = run(command, tmp_path, timeout=120)
    assert done.returncode == 1 and "cut at the time limit" in done.stdout
    assert time.monotonic() - since < 60
    assert json.loads(output.read_text())["cut_at_time_limit"] is True


def test_the_dense_part_and_its_ladder_need_neither_torchrec_nor_arrow(tmp_path: Path) -> None:
    done = run(["-c", TORCH_ALONE], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torchrec is not installed\n"


def test_a_wrong_gradient_is_not_within_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    preset, execution = Preset.load("gpu_small").toy(), Execution("cpu")
    assert ladder.compare(preset, execution, CPU)["ok"]
    calls: list[Any] = []

    def wrong(dense: Any, inputs: Any) -> torch.Tensor:
        calls.append(None)
        loss, _ = dense(inputs.users, inputs.items, inputs.items, inputs.batch)
        return loss if len(calls) == 1 else loss + 1e-3 * inputs.items.square().sum()

    monkeypatch.setattr(ladder, "forward", wrong)
    found = ladder.compare(preset, execution, CPU)
    assert not found["ok"] and found["worst"] == "items"


def test_what_the_device_cannot_do_is_listed_and_leaves_later_rungs(monkeypatch: pytest.MonkeyPatch) -> None:
    rungs = {rung.name: rung for rung in ladder.ladder(Preset.load("gpu_small").toy(), CPU)}
    assert list(rungs) == list(ladder.LADDER)
    assert rungs["tf32"].execution is None and "CUDA" in rungs["tf32"].reason
    compiled = rungs["compile"].execution
    if compiled is not None:  # a compiler is installed
        assert compiled.compile and compiled.precision == "bf16" and compiled.attention == "dense"


def test_one_batch_in_both_layouts() -> None:
    preset = Preset.load("gpu_large").toy()
    grid = make_inputs(preset, Execution("cpu"), CPU)
    row = make_inputs(preset, replace(Execution("cpu"), attention="varlen"), CPU)
    fixed = make_inputs(preset, replace(Execution("cpu"), attention="varlen", compile=True), CPU)
    assert grid.batch.targets == row.batch.targets == fixed.batch.targets == preset.tokens
    assert grid.flops == row.flops == fixed.flops
    assert row.batch.cu_seqlens is not None and int(row.batch.cu_seqlens[-1]) == preset.tokens
    for inputs in (grid, row, fixed):
        taken = inputs.batch.item_bag[inputs.batch.sequence >= 0].sort().values
        expected = grid.batch.item_bag[grid.batch.sequence >= 0].sort().values
        assert torch.equal(taken, expected)
    assert torch.equal(grid.items, fixed.items)


def test_presets_are_those_of_configs() -> None:
    large = Preset.load("gpu_large")
    assert (large.model.dim, large.model.layers, large.tokens, large.loss.negatives) == (512, 8, 65_536, 32_768)


class Worker:
    """A stand-in for the workers: what each says, by its arguments."""

    def __init__(self, says: dict[str, list[dict[str, Any]]]) -> None:
        self.says = says

    def events(self, arguments: list[str]) -> Any:
        yield from self.says[" ".join(arguments)]


def test_a_worker_that_dies_loses_its_rung_alone(capsys: pytest.CaptureFixture[str]) -> None:
    check = check_gpu.Check(argparse.Namespace(time_limit=60.0, output=None))
    reason = {"reason": "needs CUDA"}
    ladder_of = "ladder --preset gpu_small --skip"
    died = {"exit": -6, "why": "its process ended with status -6"}
    worker = Worker(
        {
            f"{ladder_of} 0": [
                {"preset": "p", "rung": "fp32", "begins": True},
                {"preset": "p", "rung": "fp32", **reason},
                {"preset": "p", "rung": "tf32", "begins": True},
                died,
            ],
            f"{ladder_of} 2": [
                {"preset": "p", "rung": "bf16", "begins": True},
                {"preset": "p", "rung": "bf16", **reason},
                {"exit": 0, "why": ""},
            ],
        }
    )
    check._events = worker.events  # type: ignore[method-assign]
    check._climb("gpu_small")
    assert [rung["rung"] for rung in check.found["ladder"]] == ["fp32", "tf32", "bf16"]
    assert check.found["ladder"][1]["failed"] and not check.is_right
    assert "FAILED: its process ended with status -6" in capsys.readouterr().out
