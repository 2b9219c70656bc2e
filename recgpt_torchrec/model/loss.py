"""Losses of next-item prediction: one code path for all items, sampled and in-batch candidates, and the paper's BCE.

For a token with output h and target t the sampled softmax loss is

    -s_t + log( exp(s_t) + sum over candidates c != t of exp(s_c - log q_c) ),      s_i = h . v_i

with q_c the expected count of c among those drawn, so that the sum is an unbiased estimate of the full partition
function (logQ correction; the target is always included and needs none). With every item a candidate (q = 1) it is
exact.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 64
"""Targets scored at once on CPU: [64, 12101] float32 stays in cache from product to exponential to product:
the loss of an epoch of Beauty took 10.5 s with 64 and 17.2 s with 256."""
CHUNK_CUDA = 4096
"""Targets scored at once on CUDA: large products, with bounded memory for logits."""


class _SoftmaxLoss(torch.autograd.Function):
    """Sum of the losses; logits exist for one chunk of targets at a time, so gradients are computed in the forward.

    Holding all logits instead made a step with 2,048 targets x 12,101 items three times slower on AVX2 (page faults).
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, positive: Tensor, candidates: Tensor, log_q: Tensor, target_index: Tensor
    ) -> Tensor:
        targets, count = h.shape[0], candidates.shape[0]
        total = h.new_zeros(())
        grad_h, grad_positive = torch.empty_like(h), torch.empty_like(positive)
        grad_candidates = torch.zeros_like(candidates)
        chunk = CHUNK if h.device.type == "cpu" else CHUNK_CUDA
        buffer = h.new_empty(min(chunk, max(targets, 1)), count)
        transposed = candidates.t()
        for start in range(0, targets, chunk):
            part = slice(start, min(start + chunk, targets))
            h_c, positive_c, target_index_c = h[part], positive[part], target_index[part]
            logits = torch.mm(h_c, transposed, out=buffer[: h_c.shape[0]])
            logits -= log_q
            rows = (target_index_c >= 0).nonzero().squeeze(1)
            logits[rows, target_index_c[rows]] = -torch.inf
            s = (h_c * positive_c).sum(1)
            top = torch.maximum(logits.amax(1), s) if count else s
            torch.exp_(logits.sub_(top[:, None]))
            e = torch.exp(s - top)
            norm = logits.sum(1) + e
            total += (norm.log() + top - s).sum()
            p = logits.div_(norm[:, None])
            target_error = (e / norm - 1)[:, None]
            torch.addmm(target_error * positive_c, p, candidates, out=grad_h[part])
            grad_positive[part] = target_error * h_c
            grad_candidates.addmm_(p.t(), h_c)
        ctx.save_for_backward(grad_h, grad_positive, grad_candidates)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_h, grad_positive, grad_candidates = ctx.saved_tensors
        return grad_h * grad, grad_positive * grad, grad_candidates * grad, None, None


def softmax_loss(h: Tensor, positive: Tensor, candidates: Tensor, log_q: Tensor, target_index: Tensor) -> Tensor:
    """Sum over targets of the (sampled) softmax loss.

    Args:
        h: [targets, dim] outputs of the tokens that predict them.
        positive: [targets, dim] vectors of the targets.
        candidates: [candidates, dim] vectors.
        log_q: [candidates] log of each candidate's expected count; zeros where it is always included.
        target_index: [targets] int64 index of each target among the candidates, -1 where it is not one.

    Returns:
        [] float32.
    """
    return _SoftmaxLoss.apply(h.float(), positive.float(), candidates.float(), log_q, target_index)


def bce_loss(h: Tensor, positive: Tensor, candidates: Tensor, target_index: Tensor, negatives: int) -> Tensor:
    """Sum over targets of the paper's binary cross-entropy (equation 4), with `negatives` negatives each (O^-).

    Target number t takes the `negatives` candidates from number t * negatives on, wrapping around; they come in random
    order. A candidate that is the target does not count. Shapes and dtypes as in `softmax_loss`.
    """
    targets, count = h.shape[0], candidates.shape[0]
    index = torch.arange(targets * negatives, device=h.device).reshape(targets, negatives) % max(count, 1)
    scores = (h[:, None] * candidates[index]).sum(-1)
    is_negative = (index != target_index[:, None]).float()
    return -(F.logsigmoid((h * positive).sum(1)).sum() + (F.logsigmoid(-scores) * is_negative).sum())
