"""Bytes that a rank sends in one training step, by cause, within its node and between nodes.

Of an exchange of all ranks with all, the share (L - 1) / W stays within a node of L ranks, of W. A ring over all ranks
crosses nodes once per node, over the links of all its ranks.
"""

from dataclasses import dataclass

from recgpt_torchrec.distributed.placements import Placement
from recgpt_torchrec.planning.memory import bags_of_table, exchanged_rows
from recgpt_torchrec.planning.sharded import Sharded
from recgpt_torchrec.planning.workload import Workload

ID_BYTES, LENGTH_BYTES, VALUE_BYTES = 8, 4, 4


@dataclass(frozen=True)
class Traffic:
    """Bytes that the busiest rank sends per step for one cause."""

    cause: str
    within: float
    """To ranks of the same node."""
    between: float
    """To ranks of other nodes."""
    note: str = ""

    @property
    def total(self) -> float:
        """To all other ranks."""
        return self.within + self.between


def step_traffic(workload: Workload, sharded: Sharded) -> list[Traffic]:
    """The bytes that a rank sends in one step."""
    plan, dim = workload.plan, workload.plan.model.dim
    ids = vectors = copied = 0.0
    for placement in sharded.placements:
        bags = bags_of_table(workload, placement.table)
        used = workload.sequences if placement.table == "user" else workload.distinct_items
        ids += _ids_sent(placement, used, bags, plan.ranks)
        vectors += VALUE_BYTES * dim * _rows_sent(placement, bags, plan.ranks)
        if placement.sharding == "data_parallel":
            copied += VALUE_BYTES * placement.rows * dim
    causes = [
        _all_to_all(workload, "ids", ids, "ids and lengths, one step ahead"),
        _all_to_all(workload, "vectors", vectors, "looked-up rows, empty bags included"),
        _all_to_all(workload, "gradients", vectors, "of the looked-up rows"),
        _ring(workload, "decoder", VALUE_BYTES * workload.dense_parameters, "all-reduce of gradients"),
    ]
    if copied:
        causes.append(_ring(workload, "copied tables", copied, "all-reduce of whole gradients"))
    if plan.loss.candidates == "all":
        outputs = 2.0 * (plan.ranks - 1) * VALUE_BYTES * workload.targets * (dim + 1)
        causes.append(_all_to_all(workload, "softmax", outputs, "outputs to every shard of items, and gradients back"))
    return causes


def _ids_sent(placement: Placement, used: int, bags: int, ranks: int) -> float:
    """Bytes of ids and lengths that a rank sends to the others for one table."""
    if placement.sharding == "row_wise":  # each id to the rank that has its row; lengths of all bags to all
        return ID_BYTES * used * (ranks - 1) / ranks + LENGTH_BYTES * bags * (ranks - 1)
    if placement.sharding == "column_wise":
        return (ID_BYTES * used + LENGTH_BYTES * bags) * (min(placement.blocks, ranks) - 1)
    if placement.sharding == "table_wise":
        return (ID_BYTES * used + LENGTH_BYTES * bags) * (ranks > 1)
    return 0.0


def _rows_sent(placement: Placement, bags: int, ranks: int) -> float:
    """Rows [dim] that the busiest rank sends to the others for one table, in the forward; as many in the backward."""
    if placement.sharding == "table_wise":  # the rank that has it sends to all others
        return bags * (ranks - 1.0)
    return exchanged_rows(placement, bags, ranks) * (ranks - 1) / ranks


def _all_to_all(workload: Workload, cause: str, size: float, note: str) -> Traffic:
    """An exchange in which a rank sends as much to each other rank."""
    plan = workload.plan
    inside = (plan.gpus - 1) / max(plan.ranks - 1, 1)
    return Traffic(cause, size * inside, size * (1 - inside) if plan.nodes > 1 else 0.0, note)


def _ring(workload: Workload, cause: str, size: float, note: str) -> Traffic:
    """An all-reduce of `size` bytes: twice its size by each rank, and between nodes over the links of all ranks."""
    plan = workload.plan
    between = 2 * size * (plan.nodes - 1) / plan.nodes / plan.gpus
    within = 2 * size * (plan.gpus - 1) / plan.gpus
    return Traffic(cause, within, between, note)
