"""Every stage once on a device, with a kill in between, and the same on CPU: results must agree. Needs torchrec.

log -> dataset -> training (killed at its first checkpoint, then resumed) -> evaluation -> export. Without dropout
and in float32, so that what remains between devices is rounding.
"""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np

OPTIONS: dict[str, Any] = {
    "--model.dim": 16,
    "--model.max_len": 20,
    "--model.dropout": 0,
    "--model.attention_dropout": 0,
    "--model.user_dropout": 0,
    "--batch.tokens": 256,
    "--loss.negatives": 64,
    "--train.epochs": 4,
    "--train.precision": "fp32",
    "--saving.every_steps": 3,
}
VECTORS = 0.02
"""Largest relative error of the exported vectors against those of the CPU: rounding grows with every step."""
METRICS = 0.01
"""Largest difference of a metric of evaluation."""


def missing(device: str) -> str | None:
    """Why stages cannot run on this device; None: they can. Starts a process, so that this one keeps off the device."""
    for name in ("torchrec", "fbgemm_gpu", "pyarrow", "jsonargparse"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    if device == "cpu":
        return None
    probe = (
        "import torch, fbgemm_gpu; assert torch.cuda.is_available(); "
        "torch.ops.fbgemm.asynchronous_complete_cumsum(torch.ones(3, dtype=torch.int32, device='cuda'))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120)
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return None if done.returncode == 0 else f"fbgemm does not run on CUDA here: {last[:300]}"


def smoke(device: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Run the stages; yields a JSON object for each thing that was checked, `{"check", "ok", ...}`."""
    from tools import synthetic_log
    from tools.stage_process import preload

    preload()  # forked stages need not import again
    log, data = folder / "log.csv", folder / "data"
    synthetic_log.main(["--output", str(log), "--users", "400", "--items", "200", "--seed", "1"])
    yield _checked("prepare", run_forked("prepare", {"--input": log, "--output": data}, folder))
    results: dict[str, tuple[Path, Path]] = {}
    for name in ("cpu",) if device == "cpu" else ("cpu", device):
        run = folder / f"run-{name}"
        yield _checked(f"pretrain on {name}, not disturbed", _pretrain(name, data, run, folder))
        results[name] = yield from _finish(name, data, run, folder)
    run = folder / "run-killed"
    killed = _pretrain(device, data, run, folder, kill=True)
    yield {"check": f"pretrain on {device}, killed at its first checkpoint", "ok": killed == -signal.SIGKILL}
    yield _checked(f"pretrain on {device}, resumed", _pretrain(device, data, run, folder))
    results["killed"] = yield from _finish(device, data, run, folder)
    yield {"check": f"resumed as not disturbed, on {device}", **compare(results["killed"], results[device], 1e-5)}
    if device != "cpu":
        yield {"check": f"{device} as cpu", **compare(results[device], results["cpu"], VECTORS)}


def _pretrain(device: str, data: Path, run: Path, folder: Path, kill: bool = False) -> int:
    options = {"--data": data, "--output": run, "--device": device, **OPTIONS}
    return run_forked("pretrain", options, folder, kill_at=run / "checkpoints" if kill else None)


def _finish(device: str, data: Path, run: Path, folder: Path) -> Generator[dict[str, Any], None, tuple[Path, Path]]:
    """Evaluate and export a run; returns its metrics and vectors."""
    metrics, vectors = folder / f"{run.name}.json", folder / f"{run.name}-vectors"
    common = {"--data": data, "--checkpoint": run, "--device": device}
    yield _checked(f"evaluate {run.name} on {device}", run_forked("evaluate", {**common, "--output": metrics}, folder))
    yield _checked(f"export {run.name} on {device}", run_forked("export", {**common, "--output": vectors}, folder))
    return metrics, vectors


def compare(found: tuple[Path, Path], expected: tuple[Path, Path], tolerance: float) -> dict[str, Any]:
    """Differences of metrics and exported vectors of two runs.

    Args:
        found, expected: file of `evaluate` and folder of `export`.
        tolerance: largest relative error of the vectors.
    """
    import pyarrow.parquet as pq

    results = [json.loads(metrics.read_text())["results"]["pretrain"] for metrics, _ in (found, expected)]
    metric = max(
        abs(value - results[1][protocol][name])
        for protocol, figures in results[0].items()
        for name, value in figures.items()
    )
    error = 0.0
    for kind in ("item", "user"):
        arrays = []
        for _, folder in (found, expected):
            table = pq.read_table(folder / f"{kind}s", columns=[f"{kind}_id", "vector"]).sort_by(f"{kind}_id")
            arrays.append(np.stack(table["vector"].to_pylist()))
        error = max(error, float(np.linalg.norm(arrays[0] - arrays[1]) / np.linalg.norm(arrays[1])))
    return {
        "metric_difference": metric,
        "vector_error": error,
        "tolerance": tolerance,
        "ok": bool(metric <= METRICS and error <= tolerance),
    }


def _checked(check: str, status: int) -> dict[str, Any]:
    return {"check": check, "ok": status == 0, **({} if status == 0 else {"status": status})}


def run_forked(stage: str, options: dict[str, Any], folder: Path, *, kill_at: Path | None = None) -> int:
    """Run a stage in a process forked from this one, which must not have used the device; returns its exit status.

    Args:
        stage: its name.
        options: of its command line.
        folder: its output is appended to `output.log` there.
        kill_at: folder of checkpoints: once it holds a whole one, the process is killed.
    """
    process = os.fork()
    if not process:
        status = 1
        try:
            handle = os.open(folder / "output.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            from tools.stage_process import run_stage

            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
            status = run_stage(stage, options)
        except BaseException:
            import traceback

            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    try:
        while True:
            ended, code = os.waitpid(process, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(code)
            if kill_at is not None and _has_checkpoint(kill_at):
                os.kill(process, signal.SIGKILL)
                kill_at = None
            time.sleep(0.002)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        raise


def _has_checkpoint(checkpoints: Path) -> bool:
    from recgpt_torchrec.checkpoints.folder import Checkpoints

    return Checkpoints(str(checkpoints.parent), 1).latest() is not None
