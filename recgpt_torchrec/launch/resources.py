"""Memory and cores that a job asks a scheduler for: the plan of a pretrain run, where its data can be read from here.

The plan is made in a process of its own, as it needs torch, which torchx must not load to list components. A job on
this machine asks for nothing, so that no plan is made for it.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

from recgpt_torchrec.launch.command import named_scheduler

MEMORY_MB_PER_PROCESS = 4096
"""Memory requested per process without a plan, in MB; importing torch and torchrec alone takes about 330 MB."""
CPUS_PER_PROCESS = 2
"""CPU cores requested per process: one for the step, one for the loader and the pipeline's communication."""
PLANNED = "recgpt_torchrec.pretrain"
"""The stage that can be planned."""
PLAN_SECONDS = 120
"""Maximum time of a plan; it takes about 8 s."""


class Resources(NamedTuple):
    """What a node of a job needs."""

    cpu: int
    memory_mb: int


def request_resources(
    module: str, args: Sequence[str], nodes: int, processes: int, *, gpus: int = 0, cpu: int = 0, memory_mb: int = 0
) -> Resources:
    """What to request per node; on standard error it is said where the numbers come from.

    Args:
        module: of the stage.
        args: of the stage.
        nodes: at least so many there are.
        processes: per node.
        gpus: per node.
        cpu: cores that are asked for; 0: to be chosen.
        memory_mb: memory that is asked for; 0: to be chosen.
    """
    default = Resources(cpu or CPUS_PER_PROCESS * processes, memory_mb or MEMORY_MB_PER_PROCESS * processes)
    if (cpu and memory_mb) or named_scheduler(sys.argv[1:]).startswith("local"):
        return default
    why = "it can be estimated for pretrain alone"
    if module == PLANNED:
        try:
            planned = plan_resources(args, nodes, processes, gpus)
        except ValueError as error:
            why = str(error)
        else:
            chosen = Resources(cpu or planned.cpu, memory_mb or planned.memory_mb)
            _say(f"each node gets {chosen.cpu} cores and {chosen.memory_mb:,} MB, as recgpt plan estimates this run")
            return chosen
    _say(
        f"each node gets {default.cpu} cores and {default.memory_mb:,} MB, whatever this run needs ({why}); give --cpu "
        "and --memMB"
    )
    return default


def plan_resources(args: Sequence[str], nodes: int, processes: int, gpus: int) -> Resources:
    """What a pretrain run needs per node, as planned.

    Raises:
        ValueError: no plan can be made; the message says why.
    """
    command = [sys.executable, "-m", "recgpt_torchrec.planning.resources", str(nodes), str(processes), str(gpus)]
    try:
        done = subprocess.run([*command, *args], capture_output=True, text=True, timeout=PLAN_SECONDS)
        return Resources(**json.loads(done.stdout))
    except (OSError, subprocess.TimeoutExpired, TypeError) as error:
        raise ValueError(f"no plan can be made here: {error}") from None
    except json.JSONDecodeError:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ValueError(f"no plan can be made here: {reason}") from None


def _say(text: str) -> None:
    print(f"recgpt_torchrec: {text}", file=sys.stderr, flush=True)
