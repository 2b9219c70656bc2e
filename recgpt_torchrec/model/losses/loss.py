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

from recgpt_torchrec.model.losses.shared_loss import Alone, Scored, add_product, rows_at_once, shared_softmax_loss
from recgpt_torchrec.model.waiting import waits


class _SoftmaxLoss(torch.autograd.Function):
    """Sum of the losses; logits exist for one chunk of targets at a time, so gradients are computed in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        positive: Tensor,
        candidates: Tensor,
        log_q: Tensor,
        target_index: Tensor,
        weight: Tensor | None,
        dtype: torch.dtype,
        rows: int,
    ) -> Tensor:
        s = (h * positive).sum(1)
        # Scores relative to the target's own need no pass for their maximum. They overflow only 88 above it; on CPU
        # that is looked at, on CUDA looking would stop the device.
        exact = waits(h.device)
        scored = Scored(h, s, candidates, log_q, target_index, dtype)
        sums = _partition(scored, weight, rows, exact)
        if not exact and not sums[0].isfinite().all():
            sums = _partition(scored, weight, rows, True)
        log_partition, target_error, share, pulled, grad_candidates = sums
        if weight is not None:
            log_partition = log_partition * weight
        ctx.save_for_backward(
            torch.addcmul(target_error * positive, pulled, share), target_error * h, grad_candidates.t()
        )
        return log_partition.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_h, grad_positive, grad_candidates = ctx.saved_tensors
        return grad_h * grad, grad_positive * grad, grad_candidates * grad, *(None,) * 5


def _partition(
    scored: Scored, weight: Tensor | None, chunk: int, exact: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The partition function and its gradients, three products and one exponential per chunk of targets.

    Args:
        scored: targets and candidates.
        weight: as for `softmax_loss`.
        chunk: number of targets scored at once.
        exact: whether to subtract the largest score, too, which overflows for no scores.

    Returns:
        log_partition: [targets] log of the partition function, relative to the target's score: its loss.
        target_error: [targets, 1] gradient of the loss with respect to the target's score, s_t.
        share: [targets, 1] factor of `pulled` in the gradient of h.
        pulled: [targets, dim] sum of the candidates, weighted by their exponentials.
        grad_candidates: [dim, candidates] gradient.
    """
    h, s, dtype, count = scored.h, scored.s, scored.dtype, len(scored.candidates)
    norm, top, pulled = torch.empty_like(s), torch.zeros_like(s), torch.empty_like(h)
    grad_candidates = h.new_zeros(h.shape[1], count)
    for part, _, p, vectors in scored.blocks(chunk, max(count, 1)):
        if exact and count:
            top[part] = p.amax(1).clamp_(min=0).float()
            p -= top[part, None]
        p.exp_()
        norm[part] = p.sum(1, dtype=torch.float32) + torch.exp(-top[part])
        pulled[part] = p @ vectors
        share_c = 1 / norm[part, None] if weight is None else weight[part, None] / norm[part, None]
        shared = (h[part] * share_c).to(dtype).t()
        add_product(grad_candidates, shared, p)
    share = (1 / norm if weight is None else weight / norm)[:, None]
    target_error = torch.exp(-top)[:, None] * share - (1 if weight is None else weight[:, None])
    return norm.log() + top, target_error, share, pulled, grad_candidates


def softmax_loss(
    h: Tensor,
    positive: Tensor,
    candidates: Tensor,
    log_q: Tensor,
    target_index: Tensor,
    weight: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Sum over targets of the (sampled) softmax loss.

    Args:
        h: [targets, dim] outputs of the tokens that predict them.
        positive: [targets, dim] vectors of the targets.
        candidates: [candidates, dim] vectors.
        log_q: [candidates] log of each candidate's expected count; zeros where it is always included; inf where it
            does not count.
        target_index: [targets] int64 index of each target among the candidates, -1 where it is not one.
        weight: [targets] float32 weight of each target's loss; None: 1.
        dtype: of the operands of the matrix products, float32 or bfloat16; they accumulate in float32.

    Returns:
        [] float32.
    """
    h, positive, candidates = h.float(), positive.float(), candidates.float()
    rows = rows_at_once(len(candidates), h.device, dtype)
    if rows:
        return _SoftmaxLoss.apply(h, positive, candidates, log_q, target_index, weight, dtype, rows)
    return shared_softmax_loss(h, positive, candidates, log_q, target_index, weight, dtype, Alone())


def bce_loss(
    h: Tensor,
    positive: Tensor,
    candidates: Tensor,
    target_index: Tensor,
    negatives: int,
    weight: Tensor | None = None,
) -> Tensor:
    """Sum over targets of the paper's binary cross-entropy (equation 4), with `negatives` negatives each (O^-).

    Target number t takes the `negatives` candidates from number t * negatives on, wrapping around; they come in random
    order. A candidate that is the target does not count, and where there are none, only the target does. Shapes and
    dtypes as in `softmax_loss`.
    """
    h, positive, candidates = h.float(), positive.float(), candidates.float()
    targets, count = h.shape[0], candidates.shape[0]
    negatives = negatives if count else 0
    index = torch.arange(targets * negatives, device=h.device).reshape(targets, negatives) % max(count, 1)
    scores = (h[:, None] * candidates[index]).sum(-1)
    is_negative = (index != target_index[:, None]).float()
    losses = F.logsigmoid((h * positive).sum(1)) + (F.logsigmoid(-scores) * is_negative).sum(1)
    return -(losses if weight is None else losses * weight).sum()
