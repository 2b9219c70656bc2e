"""Runs a stage on two nodes, with a fault at a moment, and says how it ended."""

import json
import os
import re
import signal
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tools.faults.injecting import Fault, Place
from tools.faults.nodes import NODES, Launched
from tools.faults.rank import JOINING, WRITING, run_stage

PATIENCE_SECONDS = 150.0
"""A job that has not ended so long after a fault is killed: it does not end."""
FAILURE = re.compile(
    r"(\blost\b|no heartbeat|no progress|cannot|error|failed|refused|slowest|did not join|is lost|is gone)", re.I
)
"""In lines that say what has happened."""
TRACEBACK = "Traceback (most recent call last)"


def failures_in(said: str) -> list[str]:
    """The lines that say what has happened."""
    return [line for line in said.splitlines() if FAILURE.search(line)]


@dataclass(frozen=True)
class Moment:
    """When a fault happens: the stage, and the phase of the victim's rank."""

    stage: str
    phase: str
    occurrence: int = 1


MOMENTS = {
    "joining": Moment("pretrain", JOINING),
    "planning": Moment("pretrain", "building the model"),
    "training": Moment("pretrain", "a training step", 6),
    "saving": Moment("pretrain", WRITING, 2),
    "validation": Moment("pretrain", "validating"),
    "prompt_tune": Moment("prompt_tune", "a training step", 6),
    "evaluate": Moment("evaluate", "ranking users"),
    "generate_prompts": Moment("generate_prompts", "generating prompts"),
    "export": Moment("export", "encoding items and users"),
    "index": Moment("index", "building the index"),
    "retrieve": Moment("retrieve", "searching"),
}
"""By the name of a column of the table."""


@dataclass
class End:
    """How a job ended."""

    statuses: list[int | None]
    """Of the launchers; None: it had not ended, or was killed with its node."""
    seconds: float
    """From the fault, or else from the start, until every process had ended."""
    place: str = ""
    """Where the victim's rank was."""
    ended: bool = True
    said: list[str] = field(default_factory=list)
    """What the launchers and ranks of each node said."""

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def run_job(place: Place, moment: Moment, options: dict[str, Any], logs: Path, fault: Fault | None = None) -> End:
    """Run a stage to its end.

    Args:
        place: with the nodes.
        moment: the stage, and when the fault happens.
        options: of the stage.
        logs: path to which `.nodeN` is added for what each node says.
        fault: None: nothing happens.
    """
    place.ended.clear()
    words = [str(word) for option in options.items() for word in option]
    mark = Path(f"{logs}.mark")
    mark.unlink(missing_ok=True)
    happens = fault is not None and not fault.hours
    victim = 1 if fault is None or fault.node is None else fault.node
    stops = {"rank": victim, "phase": moment.phase, "occurrence": moment.occurrence, "mark": str(mark)}
    since, job = time.monotonic(), f"{time.time_ns()}"
    entry = run_stage, [json.dumps(stops if happens else {}), moment.stage, *words]
    hours = 0.0 if fault is None else fault.hours
    launched = [
        place.nodes.launch(node, entry, Path(f"{logs}.node{node}"), job, hours if node else 0.0)
        for node in range(NODES)
    ]
    stopped: dict[str, Any] = {}
    try:
        if fault is not None and happens:
            stopped = _wait_for(mark, launched)
            if stopped:
                since = time.monotonic()
                fault.inject(place)
                with suppress(ProcessLookupError):
                    os.kill(stopped["pid"], signal.SIGCONT)
        ended = _wait_for_end(place, launched, since + PATIENCE_SECONDS)
        seconds, statuses = time.monotonic() - since, [one.status for one in launched]
    finally:
        place.ended.set()
        for node in range(NODES):
            place.nodes.kill(node)
        for one in launched:
            one.reap()
    return End(
        statuses,
        round(seconds, 1),
        stopped.get("place", ""),
        ended,
        [one.output.read_text(errors="replace") for one in launched],
    )


def _wait_for(mark: Path, launched: list[Launched]) -> dict[str, Any]:
    """Wait until the victim's rank has stopped itself; empty: the job ended before."""
    while not mark.exists():
        if all([one.poll() is not None for one in launched]):
            return {}
        time.sleep(0.005)
    stopped: dict[str, Any] = json.loads(mark.read_text())
    return stopped


def _wait_for_end(place: Place, launched: list[Launched], deadline: float) -> bool:
    """Wait until all processes of both nodes have ended; returns whether they have before the deadline."""
    while time.monotonic() < deadline:
        if all([one.poll() is not None for one in launched]) and not any(map(place.nodes.pids, range(NODES))):
            return True
        time.sleep(0.05)
    return False
