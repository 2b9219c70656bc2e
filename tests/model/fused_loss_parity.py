"""The Triton kernels against a dense float64 loss and against `model.loss`; run by test_fused_loss.py.

On CPU they run in Triton's interpreter, which has to be asked for before Triton is imported: in a process of their own.
"""

import math
import os
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from recgpt_torchrec.model.losses import fused_loss
from recgpt_torchrec.model.losses.fused_loss import fused_softmax_loss
from recgpt_torchrec.model.losses.loss import softmax_loss

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

if INTERPRETED:
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    interpreted_dot = InterpreterBuilder.create_dot

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        """The interpreter of Triton 3.7 multiplies the integers that it keeps for bfloat16; float32 is exact."""
        a, b = (
            TensorHandle((each.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
            if each.dtype.scalar == tl.bfloat16
            else each
            for each in (a, b)
        )
        return interpreted_dot(self, a, b, *rest)

    InterpreterBuilder.create_dot = dot


class Case(NamedTuple):
    """Arguments of the loss."""

    h: Tensor
    positive: Tensor
    candidates: Tensor
    log_q: Tensor
    target_index: Tensor
    weight: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.h, self.positive, self.candidates

    def to(self, dtype: torch.dtype) -> "Case":
        """The same with vectors of another dtype, leaves of a graph of their own."""
        h, positive, candidates = (leaf.detach().to(dtype).requires_grad_() for leaf in self.leaves)
        return self._replace(h=h, positive=positive, candidates=candidates)


def case(targets: int, candidates: int, dim: int, scale: float = 1.0, seed: int = 0) -> Case:
    """Scores of about `scale` squared; some targets are candidates, some candidates and targets are padding."""
    generator = torch.Generator().manual_seed(seed)

    def vectors(count: int) -> Tensor:
        return (torch.randn(count, dim, generator=generator) * scale / dim**0.25).to(DEVICE).requires_grad_()

    log_q = -3 * torch.rand(candidates, generator=generator)
    log_q[torch.rand(candidates, generator=generator) < 0.2] = math.inf
    own = torch.randint(-1, max(candidates, 1), (targets,), generator=generator)
    own = own.where(torch.rand(targets, generator=generator) < 0.7, -1) if candidates else torch.full((targets,), -1)
    weight = (torch.rand(targets, generator=generator) < 0.8).float() * 1.5
    h, positive, drawn = vectors(targets), vectors(targets), vectors(candidates)
    return Case(h, positive, drawn, log_q.to(DEVICE), own.to(DEVICE), weight.to(DEVICE))


def dense(made: Case) -> Tensor:
    """The loss with all logits at once, in the dtype of the vectors."""
    h, positive, candidates, log_q, own, weight = made
    logits = h @ candidates.t() - log_q
    is_own = own[:, None] == torch.arange(len(candidates), device=h.device)
    scores = (h * positive).sum(1, keepdim=True)
    norm = torch.cat([logits.masked_fill(is_own, -torch.inf), scores], 1).logsumexp(1)
    return (weight * (norm - scores[:, 0])).sum()


def fused(made: Case, precision: str = "ieee") -> Tensor:
    return fused_softmax_loss(*made[:5], made.weight, precision)


def assert_equal_losses_and_gradients(
    ours: Tensor, mine: Case, theirs: Tensor, reference: Case, rounding: float
) -> None:
    """`rounding` is relative: to the loss, and to the largest element of each gradient."""
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=rounding, atol=rounding)
    gradients = zip(
        torch.autograd.grad(ours * 0.5, mine.leaves), torch.autograd.grad(theirs * 0.5, reference.leaves), strict=True
    )
    for leaf, (gradient, expected) in zip(mine.leaves, gradients, strict=True):
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape
        largest = expected.abs().max().item() if expected.numel() else 0.0
        torch.testing.assert_close(gradient.double(), expected.double(), rtol=0, atol=rounding * max(largest, 1e-3))


@settings(max_examples=20)
@given(
    st.integers(0, 140),
    st.integers(0, 140),
    st.sampled_from([1, 16, 48, 64, 100]),
    st.sampled_from([1.0, 10.0]),
    st.integers(0, 1000),
)
@example(0, 5, 16, 1.0, 0)
@example(5, 0, 16, 1.0, 0)
@example(1, 1, 48, 1.0, 0)
@example(128, 64, 64, 10.0, 0)
@example(129, 129, 512, 1.0, 0)
def test_float32_is_the_dense_loss_in_float64(targets, candidates, dim, scale, seed):
    mine = case(targets, candidates, dim, scale, seed)
    reference = mine.to(torch.float64)
    assert_equal_losses_and_gradients(fused(mine), mine, dense(reference), reference, 2e-5)


@pytest.mark.parametrize("targets, candidates, dim", [(70, 130, 64), (130, 70, 48), (20, 40, 300)])
def test_bfloat16_is_the_dense_loss_of_the_rounded_vectors(targets, candidates, dim):
    mine = case(targets, candidates, dim).to(torch.bfloat16)
    reference = mine.to(torch.float64)
    assert_equal_losses_and_gradients(fused(mine), mine, dense(reference), reference, 0.01)


@pytest.mark.parametrize("targets, candidates, dim", [(70, 130, 64), (5, 1, 16)])
def test_it_is_the_loss_in_chunks(targets, candidates, dim):
    mine = case(targets, candidates, dim)._replace(weight=torch.ones(targets, device=DEVICE))
    other = mine.to(torch.float32)
    ours, theirs = fused_softmax_loss(*mine[:5]), softmax_loss(*other[:5])
    assert_equal_losses_and_gradients(ours, mine, theirs, other, 1e-5)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter multiplies in float32")
def test_tf32_is_near_float32():
    mine = case(300, 500, 64)
    reference = mine.to(torch.float64)
    assert_equal_losses_and_gradients(fused(mine, "tf32"), mine, dense(reference), reference, 5e-3)


def test_nothing_is_left_where_all_candidates_are_masked():
    made = case(3, 1, 16)
    masked = made._replace(target_index=torch.zeros_like(made.target_index), weight=torch.ones_like(made.weight))
    padded = made._replace(log_q=torch.full_like(made.log_q, math.inf), weight=torch.ones_like(made.weight))
    for each in (masked, padded):
        loss = fused(each)
        assert loss.item() == 0
        assert not any(gradient.any() for gradient in torch.autograd.grad(loss, each.leaves))


def test_targets_of_weight_0_and_candidates_of_infinite_log_q_get_no_gradient():
    made = case(90, 90, 16)
    h, positive, candidates = torch.autograd.grad(fused(made), made.leaves)
    assert (made.weight == 0).any() and torch.isinf(made.log_q).any()
    assert not h[made.weight == 0].any() and not positive[made.weight == 0].any()
    assert not candidates[torch.isinf(made.log_q)].any()
    assert h[made.weight > 0].abs().amax(1).min() > 0 and candidates[torch.isfinite(made.log_q)].abs().amax(1).min() > 0


def test_the_number_of_parts_changes_nothing_but_rounding_and_a_second_call_not_even_that(monkeypatch):
    results = []
    for processors in (1, 1, 64):
        monkeypatch.setattr(fused_loss, "processors", lambda device, n=processors: n)
        made = case(300, 330, 16)
        loss = fused(made)
        results.append([loss.detach(), *torch.autograd.grad(loss, made.leaves)])
    for once, again, split in zip(*results, strict=True):
        assert torch.equal(once, again)
        torch.testing.assert_close(once, split, rtol=1e-5, atol=1e-6)


def test_without_gradients_the_loss_is_the_same():
    made = case(70, 130, 48)
    with torch.no_grad():
        loss = fused(made)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, fused(made).detach(), rtol=1e-6, atol=0)


def test_torch_accepts_the_operations_and_compiles_through_them():
    made = case(20, 30, 16)
    arguments = (*made, "ieee", True)
    torch.library.opcheck(
        torch.ops.recgpt.fused_softmax.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    other = made.to(torch.float32)
    assert_equal_losses_and_gradients(compiled(made), made, fused(other), other, 1e-6)


def test_wider_vectors_are_refused():
    with pytest.raises(ValueError, match="up to 512, not 520"):
        fused(case(2, 2, 520))
