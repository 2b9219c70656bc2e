"""Memory and cores that a job asks a scheduler for: the plan of a pretrain run, where its data can be read from here.

The plan is made in a process of its own, as it needs torch, which torchx must not load to list components.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

MEMORY_MB_PER_PROCESS = 4096
"""Memory requested per process without a plan, in MB; importing torch and torchrec alone takes about 330 MB."""
CPUS_PER_PROCESS = 2
"""CPU cores requested per process: one for the step, one for the loader and the pipeline's communication."""
PLANNED = "pretrain"
"""The stage that can be planned."""
PLAN_SECONDS = 120
"""Maximum time of a plan; it takes about 8 s."""


class Resources(NamedTuple):
    """What a node of a job needs."""

    cpu: int
    memory_mb: int
    how: str
    """How it was counted, in words that follow "each node gets ...,"."""
    is_planned: bool = False


def count_resources(
    stage: str, args: Sequence[str], nodes: int, processes: int, gpus: int, data: str | None = None
) -> Resources:
    """What each node of a job needs: a pretrain run as planned; other stages, and without a plan, by its processes.

    Args:
        stage: its name.
        args: of the stage.
        nodes: at least so many there are.
        processes: per node.
        gpus: per node.
        data: the dataset, where it is known: without it no plan is begun, which takes seconds.
    """
    try:
        if stage == PLANNED and data is not None and "://" not in data and not os.path.exists(data):
            raise ValueError(f"--data {data} is not here")
        return plan_resources(stage, args, nodes, processes, gpus)
    except ValueError as error:
        how = f"whatever this run needs ({error})"
        return Resources(CPUS_PER_PROCESS * processes, MEMORY_MB_PER_PROCESS * processes, how)


def plan_resources(stage: str, args: Sequence[str], nodes: int, processes: int, gpus: int) -> Resources:
    """What each node of a pretrain run needs, as planned.

    Raises:
        ValueError: no plan can be made; the message says why.
    """
    if stage != PLANNED:
        raise ValueError(f"it can be estimated for {PLANNED} alone")
    command = [sys.executable, "-m", "recgpt_torchrec.planning.resources", str(nodes), str(processes), str(gpus)]
    try:
        done = subprocess.run([*command, *args], capture_output=True, text=True, timeout=PLAN_SECONDS)
        planned = json.loads(done.stdout)
        how = f"as recgpt plan estimates this run ({planned['how']})"
        return Resources(planned["cpu"], planned["memory_mb"], how, is_planned=True)
    except (OSError, subprocess.TimeoutExpired, TypeError, KeyError) as error:
        raise ValueError(f"no plan can be made here: {error}") from None
    except json.JSONDecodeError:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ValueError(f"no plan can be made here: {reason}") from None
