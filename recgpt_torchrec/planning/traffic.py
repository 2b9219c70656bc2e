"""Bytes that the busiest rank sends in one training step, by cause, from the formulas of `distributed.traffic`."""

from dataclasses import dataclass

from recgpt_torchrec.distributed.sharding_types import COPY, Ranks
from recgpt_torchrec.distributed.traffic import Traffic, all_reduced, bytes_sent
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


def step_traffic(workload: Workload, sharded: Sharded) -> list[Cause]:
    """What the busiest rank sends in one step."""
    plan, dim = workload.plan, workload.plan.model.dim
    ranks = Ranks(plan.ranks, plan.gpus)
    ids = vectors = gradients = copied = Traffic()
    for placement in sharded.placements:
        sent = bytes_sent(
            placement,
            bags_of_table(workload, placement.table),
            plan.ranks,
            plan.gpus,
            ids=workload.sequences if placement.table == "user" else workload.distinct_items,
            number_bytes=NUMBER_BYTES[plan.tables.communication],
        )
        if placement.sharding == COPY:
            copied += sent.gradients
            continue
        few = plan.ranks / placement.ranks  # holders of a table send, and receive, so many times the mean
        ids += _times(sent.ids, few)
        vectors += _times(sent.vectors, few)
        gradients += _times(sent.gradients, few)
    causes = [
        Cause("ids", ids, "ids and lengths, one step ahead"),
        Cause("vectors", vectors, "looked-up rows, empty bags included"),
        Cause("gradients", gradients, "of the looked-up rows"),
        Cause("decoder", all_reduced(4 * workload.dense_parameters, ranks), "all-reduce of gradients"),
    ]
    if copied.total:
        causes.append(Cause("copied tables", copied, "all-reduce of whole gradients"))
    if workload.scores_all_ranks:
        size = 4.0 * (plan.ranks - 1) * workload.targets * (dim + 2)
        inside = (plan.gpus - 1) / max(plan.ranks - 1, 1)
        both = Traffic(2 * size * inside, 2 * size * (1 - inside))
        causes.append(Cause("softmax", both, "outputs to every rank's candidates, and their gradients back"))
    return causes


def _times(sent: Traffic, factor: float) -> Traffic:
    return Traffic(sent.within * factor, sent.between * factor)
