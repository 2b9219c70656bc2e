"""Our dropout does what torch's does: rate, scale, gradient, and no change in evaluation."""

import pytest
import torch

from recgpt_torchrec.model.dropout import dropout


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
def test_the_rate_and_the_scale_are_those_asked_for(p):
    torch.manual_seed(0)
    x = torch.ones(300, 400)
    y = dropout(x, p, True)
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=0.01)  # p in steps of 1/256
    assert y.mean().item() == pytest.approx(1, abs=0.02 / (1 - p))
    kept = y[y != 0]
    assert kept.unique().numel() == 1 and kept[0].item() == pytest.approx(1 / (1 - p), rel=0.03)


def test_positions_are_dropped_independently_and_anew_each_time():
    torch.manual_seed(0)
    first, second = (dropout(torch.ones(200, 333), 0.5, True) != 0 for _ in range(2))
    for a, b in (
        (first, second),
        (first[:, :-1], first[:, 1:]),
        (first[:-1], first[1:]),
        (first[:, :-8], first[:, 8:]),
    ):
        assert (a == b).float().mean().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_shape_and_floating_dtype(shape, dtype):
    y = dropout(torch.ones(shape, dtype=dtype), 0.3, True)
    assert y.shape == shape and y.dtype == dtype


def test_nothing_is_dropped_in_evaluation_nor_at_zero():
    x = torch.randn(50)
    assert dropout(x, 0.7, False) is x and dropout(x, 0.0, True) is x
    assert torch.equal(dropout(x, 0.0001, True), x)  # less than the smallest step


def test_everything_is_dropped_at_one():
    assert not dropout(torch.randn(50), 1.0, True).any()


def test_the_gradient_passes_where_the_value_did_with_the_same_scale():
    torch.manual_seed(0)
    x = torch.ones(1000, requires_grad=True)
    y = dropout(x, 0.5, True)
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, y.detach())


def test_a_seed_repeats_it():
    def once() -> torch.Tensor:
        torch.manual_seed(3)
        return dropout(torch.ones(99), 0.5, True)

    assert torch.equal(once(), once())
