"""Trains on two nodes, loses one, goes on with the other, and with two again once a node has come.

    OMP_NUM_THREADS=1 python -m tools.elastic

The nodes are launchers on this machine. The run waits at two steps until what is to happen to it has happened: the
second node's launcher is killed, and another one is started. Then every target must have been trained once an epoch.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from recgpt_torchrec.launch.node import with_port
from tools.small_run import SMALL

EPOCHS = 4
RENDEZVOUS = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=2"
"""So that a lost node is noticed within seconds; the defaults are for clusters."""
HOLD_AT = {2: 3, 1: 9}
"""By number of ranks: the step before which the run waits for a stop signal, once."""


def rank_main() -> None:
    """Train as one rank, and write down what is trained; wait where `HOLD_AT` says so."""
    from recgpt_torchrec.distributed import signals
    from recgpt_torchrec.training.schedule import Schedule
    from tools import observed_pretrain

    path, world_size = sys.argv[2], os.environ["WORLD_SIZE"]
    set_rates = Schedule.set_rates

    def held(self: Schedule, steps: int, progress: float) -> float:
        if steps == HOLD_AT[int(world_size)] and os.environ["RANK"] == str(int(world_size) - 1):
            Path(f"{path}.held-{world_size}").touch()
            while signals.received_signal() is None:
                time.sleep(0.01)
        return set_rates(self, steps, progress)

    Schedule.set_rates = held  # type: ignore[method-assign]
    sys.argv = [sys.argv[0], f"{path}.{os.getpid()}", *sys.argv[3:]]
    observed_pretrain.main()


class Nodes:
    """The launchers of one job; on leaving the `with` all that is left of them is killed."""

    def __init__(self, folder: Path, words: list[str]) -> None:
        job = ["--nnodes", "1:2", "--nproc_per_node", "1", "--max_restarts", "3", "--rdzv_conf", RENDEZVOUS]
        job += ["--rdzv_backend", "c10d", "--rdzv_id", f"{folder}", "--rdzv_endpoint", "localhost:0"]
        job += ["-m", "tools.elastic", "rank", f"{folder}/trained"]
        self.command = [sys.executable, "-m", "recgpt_torchrec.launch.node", *job, *words]
        self.folder = folder
        self.launchers: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, *error: object) -> None:
        for launcher in self.launchers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()

    def start(self) -> "subprocess.Popen[bytes]":
        """Start a node."""
        with open(self.folder / f"node-{len(self.launchers)}.log", "w") as log:
            node = subprocess.Popen(self.command, stdout=log, stderr=log, start_new_session=True)
        self.launchers.append(node)
        return node

    def wait_for_rendezvous(self, seconds: float) -> None:
        """Wait until the first node serves the rendezvous."""
        host, _, port = with_port("localhost:0", f"{self.folder}").rpartition(":")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                return socket.create_connection((host, int(port)), 1).close()
            time.sleep(0.05)

    def wait_for(self, name: str, seconds: float) -> None:
        """Wait for a file of the run; a message with what the nodes said if it does not come."""
        deadline = time.monotonic() + seconds
        while not (self.folder / name).exists():
            if time.monotonic() > deadline or self.launchers[0].poll() is not None:
                raise SystemExit(f"{name} did not come:\n{self.said()}")
            time.sleep(0.05)

    def said(self) -> str:
        """What the nodes have said."""
        return "\n".join(f"{path}:\n{path.read_text()}" for path in sorted(self.folder.glob("node-*.log")))


def options_of(folder: Path, name: str) -> dict[str, Any]:
    """The command line of the run. Of the batch the tokens over all ranks are given, which stay when ranks change."""
    options = {**SMALL, "--batch.tokens": "auto", "--loss.candidates": "all", "--tables.sharding": "row_wise"}
    options |= {"--train.epochs": EPOCHS, "--train.patience": 0, "--train.precision": "fp32"}
    del options["--loss.negatives"]
    return {**options, "--data": folder / "data", "--output": folder / name}


def run(folder: Path, seconds: float = 120.0) -> tuple[list[tuple[str, float]], str, Counter[Any], Counter[Any]]:
    """Train through the loss of a node and the coming of another.

    Args:
        folder: of all files; empty.
        seconds: limit for each thing that is waited for.

    Returns:
        What happened and after how many seconds; what the nodes said; how often each target was trained; how often it
        should have been.
    """
    from tools.observed_pretrain import Target, read_targets
    from tools.small_run import training_part, walks, write_dataset

    histories = walks(120, 30, shortest=4, longest=9)
    write_dataset(folder / "data", histories, items=30, rows_per_group=8, groups_per_part=4)
    options = options_of(folder, "run")
    happened, since = [], time.monotonic()

    def note(text: str) -> None:
        happened.append((text, time.monotonic() - since))

    with Nodes(folder, [str(word) for option in options.items() for word in option]) as nodes:
        first = nodes.start()
        nodes.wait_for_rendezvous(seconds)  # so that it is not the second node which serves it
        second = nodes.start()
        nodes.wait_for("trained.held-2", seconds)
        note("two ranks train")
        second.kill()
        nodes.wait_for("trained.held-1", seconds)
        note("one rank goes on")
        third = nodes.start()
        statuses = [first.wait(seconds), third.wait(seconds)]
        note(f"the job has ended, status {statuses[0]} and {statuses[1]}")
        said = nodes.said()
    trained = Counter(next(iter(read_targets(*folder.glob("trained.*[0-9]")).values())))
    wanted = Counter[Any]()
    for user, history in enumerate(histories):
        part = training_part(history)
        wanted.update({Target(user, after, item): EPOCHS for after, item in zip(part, part[1:], strict=False)})
    return happened, said, trained, wanted


def last_loss(folder: Path, name: str) -> float:
    """The loss of the last epoch of a run."""
    lines = (folder / name / "history.jsonl").read_text().splitlines()
    return float(json.loads(lines[-1])["loss"])


def main() -> int:
    """Print what happened; returns the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        happened, said, trained, wanted = run(Path(folder))
    print(*(f"{seconds:6.1f} s  {text}" for text, seconds in happened), sep="\n")
    print(f"{sum(trained.values())} targets trained, {sum(wanted.values())} wanted; {len(trained - wanted)} too often")
    return trained != wanted or said.count("Trained:") != 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        rank_main()
    else:
        sys.exit(main())
