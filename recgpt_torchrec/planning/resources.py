"""Memory and cores of each node that a pretrain run needs from a scheduler, as JSON: `launch.resources` asks for it.

python -m recgpt_torchrec.planning.resources NODES PROCESSES GPUS OPTIONS_OF_PRETRAIN...
"""

import json
import math
import sys

from recgpt_torchrec import cli
from recgpt_torchrec.config.reports.plan import Plan
from recgpt_torchrec.data.reading.preset import apply_preset
from recgpt_torchrec.distributed.processes import silence_libraries
from recgpt_torchrec.planning.hardware import hardware_of
from recgpt_torchrec.planning.memory import estimate_memory
from recgpt_torchrec.planning.sharded import shard_workload
from recgpt_torchrec.planning.workload import Workload
from recgpt_torchrec.texts.words import count

MARGIN = 1.3
"""How much more than estimated is asked for: beyond its request a job is killed."""
LEAST_MB = 1024
"""Least memory per process, in MB."""
WORKER_MB = 600
"""Memory of a loader process beside its batches, in MB: Python, Arrow and torch (assumed)."""
CORES = 2
"""Cores per process: one for the step, one for the loader and communication."""


def plan_node(plan: Plan) -> dict[str, int | str]:
    """Cores, and memory in MB, that each node of a run needs; and how the memory is counted, in words.

    Raises:
        InputError: the run cannot be planned.
    """
    workload, hardware = Workload.of(plan), hardware_of(plan)
    estimated = estimate_memory(workload, shard_workload(workload, hardware), hardware).host_total / 2**20
    workers = plan.gpus * plan.stream.workers
    needed, least = MARGIN * estimated + WORKER_MB * workers, LEAST_MB * plan.gpus
    how = f"{MARGIN:g} x {estimated:,.0f} MB"
    how += f", and {WORKER_MB} MB for each of {count(workers, 'loader process', 'loader processes')}" if workers else ""
    how += f", but at least {LEAST_MB:,} MB per process" if needed < least else ""
    return {"cpu": CORES * plan.gpus + workers, "memory_mb": max(least, 256 * math.ceil(needed / 256)), "how": how}


def main() -> None:
    """Print what the command line's run needs."""
    nodes, processes, gpus, *words = sys.argv[1:]
    # A node with room for all; and figures of its speed, which a plan on CPUs would measure here.
    there = ["--nodes", nodes, "--gpus", processes, "--memory", "1e6", "--peak", "1", "--hbm_bandwidth", "1"]
    kind = "cpu" if gpus == "0" else "h100"
    silence_libraries()
    plan = cli.parse(Plan, "recgpt_torchrec.planning.resources", [*words, *there, "--gpu", kind, "--device", "auto"])
    print(json.dumps(plan_node(apply_preset(plan)[0])))


if __name__ == "__main__":
    main()
