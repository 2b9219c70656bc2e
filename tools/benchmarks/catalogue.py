"""Runs the stages on catalogues of growing size, and measures each rank's peak memory, start-up and time of a step.

    OMP_NUM_THREADS=1 python -m tools.benchmarks.catalogue --items 1e6 1e7 1e8 --output catalogue.json

For each size: a dataset is written (`tools.write_dataset`); pretrain is asked to end (SIGTERM) in the middle of its
steps, and the same command resumes it; it validates, and evaluate evaluates, on a sample of users; prompts are
generated for 100 users. Beside each rank's peak is what its shards of the tables take, with their moments in training.

The JSON file is written after every stage. A stage that fails is recorded, with the end of what it said, and the next
one is run. Sizes that the file holds in full are not run again. What a size no longer needs is deleted: at 10^8 items
and dim 32 a checkpoint takes 13 GB, and up to three of them are there at once.
"""

import argparse
import glob
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recgpt_torchrec.config import Model, Plan, TrainingBatch
from recgpt_torchrec.distributed.processes import silence_libraries
from recgpt_torchrec.errors import STOPPED
from recgpt_torchrec.planning.hardware import hardware_of
from recgpt_torchrec.planning.sharded import shard_workload
from recgpt_torchrec.planning.workload import Workload
from tools.benchmarks.processes import Ended, base_bytes, run_stage_measured
from tools.write_dataset import whole

MIB = 2**20
HEADER = "Training on "
"""Said once tables are filled or restored, before the first step."""
STAGES = ("write", "write sample", "pretrain", "resume", "evaluate", "generate_prompts")
ALLOWED = 1.3
"""Time of a step at the largest catalogue over that at the smallest."""


@dataclass
class Watch:
    """Notes when training begins, and asks it to end some seconds later."""

    stop_after: float | None
    """Seconds between the header and the signal; None: it is left alone."""
    began: float | None = field(default=None, init=False)
    """Seconds from the start of the process to the header."""

    def __call__(self, said: str, seconds: float) -> bool:
        """See `run_stage_measured`."""
        if self.began is None and HEADER in said:
            self.began = seconds
        return self.stop_after is not None and self.began is not None and seconds >= self.began + self.stop_after


@dataclass
class Size:
    """The runs at one size of the catalogue."""

    items: int
    options: argparse.Namespace
    folder: Path
    save: Callable[[str, dict[str, Any]], None]
    """Takes a stage's name and figures."""

    def run(self) -> None:
        """Run all stages; the folder is empty afterwards."""
        options = self.options
        self._write("write", "data", None)
        self._write("write sample", "sample", options.prompted_users)
        training = {
            "--data": self.folder / "data",
            "--output": self.folder / "run",
            "--device": "cpu",
            "--model.dim": options.dim,
            "--batch.tokens": options.tokens,
            "--train.steps": options.steps,
            "--train.validate_users": options.sampled_users,
            "--train.patience": 0,
            "--train.precision": "fp32",
            "--saving.keep": 1,
        }
        stopped = self._stage("pretrain", "pretrain", training, Watch(options.stop_after), STOPPED)
        if stopped["status"] == 0:
            stopped["note"] = "ended before it was asked to; give a smaller --stop_after, or more --steps"
            self.save("pretrain", stopped)
        resumed = self._stage("resume", "pretrain", training, Watch(None))
        resumed["step_ms"] = self._step_ms()
        self.save("resume", resumed)
        reading = {"--checkpoint": self.folder / "run", "--device": "cpu", "--tables.sharding": "auto"}
        evaluated = {"--data": self.folder / "data", "--output": self.folder / "evaluation.json", "--split": "test"}
        self._stage("evaluate", "evaluate", {**reading, **evaluated, "--users": options.sampled_users})
        prompted = {"--data": self.folder / "sample", "--output": self.folder / "prompts"}
        self._stage("generate_prompts", "generate_prompts", {**reading, **prompted, "--prompts.k": 1})
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def shard_bytes(self, trained: bool) -> int:
        """Bytes of the tables on the rank that holds most of them, with their moments in training."""
        options = self.options
        plan = Plan(
            items=self.items,
            users=options.users,
            gpu="cpu",
            gpus=options.ranks,
            peak=1.0,  # of no concern here, and not measured
            hbm_bandwidth=1.0,
            model=Model(dim=options.dim),
            batch=TrainingBatch(tokens=options.tokens),
        )
        workload = Workload.of(plan)
        sharded = shard_workload(workload, hardware_of(plan))
        full = sum(sharded.bytes_of(placement) for placement in sharded.placements)
        weights = sum(4 * each.rows * each.dim for each in sharded.placements)
        share = weights / sum(each.total_bytes for each in sharded.placements)
        return full if trained else round(full * share)

    def _write(self, name: str, folder: str, histories: int | None) -> None:
        """Write a dataset in a process of its own, whose memory counts as rank 0's."""
        options, since = self.options, time.perf_counter()
        words = ["--items", self.items, "--users", options.users, "--output", self.folder / folder]
        words += [] if histories is None else ["--histories", histories]
        command = [sys.executable, "-c", WRITE, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        peak = int(done.stdout.split()[-1]) if done.stdout.split() else 0
        figures = {"status": done.returncode, "seconds": time.perf_counter() - since, "peaks": {"0": peak}}
        if done.returncode:
            figures["said"] = done.stderr[-2000:]
        self.save(name, figures)

    def _stage(
        self, name: str, stage: str, options: dict[str, Any], watch: Watch | None = None, expected: int = 0
    ) -> dict[str, Any]:
        ended: Ended = run_stage_measured(
            stage, options, self.options.ranks, timeout=self.options.timeout, until=watch or Watch(None)
        )
        figures: dict[str, Any] = {
            "status": ended.status,
            "expected": expected,
            "seconds": ended.seconds,
            "peaks": {str(rank): peak for rank, peak in sorted(ended.peaks.items())},
            "shard_bytes": self.shard_bytes(trained=stage == "pretrain"),
            "began": None if watch is None else watch.began,
        }
        if ended.status != expected:
            figures["said"] = ended.last_lines
        self.save(name, figures)
        return figures

    def _step_ms(self) -> float | None:
        """Median time of a step over blocks of 20 steps, from TensorBoard's figures of both parts of the run."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        rates: list[float] = []
        for path in glob.glob(f"{glob.escape(str(self.folder))}/run/tensorboard/*"):
            events = EventAccumulator(path)
            events.Reload()
            if "train/tokens_per_s" in events.Tags()["scalars"]:
                rates += [event.value for event in events.Scalars("train/tokens_per_s") if event.value > 0]
        return 1e3 * self.options.tokens * self.options.ranks / statistics.median(rates) if rates else None


WRITE = """
import sys
from tools import write_dataset
write_dataset.main(sys.argv[1:])
lines = open("/proc/self/status").read().splitlines()
print(next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")))
"""
"""Program that writes a dataset and prints its peak memory in bytes."""


def main(arguments: list[str] | None = None) -> int:
    """Run all sizes and print the table; returns 1 if a stage failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=whole, nargs="+", default=[10**6, 10**7, 10**8], help="catalogue sizes")
    parser.add_argument("--users", type=whole, default=100_000, help="number of users (default: 100,000)")
    parser.add_argument("--dim", type=int, default=32, help="width of the tables (default: 32)")
    parser.add_argument("--ranks", type=int, default=2, help="number of ranks (default: 2)")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per batch and rank (default: 2,048)")
    parser.add_argument("--steps", type=int, default=300, help="training steps (default: 300)")
    parser.add_argument("--stop_after", type=float, default=20.0, help="seconds of steps before SIGTERM (default: 20)")
    parser.add_argument("--sampled_users", type=int, default=64, help="users to validate and evaluate on (default: 64)")
    parser.add_argument("--prompted_users", type=int, default=100, help="users to generate prompts for (default: 100)")
    parser.add_argument("--timeout", type=float, default=7200.0, help="seconds for one stage (default: 7,200)")
    parser.add_argument("--folder", help="where a temporary folder for datasets and runs is made")
    parser.add_argument("--output", required=True, help="JSON file for the figures")
    options = parser.parse_args(arguments)
    silence_libraries()
    output = Path(options.output)
    settings = {name: value for name, value in vars(options).items() if name not in ("items", "output", "folder")}
    figures: dict[str, Any] = {"settings": settings, "sizes": {}}
    if output.exists():
        figures = json.loads(output.read_text())
    if figures["settings"] != settings:
        parser.error(f"{output} holds figures of other options; name another file")
    figures["base"] = base_bytes()
    print(f"a process takes {figures['base'] / MIB:,.0f} MiB before it builds a model", flush=True)
    with tempfile.TemporaryDirectory(prefix="catalogue-", dir=options.folder) as folder:
        for items in options.items:
            of_size = figures["sizes"].get(str(items), {})
            if of_size.keys() >= set(STAGES):
                print(f"{items:,} items: in {output} already", flush=True)
                continue
            figures["sizes"][str(items)] = of_size = {}

            def save(name: str, values: dict[str, Any], items: int = items, of_size: dict[str, Any] = of_size) -> None:
                fresh = name not in of_size
                of_size[name] = values
                output.write_text(json.dumps(figures, indent=1))
                if fresh:
                    print(f"{items:,} items: {row_text(name, values)}", flush=True)

            Size(items, options, Path(folder), save).run()
    print(table(figures["sizes"]))
    return int(any(failed(values) for of_size in figures["sizes"].values() for values in of_size.values()))


def failed(values: dict[str, Any]) -> bool:
    """Whether a stage ended otherwise than it should."""
    return bool(values["status"] != values.get("expected", 0))


def row_text(name: str, values: dict[str, Any]) -> str:
    """One stage in one line, and the end of what it said if it failed."""
    text = f"{name} took {values['seconds']:,.0f} s, peaks {peaks_text(values)}"
    if failed(values):
        text += f"; FAILED with status {values['status']}, going on with the next stage\n{values.get('said', '')}"
    return text


def peaks_text(values: dict[str, Any]) -> str:
    """Peak memory of each rank, in MiB."""
    return " ".join(f"{peak / MIB:,.0f}" for peak in values["peaks"].values()) + " MiB"


def number_text(value: float | None, unit: float = 1.0) -> str:
    """A number in some unit; empty if there is none."""
    return "" if value is None else f"{value / unit:,.1f}"


def table(sizes: dict[str, dict[str, Any]]) -> str:
    """All figures as text: a line per size and stage, and the ratio of the steps' times."""
    heading = ("items", "stage", "s", "MiB of shards", "peak MiB by rank", "start s", "ms per step")
    rows: list[Sequence[str]] = [heading]
    steps = {}
    for items, of_size in sizes.items():
        for name, values in of_size.items():
            if step := values.get("step_ms"):
                steps[int(items)] = step
            row = [f"{int(items):,}", name, f"{values['seconds']:,.0f}", number_text(values.get("shard_bytes"), MIB)]
            row += [peaks_text(values).removesuffix(" MiB"), number_text(values.get("began"))]
            row.append(number_text(values.get("step_ms")) + ("  FAILED" if failed(values) else ""))
            rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    if len(steps) > 1:
        smallest, largest = min(steps), max(steps)
        ratio = steps[largest] / steps[smallest]
        lines.append(
            f"time of a step at {largest:,} items over that at {smallest:,}: {ratio:.2f} (at most {ALLOWED} wanted)"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
