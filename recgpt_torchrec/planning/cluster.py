"""The smallest cluster of one kind of GPU that a workload fits."""

from dataclasses import dataclass

from recgpt_torchrec.config.reports.plan import MOST_NODES
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.planning.hardware import GIB, Hardware, of_cluster
from recgpt_torchrec.planning.memory import Memory, estimate_memory
from recgpt_torchrec.planning.sharded import shard_workload
from recgpt_torchrec.planning.workload import Workload


@dataclass(frozen=True)
class Cluster:
    """A cluster on which the workload fits."""

    nodes: int
    gpus: int
    """Per node."""
    memory: Memory


def smallest_cluster(workload: Workload, hardware: Hardware) -> Cluster | None:
    """Search one node with 1, 2, 4, ... GPUs, then 2 to 64 nodes; None: on none of them the workload fits.

    The batch per rank stays the same. Tables must fit where the options want them: with `auto` on the GPUs. Clusters on
    which a table cannot be sharded are passed over.
    """
    gpus = workload.plan.gpus
    on_one_node = [2**power for power in range(gpus.bit_length()) if 2**power < gpus]
    rows = workload.users + workload.items
    weights = (2.0 if workload.plan.tables.precision == "fp16" else 4.0) * rows * workload.plan.model.dim
    for nodes, per_node in [*((1, few) for few in on_one_node), *((n, gpus) for n in range(1, MOST_NODES + 1))]:
        here = of_cluster(hardware, per_node)
        if weights > nodes * (per_node * here.hbm + (here.host if hardware.device_type == "cuda" else 0)) * GIB:
            continue  # not even with tables in both memories
        candidate = workload.on(nodes, per_node)
        try:
            sharded = shard_workload(candidate, here)
        except InputError:
            continue
        memory = estimate_memory(candidate, sharded, here)
        if memory.fits and not sharded.spills(workload.plan.tables):
            return Cluster(nodes, per_node, memory)
    return None
