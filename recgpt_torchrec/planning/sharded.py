"""The sharding plan of a workload, and what each rank holds of every table. Needs neither processes nor a device."""

from collections import Counter
from dataclasses import dataclass

from torchrec.distributed.types import ShardingPlan

from recgpt_torchrec.config import Sharding
from recgpt_torchrec.distributed.memory import moment_bytes, parts_of
from recgpt_torchrec.distributed.placements import Placement, placements
from recgpt_torchrec.distributed.replicas import check_no_cache, group_nodes, group_size
from recgpt_torchrec.distributed.sharding import make_plan
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.planning.hardware import GIB, Hardware
from recgpt_torchrec.planning.workload import Workload
from recgpt_torchrec.training.optimizers import FUSED

HOST_KERNELS = ("uvm", "uvm_caching")
"""Kernels that keep a table in host memory."""


@dataclass(frozen=True)
class Sharded:
    """Where the tables of a workload are."""

    placements: list[Placement]
    by_rank: dict[str, dict[int, tuple[int, int]]]
    """Numbers of weights, and bytes of weights and moments, of each table by rank."""
    fullest: int
    """Rank that holds most bytes."""
    group: int
    """Number of ranks that share a copy of the tables; `by_rank` is of the first group."""
    group_local: int
    """Ranks of a group per node."""

    def bytes_of(self, placement: Placement) -> int:
        """Bytes of a table on the fullest rank."""
        return self.by_rank[placement.table].get(self.fullest, (0, 0))[1]

    def numbers_of(self, placement: Placement) -> int:
        """Numbers of weights of a table on the fullest rank."""
        return self.by_rank[placement.table].get(self.fullest, (0, 0))[0]

    def spills(self, tables: Sharding) -> bool:
        """Whether a table is in host memory only because the GPUs do not hold it."""
        return any(p.kernel in HOST_KERNELS and tables.kernel_of(p.table) == "auto" for p in self.placements)


def shard_workload(workload: Workload, hardware: Hardware) -> Sharded:
    """Plan the sharding of a workload's tables, as a run would.

    Raises:
        InputError: a table cannot be sharded as the options say; names the table, and what would fit.
    """
    plan = workload.plan
    size = group_size(plan.tables.shard_ranks, plan.ranks)
    local = group_nodes(size, plan.gpus)

    def planned(hbm_bytes: int | None) -> ShardingPlan:
        return make_plan(
            workload.meta_model,
            plan.tables,
            workload.capacity.items,
            world_size=size,
            local_world_size=local,
            device_type=hardware.device_type,
            hbm_bytes=hbm_bytes,
            fused=plan.tables.optimizer in FUSED or hardware.device_type == "cuda",
        )

    try:
        sharding_plan = planned(int(hardware.hbm * GIB))
    except InputError:
        sharding_plan = planned(None)  # if memory alone is lacking, the estimate shows how much
    if size < plan.ranks:
        check_no_cache(sharding_plan, size)
    placed = placements(sharding_plan, workload.meta_model, plan.tables.optimizer, plan.ranks // size)
    by_rank = {each.table: _numbers_by_rank(sharding_plan, each, plan.tables.optimizer) for each in placed}
    totals: Counter[int] = Counter()
    for of_table in by_rank.values():
        totals.update({rank: held for rank, (_, held) in of_table.items()})
    return Sharded(placed, by_rank, max(totals, key=lambda rank: (totals[rank], -rank)), size, local)


def _numbers_by_rank(sharding_plan: ShardingPlan, placement: Placement, optimizer: str) -> dict[int, tuple[int, int]]:
    """(numbers of weights, bytes of weights and moments) of one table on each rank that holds some of it."""
    (table,) = (module[placement.table] for module in sharding_plan.plan.values() if placement.table in module)
    held: dict[int, tuple[int, int]] = {}
    for rank, rows, columns in parts_of(table, placement.rows, placement.dim):
        numbers, size = held.get(rank, (0, 0))
        more = rows * columns
        held[rank] = numbers + more, size + more * placement.itemsize + moment_bytes(optimizer, rows, columns)
    return held
