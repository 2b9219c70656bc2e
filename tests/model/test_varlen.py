"""Attention on sequences that lie end to end against torch's attention, one sequence at a time."""

from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from recgpt_torchrec.model.attention import DenseAttention
from recgpt_torchrec.model.varlen import cover_slots, kernel_runs, slot_position, varlen_attention

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=12)
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="the flash kernel needs a CUDA device")


def boundaries(lengths: list[int], device: str = "cpu") -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)


def inputs(tokens: int, heads: int, head_dim: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """[tokens, 3, heads, head_dim], as one linear map makes queries, keys and values."""
    made = torch.randn(tokens, 3, heads, head_dim, generator=torch.Generator().manual_seed(0))
    return made.to(device, dtype).requires_grad_()


def one_by_one(qkv: Tensor, lengths: list[int]) -> Tensor:
    """Each sequence alone through torch's attention; [tokens, heads, head_dim]."""
    outputs = []
    for part in qkv.split([n for n in lengths if n]):
        q, k, v = part.permute(1, 2, 0, 3)
        outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1))
    return torch.cat(outputs) if outputs else qkv[:, 0]


def attend(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    q, k, v = qkv.unbind(1)
    return varlen_attention(q, k, v, cu_seqlens, max_seqlen)


def compare(qkv: Tensor, lengths: list[int], reference_qkv: Tensor, rtol: float, atol: float) -> None:
    """Outputs and gradients of `varlen_attention` against those of `one_by_one`."""
    ours = attend(qkv, boundaries(lengths, str(qkv.device)), max(*lengths, 1))
    reference = one_by_one(reference_qkv, lengths)
    assert ours.shape == reference.shape and ours.dtype == qkv.dtype
    torch.testing.assert_close(ours.to(reference.dtype), reference, rtol=rtol, atol=atol)
    weights = torch.randn(reference.shape, generator=torch.Generator().manual_seed(1)).to(reference)
    mine, theirs = (
        torch.autograd.grad((out * weights.to(out.dtype)).sum(), leaf)[0]
        for out, leaf in ((ours, qkv), (reference, reference_qkv))
    )
    torch.testing.assert_close(mine.to(theirs.dtype), theirs, rtol=rtol, atol=atol)


@given(LENGTHS, st.sampled_from([(1, 8), (2, 5), (3, 16)]))
@example([0], (1, 8))
@example([1], (1, 8))
@example([40] * 3, (2, 16))
@example([3, 0, 0, 5, 0], (2, 8))
def test_the_twin_is_torchs_attention_of_each_sequence_with_its_gradients(lengths, heads):
    qkv = inputs(sum(lengths), *heads)
    compare(qkv, lengths, qkv, rtol=1e-4, atol=1e-5)


def test_the_row_gives_what_the_grid_gives():
    lengths, width = [5, 3, 7, 1, 8], 8  # rows of 8 slots: 5 + 3, 7 + 1, 8
    qkv = inputs(24, 2, 8)
    sequence = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths)).view(-1, width)
    q, k, v = (part.view(3, width, 2, 8).transpose(1, 2) for part in qkv.unbind(1))
    grid = DenseAttention(sequence).attend(q, k, v, 0.0).transpose(1, 2).reshape(24, 2, 8)
    row = attend(qkv, boundaries(lengths), width)
    torch.testing.assert_close(row, grid, rtol=1e-4, atol=1e-6)


def test_half_precision_on_cpu_is_near_float32():
    lengths = [9, 0, 30, 2]
    qkv = inputs(sum(lengths), 2, 8)
    half = qkv.detach().to(torch.bfloat16).requires_grad_()
    compare(half, lengths, qkv, rtol=0.05, atol=0.05)


@given(LENGTHS, st.integers(0, 100), st.integers(0, 5))
@example([], 10, 0)
def test_covered_slots_all_belong_to_a_sequence_of_at_most_the_maximum(lengths, behind, empty):
    cu_seqlens = boundaries(lengths + [0] * empty)
    slots, maximum = sum(lengths) + behind, max(*lengths, 1, 1)
    covered = cover_slots(cu_seqlens, slots, maximum)
    assert covered.dtype == torch.int32 and covered[: len(cu_seqlens)].equal(cu_seqlens) and covered[-1] == slots
    assert 0 <= covered.diff().min() and covered.diff().max() <= maximum
    assert len(covered) == len(cu_seqlens) + -(-slots // maximum), "the number may not depend on the values"
    expected = [i for start, end in pairwise(covered.tolist()) for i in range(end - start)]
    assert slot_position(covered, slots).tolist() == expected


def test_slots_behind_the_sequences_change_nothing_and_stay_finite():
    lengths = [4, 9, 2]
    qkv = inputs(31, 2, 8)
    covered = cover_slots(boundaries([*lengths, 0, 0]), 31, 9)
    out = attend(qkv, covered, 9)
    torch.testing.assert_close(out[:15], one_by_one(qkv[:15], lengths), rtol=1e-4, atol=1e-6)
    (gradient,) = torch.autograd.grad(out[:15].square().sum(), qkv)
    assert torch.isfinite(out).all() and not gradient[15:].any()


def test_the_twin_compiles_without_a_break():
    lengths = [4, 9, 2]
    qkv = inputs(15, 2, 8)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(qkv, boundaries(lengths), 9), attend(qkv, boundaries(lengths), 9))


def test_the_kernel_is_for_half_precision_on_cuda():
    assert not kernel_runs(torch.device("cpu"), torch.bfloat16, 64)
    assert not kernel_runs(torch.device("cuda"), torch.float32, 64)
    assert not kernel_runs(torch.device("cuda"), torch.bfloat16, 512)


@NO_CUDA
@pytest.mark.parametrize("head_dim", [8, 20, 32, 64, 128, 256])
@pytest.mark.parametrize("lengths", [[1], [3, 0, 0, 5, 0], [50, 1, 33, 50, 0, 0], [200, 17]])
def test_the_kernel_is_torchs_attention_of_each_sequence_with_its_gradients(lengths, head_dim):
    assert kernel_runs(torch.device("cuda"), torch.bfloat16, head_dim)
    half = inputs(sum(lengths), 2, head_dim, "cuda", torch.bfloat16)
    reference = half.detach().float().requires_grad_()
    compare(half, lengths, reference, rtol=0.03, atol=0.03)


@NO_CUDA
def test_the_kernel_leaves_nothing_undefined_behind_the_sequences():
    half = inputs(300, 2, 64, "cuda", torch.bfloat16)
    covered = cover_slots(boundaries([40, 50, 3, 0, 0], "cuda"), 300, 50)
    out = attend(half, covered, 50)
    (gradient,) = torch.autograd.grad(out[:93].float().square().sum(), half)
    assert torch.isfinite(out).all() and torch.isfinite(gradient).all() and not gradient[93:].any()
