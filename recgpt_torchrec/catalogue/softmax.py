"""What crosses ranks in a softmax loss: outputs to the ranks that hold candidates, sums and gradients back.

With every item a candidate this is a vocabulary-parallel softmax: rank r scores the targets of all ranks against the
items of `id_range(items, r, ranks)`. The same serves in-batch candidates of all ranks, and negatives that differ by
rank. The arithmetic is that of `model.shared_loss`.

Per step a rank receives the outputs of all ranks, and sends a weighted sum of candidates for each. With W ranks and T
targets per rank (the largest number of any rank) these are W x T x dim numbers each, of 4 bytes; outputs of 2 in bf16.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from recgpt_torchrec.data.packed import PackedBatch
from recgpt_torchrec.model.losses.shared_loss import shared_softmax_loss


class ProcessRanks:
    """`model.shared_loss.Ranks` of the process group."""

    def __init__(self) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()

    def gather(self, own: Tensor) -> Tensor:
        """See `Ranks`."""
        gathered = own.new_empty(self.ranks * len(own), *own.shape[1:])
        dist.all_gather_single(gathered, own.contiguous())
        return gathered

    def largest(self, values: Tensor) -> Tensor:
        """See `Ranks`."""
        values = values.clone()
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def total(self, values: Tensor) -> Tensor:
        """See `Ranks`."""
        values = values.clone()
        dist.all_reduce(values)
        return values

    def own_total(self, values: Tensor) -> Tensor:
        """See `Ranks`."""
        own = values.new_empty(len(values) // self.ranks, *values.shape[1:])
        dist.reduce_scatter_single(own, values)
        return own


class SharedSoftmax:
    """The softmax loss of a batch over the candidates of all ranks, for `Dense.set_shared_loss`.

    Example: `unwrapped_dense(model).set_shared_loss(SharedSoftmax(each_once=False))`
    """

    def __init__(self, each_once: bool) -> None:
        """
        Args:
            each_once: whether an item that is a candidate on several ranks counts once, for the first of them.
                Candidates must then be the targets of their rank.
        """
        self.ranks, self.each_once = ProcessRanks(), each_once

    def __call__(
        self, h: Tensor, positive: Tensor, candidates: Tensor, batch: PackedBatch, dtype: torch.dtype
    ) -> Tensor:
        """Sum of the losses of this rank's targets, [] (collective).

        Args:
            h: [targets, dim] outputs.
            positive: [targets, dim] vectors of the targets.
            candidates: [candidates, dim] vectors of this rank's candidates.
            batch: made with shared candidates, in lockstep with the other ranks.
            dtype: of the operands of the matrix products.
        """
        assert batch.target_item is not None and batch.candidate_item is not None
        rows = max(1, batch.most_targets)
        weight = h.new_ones(len(h), dtype=torch.float32) if batch.target_weight is None else batch.target_weight
        h, positive, weight = (resized(value.float(), rows) for value in (h, positive, weight))
        target_item = self.ranks.gather(resized(batch.target_item, rows, -1))
        log_q = batch.candidate_log_q
        if self.each_once:
            earlier = target_item[: self.ranks.rank * rows].sort().values
            log_q = log_q.masked_fill(places_among(earlier, batch.candidate_item) >= 0, torch.inf)
        index = places_among(batch.candidate_item, target_item)
        return shared_softmax_loss(h, positive, candidates.float(), log_q, index, weight, dtype, self.ranks)


def resized(values: Tensor, rows: int, empty: float = 0) -> Tensor:
    """The first `rows` of [n, ...], or with rows of `empty` behind."""
    missing = rows - len(values)
    return F.pad(values, (*(0, 0) * (values.dim() - 1), 0, missing), value=empty) if missing > 0 else values[:rows]


def places_among(ordered: Tensor, values: Tensor) -> Tensor:
    """Index of each of `values` [n] int64 among `ordered` [m] int64, ascending, of n; -1 where it is not there."""
    if not len(ordered):
        return torch.full_like(values, -1)
    places = torch.searchsorted(ordered, values).clamp_(max=len(ordered) - 1)
    return torch.where(ordered[places] == values, places, -1)
