"""Checks a GPU in one command that ends by itself: how fast the dense part is, step by step, and that stages are right.

    python -m tools.check_gpu --output gpu.json
    python -m tools.check_gpu --device cpu --toy --output toy.json

A. A ladder fp32, tf32, bf16, varlen, fused loss, compile at the presets configs/gpu_small.yaml and gpu_large.yaml:
   targets per second, operations per second, share of the device's peak, memory, and the error against fp32. Needs
   torch alone.
B. Where torchrec and fbgemm run on the device: training, killed and resumed, evaluation and export, equal to CPU.

Prints each result as it comes, ends after --time_limit seconds with what it has by then, and always writes the JSON
file. Exit status 1: a result differs by more than its tolerance, a rung or a stage failed, or the time was too short.
"""

import argparse
import json
import os
import platform
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PRESETS = ("gpu_small", "gpu_large")
"""Configurations that the ladder is measured at. This file imports no torch, so that the time limit holds from the
start."""


class Check:
    """Starts the workers, prints and keeps what they find."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.started = time.monotonic()
        self.deadline = self.started + options.time_limit
        self.found: dict[str, Any] = {
            "settings": vars(options),
            "host": {"python": platform.python_version(), "machine": platform.machine()},
            "ladder": [],
            "smoke": [],
            "cut_at_time_limit": False,
        }

    def run(self) -> None:
        """Run both parts, as far as the time goes."""
        if self.options.only != "stages":
            for preset in PRESETS:
                self._climb(preset)
        if self.options.only != "ladder":
            self._run_stages()

    def _run_stages(self) -> None:
        for event in self._events(["smoke"]):
            if "exit" in event:
                if self.found["cut_at_time_limit"]:
                    self._keep("smoke", {"reason": event["why"]})
                elif event["exit"] != 0:
                    self._keep("smoke", {"check": "all", "ok": False, "reason": event["why"]})
            elif "output" in event:
                print(event["output"], file=sys.stderr, flush=True)
            else:
                self._keep("smoke", event)

    def _climb(self, preset: str) -> None:
        """Measure the rungs of a preset; a worker that dies in one is followed by another for those after it."""
        done, current = 0, None
        while True:
            for event in self._events(["ladder", "--preset", preset, "--skip", str(done)]):
                if "begins" in event:
                    current = event
                elif "exit" not in event:
                    self._keep("ladder", event)
                    done, current = done + 1, None
            if event["exit"] == 0 or current is None:
                if event["exit"] != 0:
                    rung = {"preset": preset, "rung": "all", "reason": event["why"]}
                    self._keep("ladder", {**rung, "failed": not self.found["cut_at_time_limit"]})
                return
            rung = {"preset": preset, "rung": current["rung"], "reason": event["why"]}
            self._keep("ladder", {**rung, "failed": not self.found["cut_at_time_limit"]})
            done, current = done + 1, None
            if self.found["cut_at_time_limit"]:
                return

    def _events(self, arguments: list[str]) -> Iterator[dict[str, Any]]:
        """What a worker says, and at its end `{"exit": status, "why"}`. It is killed at the deadline."""
        if time.monotonic() >= self.deadline:
            self.found["cut_at_time_limit"] = True
            yield {"exit": 1, "why": "not begun within the time limit"}
            return
        reader, writer = os.pipe()
        command = [sys.executable, "-m", "tools.gpu.worker", *arguments, "--device", self.options.device]
        command += ["--events", str(writer), *(["--toy"] if self.options.toy else [])]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        process = subprocess.Popen(
            command, pass_fds=[writer], start_new_session=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}
        )
        os.close(writer)
        pending, cut = b"", False
        try:
            while True:
                ready, _, _ = select.select([reader], [], [], max(0.0, self.deadline - time.monotonic()))
                if not ready:
                    cut = self.found["cut_at_time_limit"] = True
                    break
                if not (text := os.read(reader, 65536)):
                    break
                *lines, pending = (pending + text).split(b"\n")
                for line in lines:
                    yield json.loads(line)
        finally:
            os.close(reader)
            if cut or process.poll() is None:
                try:
                    process.wait(0 if cut else 10)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
        why = "cut at the time limit" if cut else f"its process ended with status {status}"
        yield {"exit": 1 if cut else status, "why": why}

    def _keep(self, part: str, result: dict[str, Any]) -> None:
        """Keep a result, print it, and write the file anew: whatever ends this process, the file has it."""
        self.found[part].append(result)
        print(f"{time.monotonic() - self.started:5.0f} s  {describe(result)}", flush=True)
        self.write()

    def write(self) -> None:
        """Write the JSON file."""
        if self.options.output:
            self.found["seconds"] = time.monotonic() - self.started
            with open(f"{self.options.output}.tmp", "w") as file:
                file.write(json.dumps(self.found, indent=1) + "\n")
            os.replace(f"{self.options.output}.tmp", self.options.output)

    @property
    def is_right(self) -> bool:
        """Whether nothing failed and every result is within its tolerance."""
        rungs, checks = self.found["ladder"], self.found["smoke"]
        within = all(rung["parity"]["ok"] for rung in rungs if "parity" in rung)
        return within and not any(rung.get("failed") for rung in rungs) and all(c.get("ok", True) for c in checks)


def describe(result: dict[str, Any]) -> str:
    """One line of the table."""
    if "rung" not in result:
        differences = [
            f"{name} {result[name]:.2g}"
            for name in ("metric_difference", "vector_error", "tolerance")
            if name in result
        ]
        if "check" not in result:
            return f"stages: no further, {result['reason']}"
        why = f" ({result['reason']})" if "reason" in result else ""
        return f"stages: {result['check']}: {'right' if result['ok'] else 'WRONG'} {', '.join(differences)}{why}"
    place = f"{result['preset']:<10} {result['rung']:<11}"
    if "reason" in result:
        return f"{place} {'FAILED' if result.get('failed') else 'not here'}: {result['reason']}"
    parity = result["parity"]
    rated = "" if result["share_of_rated"] is None else f"{result['share_of_rated']:6.1%} of rated peak "
    memory = "" if result["memory_gib"] is None else f"{result['memory_gib']:6.1f} GiB "
    return (
        f"{place} {result['targets_s']:>12,.0f} targets/s {result['step_ms']:>9.2f} ms "
        f"{result['tflops_s']:>8.3f} TFLOP/s {rated}{result['share_of_measured']:6.1%} of measured {memory}"
        f"error {parity['gradient_error']:.1e} {'within' if parity['ok'] else 'ABOVE'} {parity['tolerance']:g}; "
        f"{result['execution']}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--toy", action="store_true", help="toy sizes: to see that everything runs")
    parser.add_argument("--only", choices=["ladder", "stages"], help="part A or part B alone")
    parser.add_argument("--output", help="JSON file for the results")
    parser.add_argument("--time_limit", type=float, default=330.0, help="seconds")
    check = Check(parser.parse_args(arguments))
    check.write()
    try:
        check.run()
    finally:
        check.write()
    is_cut = check.found["cut_at_time_limit"]
    verdict = "right" if check.is_right else "NOT right"
    cut = ", as far as it came: cut at the time limit" if is_cut else ""
    print(f"{verdict}{cut}, {time.monotonic() - check.started:.0f} s", flush=True)
    raise SystemExit(0 if check.is_right and not is_cut else 1)


if __name__ == "__main__":
    main()
