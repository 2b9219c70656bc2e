"""HR and NDCG of held-out items among the whole catalogue, over the users of all ranks."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from recgpt_torchrec.catalogue.catalogue import Catalogue
from recgpt_torchrec.data.histories import Histories
from recgpt_torchrec.data.ragged import Int64, Ragged, join
from recgpt_torchrec.evaluation.groups import PROTOCOLS, GroupedMetrics
from recgpt_torchrec.evaluation.metrics import RankingMetrics, reduce_metrics
from recgpt_torchrec.evaluation.repeats.sample import RepeatSample
from recgpt_torchrec.retrieval.encoding import collect_batches

Record = Callable[[Int64, Mapping[str, Tensor]], None]
"""Takes user ids [users] int64, and the ranks [users] float32 of their held-out items by protocol, on CPU."""
Results = dict[str, dict[str, float]]
"""{"masked": {"HR@5": ..., ...}, "unmasked": {...}}"""


def measure_ranks(
    batches: Iterator[tuple[Histories, Tensor]],
    catalogue: Catalogue,
    ks: tuple[int, ...],
    grouped: GroupedMetrics | None = None,
    record: Record | None = None,
    repeat_bias: float = 0.0,
    repeats: RepeatSample | None = None,
) -> tuple[int, Results]:
    """HR and NDCG at `ks`, masked and unmasked, over the users of all ranks (collective).

    Args:
        batches: histories with held-out items, and their interest vectors [sequences, dim] float32.
        catalogue: items to rank among.
        ks: list lengths.
        grouped: where the ranks are also added by groups of users.
        record: called with the user ids [users] and their ranks by protocol, for each batch.
        repeat_bias: added to the scores of items of the history when unmasked.
        repeats: takes what the bias is fitted on; None: it is not fitted.

    Returns:
        users: number of users ranked, on all ranks.
        results: see `Results`.
    """
    metrics = {how: RankingMetrics(ks) for how in PROTOCOLS}
    for collected in collect_batches(batches, catalogue.rows_per_pass):
        held_out, seen = targets_of([histories for histories, _ in collected])
        queries = torch.cat([vectors for _, vectors in collected])
        both = catalogue.ranks(queries, held_out, seen, repeat_bias)
        groups = None if grouped is None else grouped.grouping.find(held_out.numpy(), seen.lengths)
        by_protocol = dict(zip(PROTOCOLS, (ranks.cpu() for ranks in both), strict=True))
        for how, ranks in by_protocol.items():
            metrics[how].update(ranks)
            if grouped is not None and groups is not None:
                grouped.update(groups, how, ranks)
        users = users_of([histories for histories, _ in collected])
        if record is not None:
            record(users, by_protocol)
        if repeats is not None:
            repeats.add(users, queries, held_out, seen)
    results = {how: reduce_metrics(each).result() for how, each in metrics.items()}
    return metrics["masked"].users, results


def targets_of(lists: Sequence[Histories]) -> tuple[Tensor, Ragged]:
    """The held-out items [sequences] int64 and the items that do not compete, of lists of histories end to end."""
    held_out = [histories.held_out for histories in lists if histories.held_out is not None]
    seen = [histories.seen for histories in lists if histories.seen is not None]
    assert len(held_out) == len(seen) == len(lists), "histories without a held-out item or without the whole history"
    return torch.from_numpy(np.concatenate(held_out)), join(seen)


def users_of(lists: Sequence[Histories]) -> Int64:
    """The user ids [sequences] int64 of lists of histories end to end."""
    return np.concatenate([histories.users for histories in lists])
