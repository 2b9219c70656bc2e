"""Commands for the user to copy, as this program was started: by `recgpt`, `python -m`, torchrun or torchx.

The only place that writes them. Values with spaces or quotes are quoted as a shell needs it.
"""

import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

JOB = "RECGPT_JOB"
"""Environment variable in which a job of torchx finds the words of its own command, with {} for the stage's name."""
ALONE = ("prepare", "find_neighbours", "apply", "recommend", "run")
"""Stages that are refused on several processes, each of which would do all the work, into the same folder."""
ONE_PROCESS = (*ALONE, "report", "plan", "doctor", "manifest")
"""Programs that run in one process: of several, each would do all the work."""
PORT = 29500
"""Port on the first node where the nodes of torchrun meet."""

_started_as_recgpt = False
_run_goes_on = False


def set_form(prog: str) -> None:
    """Say how this program was started: `recgpt STAGE`, or the name of a module."""
    global _started_as_recgpt
    _started_as_recgpt = prog.split()[0] == "recgpt"


def program(stage: str) -> str:
    """The beginning of a command that runs a stage, up to its options."""
    if job := os.environ.get(JOB):
        words = [word.replace("{}", stage) for word in shlex.split(job)]
        return shlex.join(_without_processes(words) if stage in ONE_PROCESS else words)
    if "TORCHELASTIC_RUN_ID" in os.environ and stage not in ONE_PROCESS:
        processes, nodes = os.environ.get("LOCAL_WORLD_SIZE", "1"), os.environ.get("GROUP_WORLD_SIZE", "1")
        where = "--standalone"
        if nodes != "1":
            meet = f"{os.environ.get('MASTER_ADDR', 'localhost')}:{PORT}"
            where = f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint {meet}"
        return f"torchrun {where} --nproc-per-node {processes} -m recgpt_torchrec.{stage}"
    return f"recgpt {stage}" if _started_as_recgpt else f"python -m recgpt_torchrec.{stage}"


def command(stage: str, options: dict[str, Any]) -> str:
    """The command that runs a stage; an option may be a list, and is left out where it is None.

    Example: `command("evaluate", {"data": "data/mine", "ks": [5, 10]})`
    """
    words = [word for name, value in options.items() if value is not None for word in _option(name, value)]
    return " ".join([program(stage), *map(shlex.quote, words)])


def following(stage: str, options: dict[str, Any]) -> str:
    """What comes after a stage, at the end of its summary: the command that takes its result, or that `run` goes on."""
    return "run goes on with the next stage" if _run_goes_on else command(stage, options)


def next_line(stage: str, options: dict[str, Any]) -> str:
    """The last line of a stage's summary."""
    return f"Next:    {following(stage, options)}"


@contextmanager
def run_goes_on() -> Iterator[None]:
    """Within the `with`, stages are parts of a longer run: nobody need give the next command."""
    global _run_goes_on
    _run_goes_on = True
    try:
        yield
    finally:
        _run_goes_on = False


def holds_command(text: str) -> bool:
    """Whether a text has a command of ours in it."""
    return re.search(r"\brecgpt(_torchrec\.| )\w+ ", text) is not None


def _option(name: str, value: Any) -> list[str]:
    plain = {True: "true", False: "false"}
    entries = value if isinstance(value, list | tuple) else [value]
    words = [plain[each] if isinstance(each, bool) else str(each) for each in entries]
    return [f"--{name}", *(words or ["[]"])]


def _without_processes(words: list[str]) -> list[str]:
    """The words of a job without -j: what follows runs in one process."""
    if "-j" not in words:
        return words
    place = words.index("-j")
    return words[:place] + words[place + 2 :]
