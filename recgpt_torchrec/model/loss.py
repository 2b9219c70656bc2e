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

from recgpt_torchrec.model.waiting import waits

CHUNK = 96
"""Targets scored at once on CPU: their logits stay in cache from product to exponential to product. Milliseconds of one
core for 768 targets x 12,101 items: 54 with 16, 42 with 32, 37 with 64 to 128, 40 with 256."""
CHUNK_BFLOAT16 = 512
"""The same in bfloat16 on CPU, where each chunk's gradient of the candidates is added in a pass of its own."""
CHUNK_CUDA = 4096
"""Targets scored at once on CUDA: large products, with bounded memory for logits."""
NEVER = 1e4
"""A larger log q means that the candidate does not count: exp(-1e4) is 0."""


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
    ) -> Tensor:
        s = (h * positive).sum(1)
        # Scores relative to the target's own need no pass for their maximum. They overflow only 88 above it; on CPU
        # that is looked at, on CUDA looking would stop the device.
        exact = waits(h.device)
        sums = _partition(h, s, candidates, log_q, target_index, weight, dtype, exact)
        if not exact and not sums[0].isfinite().all():
            sums = _partition(h, s, candidates, log_q, target_index, weight, dtype, True)
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
        return grad_h * grad, grad_positive * grad, grad_candidates * grad, None, None, None, None


def _partition(
    h: Tensor,
    s: Tensor,
    candidates: Tensor,
    log_q: Tensor,
    target_index: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype,
    exact: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The partition function and its gradients, three products and one exponential per chunk of targets.

    -log q_c and -s_t are two more columns of the product h . v_c, so that they cost no passes over the logits:
    the loss of a step with 1,536 targets and 3,000 candidates takes 16.4 ms of one core (products alone, at the rate of
    large ones: 13.6), with such passes 20.5.

    Args:
        h, candidates, log_q, target_index: as for `softmax_loss`, float32.
        s: [targets] score of each target.
        weight: as for `softmax_loss`.
        dtype: of the products' operands.
        exact: whether to subtract the largest score, too, which overflows for no scores.

    Returns:
        log_partition: [targets] log of the partition function, relative to the target's score: its loss.
        target_error: [targets, 1] gradient of the loss with respect to the target's score, s_t.
        share: [targets, 1] factor of `pulled` in the gradient of h.
        pulled: [targets, dim] sum of the candidates, weighted by their exponentials.
        grad_candidates: [dim, candidates] gradient.
    """
    (targets, dim), count = h.shape, candidates.shape[0]
    terms, minus_s = _terms(-log_q.clamp(max=NEVER), dtype), _terms(-s, dtype)
    one = h.new_ones(1, dtype=dtype)
    left = torch.cat([h.to(dtype), *[one.expand(targets, 1)] * len(terms), *(term[:, None] for term in minus_s)], 1)
    right = torch.cat(
        [candidates.t().to(dtype), *(term[None] for term in terms), *[one.expand(1, count)] * len(minus_s)]
    )
    vectors, rows = candidates.to(dtype), target_index.clamp(min=0)[:, None]
    in_float = dtype == torch.float32
    chunk = CHUNK_CUDA if h.device.type != "cpu" else CHUNK if in_float else CHUNK_BFLOAT16
    norm, top, pulled = torch.empty_like(s), torch.zeros_like(s), torch.empty_like(h)
    grad_candidates = h.new_zeros(dim, count)
    buffer = h.new_empty(min(chunk, targets), count, dtype=dtype)
    for start in range(0, targets, chunk):
        part = slice(start, min(start + chunk, targets))
        p = torch.mm(left[part], right, out=buffer[: part.stop - start])
        if count:
            own = p.gather(1, rows[part])
            p.scatter_(1, rows[part], own.masked_fill(target_index[part, None] >= 0, -torch.inf))
        if exact and count:
            top[part] = p.amax(1).clamp_(min=0).float()
            p -= top[part, None]
        p.exp_()
        norm[part] = p.sum(1, dtype=torch.float32) + torch.exp(-top[part])
        pulled[part] = p @ vectors
        share_c = 1 / norm[part, None] if weight is None else weight[part, None] / norm[part, None]
        shared = (h[part] * share_c).to(dtype).t()
        if in_float:
            grad_candidates.addmm_(shared, p)
        else:
            grad_candidates += shared @ p
    share = (1 / norm if weight is None else weight / norm)[:, None]
    target_error = torch.exp(-top)[:, None] * share - (1 if weight is None else weight[:, None])
    return norm.log() + top, target_error, share, pulled, grad_candidates


def _terms(values: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Numbers of `dtype` whose sum is float32 `values` to 16 bits and more."""
    first = values.to(dtype)
    return [first] if dtype == torch.float32 else [first, (values - first).to(dtype)]


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
    return _SoftmaxLoss.apply(h.float(), positive.float(), candidates.float(), log_q, target_index, weight, dtype)


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
    order. A candidate that is the target does not count. Shapes and dtypes as in `softmax_loss`.
    """
    h, positive, candidates = h.float(), positive.float(), candidates.float()
    targets, count = h.shape[0], candidates.shape[0]
    index = torch.arange(targets * negatives, device=h.device).reshape(targets, negatives) % max(count, 1)
    scores = (h[:, None] * candidates[index]).sum(-1)
    is_negative = (index != target_index[:, None]).float()
    losses = F.logsigmoid((h * positive).sum(1)) + (F.logsigmoid(-scores) * is_negative).sum(1)
    return -(losses if weight is None else losses * weight).sum()
