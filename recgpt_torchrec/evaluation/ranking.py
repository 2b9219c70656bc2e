"""HR and NDCG of held-out items over the whole catalogue, for every user of a dataset, on all ranks together."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from recgpt_torchrec.catalogue.catalogue import Catalogue
from recgpt_torchrec.data.histories import Histories
from recgpt_torchrec.evaluation.metrics import RankingMetrics

Results = dict[str, dict[str, float]]
"""{"masked": {"HR@5": ..., ...}, "unmasked": {...}}"""


def measure_ranks(
    batches: Iterator[tuple[Histories, Tensor]], catalogue: Catalogue, ks: tuple[int, ...]
) -> tuple[int, Results]:
    """HR and NDCG at `ks`, masked and unmasked, over the users of all ranks (collective at the end).

    Args:
        batches: histories with held-out items, and their interest vectors [sequences, dim].
        catalogue: what they are ranked among.
        ks: list lengths.

    Returns:
        users: how many were ranked.
        results: the figures.
    """
    masked, unmasked = RankingMetrics(ks), RankingMetrics(ks)
    for histories, vectors in batches:
        if not histories.users.size:  # a rank that has run out takes part with nothing
            continue
        assert histories.held_out is not None and histories.seen is not None
        found = catalogue.ranks(vectors, torch.from_numpy(histories.held_out), histories.seen)
        for metrics, ranks in zip((masked, unmasked), found, strict=True):
            metrics.update(ranks.cpu())
    results: Results = {"masked": reduce_metrics(masked).result(), "unmasked": reduce_metrics(unmasked).result()}
    return masked.users, results


def reduce_metrics(metrics: RankingMetrics) -> RankingMetrics:
    """The metrics over the users of all ranks (collective)."""
    if dist.is_initialized():
        dist.all_reduce(metrics.state())
    return metrics
