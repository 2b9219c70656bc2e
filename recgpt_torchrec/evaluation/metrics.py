"""HR@k and NDCG@k from ranks as `catalogue.ranks` defines them. Knows nothing of models and files."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from recgpt_torchrec.errors import InputError


def list_ranks(lists: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Rank of each target in an ordered list of retrieved items, for recall paths that do not score every item.

    Args:
        lists: [users, n] int64, best first; -1 fills up short lists.
        targets: [users] int64.

    Returns:
        [users] float32; inf where the target was not retrieved. A repeated item counts at its first place, and
        the repeat still takes a place.
    """
    if lists.ndim != 2 or targets.shape != lists.shape[:1]:
        raise ValueError(
            f"lists must be [users, n] and targets [users], not {list(lists.shape)} and {list(targets.shape)}"
        )
    hits = lists == targets[:, None]
    place = torch.where(hits, torch.arange(lists.shape[1], dtype=torch.float32, device=lists.device), math.inf)
    return torch.cat([place, place.new_full((len(place), 1), math.inf)], dim=1).amin(dim=1)


class RankingMetrics:
    """HR@k and NDCG@k of ranks that come batch by batch. Holds sums, which one all-reduce adds over processes.

    With one target per user, HR@k is the share of users with rank < k, and NDCG@k the mean of 1 / log2(rank + 2) over
    all users, 0 where rank >= k.

    Example:
        metrics = RankingMetrics(ks=(5, 10))
        metrics.update(masked)  # [users] ranks
        torch.distributed.all_reduce(metrics.state())
        metrics.result()  # {"HR@5": ..., "NDCG@5": ..., "HR@10": ..., "NDCG@10": ...}
    """

    def __init__(self, ks: Sequence[int] = (5, 10)) -> None:
        if not ks or min(ks) < 1:
            raise ValueError(f"ks is {tuple(ks)}; give list lengths of at least 1, for example (5, 10)")
        self.ks = tuple(dict.fromkeys(int(k) for k in ks))
        self._sums = torch.zeros(1 + 2 * len(self.ks), dtype=torch.float64)

    @property
    def users(self) -> int:
        """Number of users counted so far."""
        return int(self._sums[0].item())

    def update(self, ranks: torch.Tensor) -> None:
        """Add a batch of ranks, [users] float32; may be empty."""
        if ranks.ndim != 1 or torch.isnan(ranks).any():
            raise ValueError(f"ranks must be [users] without NaN, not {list(ranks.shape)}")
        rank = ranks.to(self._sums)
        gain = torch.log2(rank + 2).reciprocal()  # 0 for an infinite rank
        parts = [rank.new_tensor(float(len(rank)))]
        for k in self.ks:
            parts += [(rank < k).sum().double(), gain.where(rank < k, 0.0).sum()]
        self._sums += torch.stack(parts)

    def state(self) -> torch.Tensor:
        """[1 + 2 x ks] float64: users, then hits and gains summed for each k. Not a copy: reduce it in place."""
        return self._sums

    def result(self) -> dict[str, float]:
        """Means over all users counted, in the order HR@5, NDCG@5, HR@10, NDCG@10 (that of `ks`).

        Raises:
            InputError: no user was counted.
        """
        if not self.users:
            raise InputError("no user was ranked: no user has an item of this split, see prepare --hold_out")
        means = (self._sums[1:] / self._sums[0]).tolist()
        names = [f"{metric}@{k}" for k in self.ks for metric in ("HR", "NDCG")]
        return dict(zip(names, means, strict=True))


def reduce_metrics(metrics: RankingMetrics) -> RankingMetrics:
    """Sum metrics over all ranks, in place, and return them (collective)."""
    if dist.is_initialized():
        dist.all_reduce(metrics.state())
    return metrics
