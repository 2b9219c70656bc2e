"""Causal means of sequences that lie end to end against those of the grid and against a plain loop."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from recgpt_torchrec.model import segmented
from recgpt_torchrec.model.attention import DenseAttention
from recgpt_torchrec.model.segmented import BLOCK, history_mean


def positions(lengths: list[int]) -> Tensor:
    return torch.tensor([i for n in lengths for i in range(n)], dtype=torch.int32)


def values(tokens: int, dim: int = 3) -> Tensor:
    return torch.randn(tokens, dim, generator=torch.Generator().manual_seed(0)).requires_grad_()


def by_loop(x: Tensor, position: Tensor, decay: Tensor) -> Tensor:
    """The module docstring's formula in float64, one token at a time."""
    outputs = []
    for t, p in enumerate(position.tolist()):
        weights = torch.exp(-decay.double() * torch.arange(p, -1, -1, device=x.device))
        outputs.append((weights / weights.sum()) @ x[t - p : t + 1].double())
    return torch.stack(outputs)


@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=8),
    st.sampled_from([0.0, 1e-9, 1e-4, 0.05, 0.5, 30.0]),
    st.sampled_from([1, 3, 16, BLOCK]),
)
@example([1], 0.5, BLOCK)
@example([BLOCK, BLOCK, 1], 0.5, BLOCK)
@example([1, BLOCK, 2], 0.0, BLOCK)
@example([3 * BLOCK + 1, 5], 0.01, BLOCK)
def test_it_is_the_formula_with_the_gradients_of_values_and_decay(lengths, decay, block):
    x, position = values(sum(lengths)), positions(lengths)
    rate = torch.tensor(decay, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmented, "BLOCK", block)
        ours, reference = history_mean(x, position, rate, max(lengths)), by_loop(x, position, rate)
    torch.testing.assert_close(ours.double(), reference, rtol=1e-5, atol=1e-5)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    mine = torch.autograd.grad((ours * weights).sum(), (x, rate))
    theirs = torch.autograd.grad((reference * weights).sum(), (x, rate))
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-4, atol=1e-5)
    scale = max(lengths) * len(position) ** 0.5  # a sum of ages times values: what float32 rounds grows with both
    torch.testing.assert_close(mine[1], theirs[1], rtol=1e-4, atol=1e-6 * scale)


@pytest.mark.parametrize("decay", [None, torch.tensor(0.3)])
def test_it_gives_what_the_grid_gives(decay):
    lengths, width = [40, 24, 64, 1, 63], 64
    x = values(192)
    sequence = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths)).view(-1, width)
    grid = DenseAttention(sequence).mean(x.view(3, width, -1), decay).view(192, -1)
    ours = history_mean(x, positions(lengths), decay, 64)
    torch.testing.assert_close(ours, grid, rtol=1e-5, atol=1e-6)
    weights = torch.randn(grid.shape, generator=torch.Generator().manual_seed(1))
    mine, theirs = (torch.autograd.grad((out * weights).sum(), x)[0] for out in (ours, grid))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_half_precision_values_are_summed_in_float32_even_under_autocast():
    lengths = [200, 3, 77]
    x, position = values(280).detach().bfloat16(), positions(lengths)
    with torch.autocast("cpu", torch.bfloat16):
        ours = history_mean(x, position, torch.tensor(0.01), 200)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), by_loop(x, position, torch.tensor(0.01)), rtol=1e-5, atol=1e-5)


def test_it_compiles_without_a_break():
    lengths = [70, 3, 27]
    x, rate = values(100), torch.tensor(0.2, requires_grad=True)
    compiled = torch.compile(history_mean, fullgraph=True, backend="aot_eager")
    arguments = (x, positions(lengths), rate, 70)
    torch.testing.assert_close(compiled(*arguments), history_mean(*arguments))
    mine, theirs = (torch.autograd.grad(f(*arguments).square().sum(), (x, rate)) for f in (compiled, history_mean))
    torch.testing.assert_close(mine, theirs)
