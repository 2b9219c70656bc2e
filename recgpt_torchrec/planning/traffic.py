"""Bytes that the busiest rank sends in one training step, by cause, from the formulas of `distributed.traffic`."""

from dataclasses import dataclass

from recgpt_torchrec.distributed.placements import Placement
from recgpt_torchrec.distributed.sharding_types import COPY, Ranks
from recgpt_torchrec.distributed.traffic import TableTraffic, Traffic, all_reduced, averaged, bytes_sent, shared_softmax
from recgpt_torchrec.model.peaks import Precision
from recgpt_torchrec.planning.memory import bags_of_table
from recgpt_torchrec.planning.sharded import Sharded
from recgpt_torchrec.planning.workload import Workload

NUMBER_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
"""By the value of --tables.communication."""


@dataclass(frozen=True)
class Cause:
    """What is sent per step for one cause, in bytes."""

    name: str
    sent: Traffic
    note: str = ""


def step_traffic(workload: Workload, sharded: Sharded, precision: Precision) -> list[Cause]:
    """What the busiest rank sends in one step, whose matrix products are in `precision`."""
    plan = workload.plan
    ranks = Ranks(plan.ranks, plan.gpus)
    of_table, copied, averages = {}, Traffic(), Traffic()
    for placement in sharded.placements:
        sent = bytes_sent(
            placement,
            bags_of_table(workload, placement.table),
            sharded.group,
            sharded.group_local,
            ids=workload.ids_of(placement.table),
            number_bytes=NUMBER_BYTES[plan.tables.communication],
        )
        if sharded.group < plan.ranks:
            averages += averaged(placement, sharded.group, plan.tables.sync_steps, plan.ranks, plan.gpus)
        if placement.sharding == COPY:
            copied += sent.gradients
        else:
            of_table[placement] = sent
    ids, vectors, gradients = _busiest(of_table, sharded, sharded.group)
    causes = [
        Cause("ids", ids, "ids and lengths, one step ahead"),
        Cause("vectors", vectors, "looked-up rows, empty bags included"),
        Cause("gradients", gradients, "of the looked-up rows"),
        Cause("decoder", all_reduced(4 * workload.dense_parameters, ranks), "all-reduce of gradients"),
    ]
    if copied.total:
        causes.append(Cause("copied tables", copied, "all-reduce of whole gradients"))
    if averages.total:
        note = f"of tables and moments over {plan.ranks // sharded.group} groups, every {plan.tables.sync_steps} steps"
        causes.append(Cause("averages", averages, note))
    if workload.scores_all_ranks:
        outputs = shared_softmax(workload.targets, plan.model.dim, ranks, 2 if precision == "bf16" else 4)
        causes.append(Cause("softmax", outputs, "outputs to every rank's candidates, and their gradients back"))
    return causes


def _busiest(of_table: dict[Placement, TableTraffic], sharded: Sharded, ranks: int) -> tuple[Traffic, ...]:
    """Ids, vectors and gradients of the rank that sends most.

    Where few ranks hold a table, each of them sends and receives so many times the mean.
    """
    busiest: tuple[Traffic, ...] = (Traffic(), Traffic(), Traffic())
    groups = {tuple(rank in sharded.by_rank[each.table] for each in of_table): rank for rank in range(ranks)}
    for rank in groups.values():
        sums = [Traffic(), Traffic(), Traffic()]
        for placement, sent in of_table.items():
            if rank in sharded.by_rank[placement.table]:
                few = ranks / len(sharded.by_rank[placement.table])
                for place, part in enumerate((sent.ids, sent.vectors, sent.gradients)):
                    sums[place] += Traffic(part.within * few, part.between * few)
        busiest = max(busiest, tuple(sums), key=lambda parts: sum(part.total for part in parts))
    return busiest
