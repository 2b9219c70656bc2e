"""Losses of next-item prediction against a candidate set, one code path for whole catalogue, sampled and in-batch.

For a position with output h and next item t the sampled softmax loss is

    -s_t + log( exp(s_t) + sum over candidates c != t of exp(s_c - log q_c) ),      s_i = h . v_i

with q_c the expected count of c among those drawn, so that the sum is an unbiased estimate of the full partition
function (logQ correction; the target itself is always there and needs none). With every item a candidate (q = 1) it is
exact.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 64
"""Positions scored at once on CPU: [64, 12101] float32 stays in cache from product to exponential to product:
the loss of an epoch of Beauty took 10.5 s with 64 and 17.2 s with 256."""
CHUNK_CUDA = 4096
"""Positions scored at once on CUDA: large products, and never more than this many rows of logits."""


class _SoftmaxLoss(torch.autograd.Function):
    """Sum of the losses; logits exist for one chunk of positions at a time, and gradients are made in the forward.

    Holding all logits instead made a step with 2,048 positions x 12,101 items three times slower on AVX2 (page faults).
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, positive: Tensor, candidates: Tensor, log_q: Tensor, target_index: Tensor
    ) -> Tensor:
        positions, count = h.shape[0], candidates.shape[0]
        total = h.new_zeros(())
        grad_h, grad_positive = torch.empty_like(h), torch.empty_like(positive)
        grad_candidates = torch.zeros_like(candidates)
        chunk = CHUNK if h.device.type == "cpu" else CHUNK_CUDA
        buffer = h.new_empty(min(chunk, max(positions, 1)), count)
        transposed = candidates.t()
        for start in range(0, positions, chunk):
            part = slice(start, min(start + chunk, positions))
            h_c, positive_c, target_index_c = h[part], positive[part], target_index[part]
            logits = torch.mm(h_c, transposed, out=buffer[: h_c.shape[0]])
            logits -= log_q
            there = (target_index_c >= 0).nonzero().squeeze(1)
            logits[there, target_index_c[there]] = -torch.inf
            s = (h_c * positive_c).sum(1)
            top = torch.maximum(logits.amax(1), s) if count else s
            torch.exp_(logits.sub_(top[:, None]))
            e = torch.exp(s - top)
            norm = logits.sum(1) + e
            total += (norm.log() + top - s).sum()
            p = logits.div_(norm[:, None])
            miss = (e / norm - 1)[:, None]
            torch.addmm(miss * positive_c, p, candidates, out=grad_h[part])
            grad_positive[part] = miss * h_c
            grad_candidates.addmm_(p.t(), h_c)
        ctx.save_for_backward(grad_h, grad_positive, grad_candidates)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_h, grad_positive, grad_candidates = ctx.saved_tensors
        return grad_h * grad, grad_positive * grad, grad_candidates * grad, None, None


def softmax_loss(h: Tensor, positive: Tensor, candidates: Tensor, log_q: Tensor, target_index: Tensor) -> Tensor:
    """Sum over positions of the (sampled) softmax loss.

    Args:
        h: [positions, dim] outputs.
        positive: [positions, dim] vectors of the items that came next.
        candidates: [candidates, dim] vectors.
        log_q: [candidates] log of each candidate's expected count; zeros where it is always there.
        target_index: [positions] int64 index of the position's own target among the candidates, -1 where it is not.

    Returns:
        [] float32.
    """
    return _SoftmaxLoss.apply(h.float(), positive.float(), candidates.float(), log_q, target_index)


def bce_loss(h: Tensor, positive: Tensor, candidates: Tensor, target_index: Tensor, negatives: int) -> Tensor:
    """Sum over positions of the paper's binary cross-entropy (equation 4): the next item against O^- negatives.

    Position p takes the `negatives` candidates from number p * negatives on, round and round; candidates come in
    random order.
    """
    positions, count = h.shape[0], candidates.shape[0]
    index = torch.arange(positions * negatives, device=h.device).reshape(positions, negatives) % max(count, 1)
    scores = (h[:, None] * candidates[index]).sum(-1)
    free = (index != target_index[:, None]).float()
    return -(F.logsigmoid((h * positive).sum(1)).sum() + (F.logsigmoid(-scores) * free).sum())
