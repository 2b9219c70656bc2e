"""The softmax loss in two passes over the logits, whose candidates may lie on several ranks.

First the partition function of each target and the weighted sum of candidates, which is the gradient of its output;
then, with the logits computed anew, the gradient of the candidates. Memory for logits does not depend on the number of
candidates. It takes four products where `loss.softmax_loss` takes three, unless the logits of all targets and
candidates fit into memory and are kept.

Each rank has outputs of its own targets, and candidates of its own. Outputs travel to all ranks, and what each rank
makes of them with its candidates is added. This file knows nothing of processes: `Ranks` is handed in.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from recgpt_torchrec.model.waiting import waits

CHUNK = 96
"""Targets scored at once on CPU: their logits stay in cache from product to exponential to product. Milliseconds of one
core for 768 targets x 12,101 items: 54 with 16, 42 with 32, 37 with 64 to 128, 40 with 256."""
CHUNK_BFLOAT16 = 512
"""The same in bfloat16 on CPU, where each chunk's gradient of the candidates is added in a pass of its own."""
CHUNK_CUDA = 4096
"""Targets scored at once on CUDA: large products, with bounded memory for logits."""
FEWEST = {"cpu": CHUNK, "cuda": 512}
"""Targets below which a chunk's products are slow, or the gradient of the candidates is written too often."""
LOGITS = {"cpu": 2**24, "cuda": 2**30}
"""Maximum number of bytes of logits that are held at once. On CPU one pass over 100,000 candidates takes longer than
two in blocks, which stay in cache: 222 ms of one core against 148 for 128 targets x 32."""
BLOCK = {"cpu": 2**21, "cuda": 2**28}
"""Bytes of logits in a block, where not all candidates of `FEWEST` targets fit into `LOGITS`."""
NEVER = 1e4
"""A larger log q means that the candidate does not count: exp(-1e4) is 0."""
HUGE = 1e30
"""A sum of exponentials below this has not overflowed, nor do such sums of some ranks added up."""


class Scored(NamedTuple):
    """Targets and the candidates that they are scored against, with gradients kept elsewhere."""

    h: Tensor
    """[targets, dim] float32, or `dtype`."""
    s: Tensor
    """[targets] float32, subtracted from the logits of each: the score of the target itself."""
    candidates: Tensor
    """[candidates, dim] float32."""
    log_q: Tensor
    """[candidates] float32."""
    target_index: Tensor
    """[targets] int64, as for `softmax_loss`."""
    dtype: torch.dtype
    """Of the products' operands."""

    def blocks(self, rows: int, columns: int, out: Tensor | None = None) -> Iterator["Block"]:
        """Blocks of `rows` x `columns` logits h . v_c - log q_c - s_t, -inf where the candidate is the target itself.

        -log q_c and -s_t are two more columns of the product h . v_c, so that they cost no passes over the logits:
        the loss of a step with 1,536 targets and 3,000 candidates takes 16.4 ms of one core (products alone, at the
        rate of large ones: 13.6), with such passes 20.5.

        Args:
            rows, columns: size of a block.
            out: [targets, candidates] that all blocks are kept in; None: each overwrites the one before.
        """
        targets, count, dtype = len(self.h), len(self.candidates), self.dtype
        minus_s = _terms(-self.s, dtype)
        one = self.h.new_ones(1, dtype=dtype)
        terms = len(minus_s)
        left = torch.cat([self.h.to(dtype), *[one.expand(targets, 1)] * terms, *(term[:, None] for term in minus_s)], 1)
        buffer = self.h.new_empty(min(rows, targets) * min(columns, count) if out is None else 0, dtype=dtype)
        for first in range(0, max(count, 1), columns):
            block = slice(first, min(first + columns, count))
            width = block.stop - first
            some = self.candidates[block]
            minus_log_q = _terms(-self.log_q[block].clamp(max=NEVER), dtype)
            right = torch.cat(
                [some.t().to(dtype), *(term[None] for term in minus_log_q), *[one.expand(1, width)] * terms]
            )
            vectors, index = some.to(dtype), self.target_index - first
            if width < count:
                index = torch.where(index < width, index, -1)
            places = index.clamp(min=0)[:, None]
            for start in range(0, targets, rows):
                part = slice(start, min(start + rows, targets))
                place = (
                    buffer[: (part.stop - start) * width].view(part.stop - start, width)
                    if out is None
                    else out[part, block]
                )
                p = torch.mm(left[part], right, out=place)
                if width:
                    own = p.gather(1, places[part])
                    p.scatter_(1, places[part], own.masked_fill(index[part, None] >= 0, -torch.inf))
                yield Block(part, block, p, vectors)


class Block(NamedTuple):
    """Logits of some targets and some candidates."""

    part: slice
    """Of the targets."""
    columns: slice
    """Of the candidates."""
    p: Tensor
    """[targets of the block, candidates of the block]; to be overwritten."""
    vectors: Tensor
    """[candidates of the block, dim] of the products' dtype."""


class Ranks(Protocol):
    """What the loss needs of other ranks; each method is collective. All ranks pass tensors of one shape."""

    rank: int

    def gather(self, own: Tensor) -> Tensor:
        """[n, ...] of each rank -> [ranks * n, ...] of all, in order of rank."""

    def largest(self, values: Tensor) -> Tensor:
        """The largest of all ranks, elementwise."""

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks, elementwise."""

    def own_total(self, values: Tensor) -> Tensor:
        """[ranks * n, ...] -> [n, ...]: this rank's part of the sum over ranks."""


class Alone:
    """`Ranks` of one rank."""

    rank = 0

    def gather(self, own: Tensor) -> Tensor:
        """See `Ranks`."""
        return own

    largest = total = own_total = gather


def shared_softmax_loss(
    h: Tensor,
    positive: Tensor,
    candidates: Tensor,
    log_q: Tensor,
    target_index: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype,
    ranks: Ranks,
) -> Tensor:
    """Sum over this rank's targets of the softmax loss over the candidates of all ranks (collective).

    The gradient of the candidates holds the share of every rank's targets. It is multiplied with the gradient of this
    rank's loss, which must be that of the other ranks' losses.

    Args:
        h: [targets, dim] float32 outputs; all ranks have equal numbers, those that are padding have weight 0.
        positive: [targets, dim] float32 vectors of the targets.
        candidates: [candidates, dim] float32 vectors of this rank's candidates.
        log_q: [candidates] as for `loss.softmax_loss`.
        target_index: [ranks * targets] int64 index of each target, in order of rank, among this rank's candidates; -1
            where it is not one.
        weight: [targets] float32 weight of each target's loss; None: 1.
        dtype: of the operands of the matrix products, float32 or bfloat16, in which outputs travel.
        ranks: the other ranks.

    Returns:
        [] float32.
    """
    weight = h.new_ones(len(h)) if weight is None else weight
    return _SharedLoss.apply(h, positive, candidates, log_q, target_index, weight, dtype, ranks)


class _SharedLoss(torch.autograd.Function):
    """See `shared_softmax_loss`. All that crosses ranks does so in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        positive: Tensor,
        candidates: Tensor,
        log_q: Tensor,
        target_index: Tensor,
        weight: Tensor,
        dtype: torch.dtype,
        ranks: Ranks,
    ) -> Tensor:
        own = slice(ranks.rank * len(h), (ranks.rank + 1) * len(h))
        all_h = ranks.gather(h.to(dtype))
        s, all_weight = ranks.gather(torch.stack([(h * positive).sum(1), weight], 1)).unbind(1)
        scored = Scored(all_h, s.contiguous(), candidates, log_q, target_index, dtype)
        shape, kept = (len(all_h), len(candidates)), None
        if shape[0] * shape[1] * dtype.itemsize <= LOGITS[h.device.type]:
            kept = h.new_empty(shape, dtype=dtype)
        exact = waits(h.device)
        local_top, norm, pulled = _scan(scored, exact, kept)
        if not exact and not (norm < HUGE).all():
            local_top, norm, pulled = _scan(scored, True, kept)

        top = ranks.largest(local_top)
        factor = torch.exp(local_top - top)
        norm = ranks.total(norm * factor) + torch.exp(-top)  # the target's own term
        pulled = ranks.own_total(pulled.mul_(factor[:, None]))
        share = all_weight / norm
        target_error = (torch.exp(-top[own]) * share[own] - weight)[:, None]
        # Logits that are computed anew are relative to the largest; those that are kept, to this rank's largest.
        relative = scored.s + top if kept is None else None
        ctx.save_for_backward(
            torch.addcmul(target_error * positive, pulled, share[own, None]),
            target_error * h,
            all_h,
            share if kept is None else share * factor,
            relative,
            candidates,
            log_q,
            target_index,
            kept,
        )
        ctx.dtype = dtype
        return ((norm.log() + top)[own] * weight).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_h, grad_positive, all_h, share, relative, candidates, log_q, target_index, kept = ctx.saved_tensors
        grad_candidates = None
        if ctx.needs_input_grad[2]:
            shared, dtype = (all_h * (share * grad)[:, None]).to(ctx.dtype), ctx.dtype
            if kept is not None:
                grad_candidates = (kept.t() @ shared).float()
            else:
                scored = Scored(all_h, relative, candidates, log_q, target_index, dtype)
                grad_candidates = torch.zeros_like(candidates)
                for part, columns, p, _ in scored.blocks(*_block_size(candidates.device, dtype)):
                    add_product(grad_candidates[columns], p.exp_().t(), shared[part])
        return grad_h * grad, grad_positive * grad, grad_candidates, *(None,) * 5


def _scan(scored: Scored, exact: bool, kept: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The first pass: sums over this rank's candidates of exponentials relative to `top`.

    Args:
        scored: all targets, this rank's candidates.
        exact: whether `top` is the largest logit, so that nothing overflows; otherwise it is 0.
        kept: [targets, candidates] is filled with the exponentials; None: they are not kept.

    Returns:
        top: [targets], at least 0, the target's own logit.
        norm: [targets] sum of exponentials.
        pulled: [targets, dim] sum of the candidates, weighted by their exponentials.
    """
    targets, dim = scored.h.shape
    top, norm, pulled = (scored.s.new_zeros(shape) for shape in ((targets,), (targets,), (targets, dim)))
    rows, columns = _block_size(scored.h.device, scored.dtype)
    if kept is not None:
        columns = max(1, kept.shape[1])
    for part, _, p, vectors in scored.blocks(rows, columns, kept):
        if exact and p.shape[1]:
            before = top[part]
            largest = torch.maximum(before, p.amax(1).float())
            shrunk = torch.exp(before - largest)
            norm[part] *= shrunk
            pulled[part] *= shrunk[:, None]
            top[part] = largest
            p -= largest[:, None]
        p.exp_()
        norm[part] += p.sum(1, dtype=torch.float32)
        add_product(pulled[part], p, vectors)
    return top, norm, pulled


def add_product(to: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to float32 `to`, in place."""
    if left.dtype == torch.float32:
        to.addmm_(left, right)
    else:
        to += left @ right


def _block_size(device: torch.device, dtype: torch.dtype) -> tuple[int, int]:
    """Numbers of targets and of candidates in a block."""
    rows = chunk_of(device, dtype)
    return rows, max(1, BLOCK[device.type] // (rows * dtype.itemsize))


def chunk_of(device: torch.device, dtype: torch.dtype) -> int:
    """Number of targets that are scored at once."""
    return CHUNK_CUDA if device.type != "cpu" else CHUNK if dtype == torch.float32 else CHUNK_BFLOAT16


def rows_at_once(candidates: int, device: torch.device, dtype: torch.dtype) -> int:
    """Number of targets whose logits with all candidates may be held at once; 0: fewer than are worth it."""
    rows = min(chunk_of(device, dtype), LOGITS[device.type] // (max(candidates, 1) * dtype.itemsize))
    return rows if rows >= FEWEST[device.type] else 0


def _terms(values: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Numbers of `dtype` whose sum is float32 `values` to 16 bits and more."""
    first = values.to(dtype)
    return [first] if dtype == torch.float32 else [first, (values - first).to(dtype)]
