"""HR and NDCG of held-out items among the whole catalogue, over the users of all ranks."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from recgpt_torchrec.catalogue.catalogue import Catalogue
from recgpt_torchrec.data.histories import Histories
from recgpt_torchrec.evaluation.groups import PROTOCOLS, GroupedMetrics
from recgpt_torchrec.evaluation.metrics import RankingMetrics

Results = dict[str, dict[str, float]]
"""{"masked": {"HR@5": ..., ...}, "unmasked": {...}}"""


def measure_ranks(
    batches: Iterator[tuple[Histories, Tensor]],
    catalogue: Catalogue,
    ks: tuple[int, ...],
    grouped: GroupedMetrics | None = None,
) -> tuple[int, Results]:
    """HR and NDCG at `ks`, masked and unmasked, over the users of all ranks (collective).

    Args:
        batches: histories with held-out items, and their interest vectors [sequences, dim] float32.
        catalogue: items to rank among.
        ks: list lengths.
        grouped: where the ranks are also added by groups of users.

    Returns:
        users: number of users ranked, on all ranks.
        results: see `Results`.
    """
    masked, unmasked = RankingMetrics(ks), RankingMetrics(ks)
    for histories, vectors in batches:
        assert histories.held_out is not None and histories.seen is not None
        both = catalogue.ranks(vectors, torch.from_numpy(histories.held_out), histories.seen)
        for metrics, ranks in zip((masked, unmasked), both, strict=True):
            metrics.update(ranks.cpu())
        if grouped is not None:
            groups = grouped.grouping.find(histories.held_out, histories.seen.lengths)
            for how, ranks in zip(PROTOCOLS, both, strict=True):
                grouped.update(groups, how, ranks.cpu())
    results: Results = {"masked": reduce_metrics(masked).result(), "unmasked": reduce_metrics(unmasked).result()}
    return masked.users, results


def reduce_metrics(metrics: RankingMetrics) -> RankingMetrics:
    """Sum metrics over all ranks, in place, and return them (collective)."""
    if dist.is_initialized():
        dist.all_reduce(metrics.state())
    return metrics
