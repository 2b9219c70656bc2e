"""The softmax loss in two passes: what it holds does not grow with the candidates, and when it is taken."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from recgpt_torchrec.model.losses import shared_loss
from recgpt_torchrec.model.losses.loss import softmax_loss
from recgpt_torchrec.model.losses.shared_loss import Alone, rows_at_once, shared_softmax_loss

DIM, TARGETS = 8, 50
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Allocations(TorchDispatchMode):
    """Bytes of each piece of memory that operations return, in order; memory that was there before is left out."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.bytes: list[int] = []
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in self.known:
                self.known.add(value.untyped_storage().data_ptr())
                self.bytes.append(value.untyped_storage().nbytes())
                self.kept.append(value)  # so that its memory is not given out again
        return result


def vectors(count: int, seed: int) -> Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of 16 targets x 64 candidates; 4 KiB."""
    monkeypatch.setattr(shared_loss, "CHUNK", 16)
    monkeypatch.setattr(shared_loss, "LOGITS", {"cpu": 2**12})
    monkeypatch.setattr(shared_loss, "BLOCK", {"cpu": 2**12})
    yield


@pytest.mark.parametrize("count", [500, 5000])
def test_nothing_but_the_gradient_grows_with_the_candidates(small_blocks, count):
    h, catalogue, targets = vectors(TARGETS, 0), vectors(count, 1), torch.arange(TARGETS) * 7
    positive = catalogue.detach()[targets].requires_grad_()
    log_q = torch.zeros(count)
    with Allocations(h, catalogue, positive, targets, log_q) as allocations:
        gradients = torch.autograd.grad(softmax_loss(h, positive, catalogue, log_q, targets), (h, positive, catalogue))
    gradient = count * DIM * 4
    assert [size for size in allocations.bytes if size > 8192] == [gradient]
    scores = h @ catalogue.t()
    reference = torch.autograd.grad(F.cross_entropy(scores, targets, reduction="sum"), (h, catalogue))
    ours = gradients[2].index_add(0, targets, gradients[1])
    torch.testing.assert_close(gradients[0], reference[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, reference[1], rtol=1e-4, atol=1e-5)


def test_the_measurement_sees_a_dense_loss():
    h, catalogue, targets = vectors(TARGETS, 0), vectors(500, 1), torch.arange(TARGETS)
    with Allocations(h, catalogue, targets) as allocations:
        F.cross_entropy(h @ catalogue.t(), targets).backward()
    assert max(allocations.bytes) >= TARGETS * 500 * 4 > 8192


def test_one_pass_is_taken_as_long_as_all_candidates_of_a_chunk_fit():
    assert rows_at_once(0, CPU, torch.float32) == rows_at_once(12_101, CPU, torch.float32) == 96
    assert rows_at_once(43_690, CPU, torch.float32) == 96 and rows_at_once(43_691, CPU, torch.float32) == 0
    assert rows_at_once(16_384, CPU, torch.bfloat16) == 512 and rows_at_once(32_768, CPU, torch.bfloat16) == 256
    assert rows_at_once(65_536, CUDA, torch.float32) == 4096 and rows_at_once(2**19, CUDA, torch.float32) == 512
    assert rows_at_once(2**19 + 1, CUDA, torch.float32) == 0


@pytest.mark.parametrize("large", [False, True])
def test_one_rank_computes_the_same_in_two_passes_as_in_one(small_blocks, monkeypatch, large):
    h, positive, candidates = vectors(TARGETS, 0), vectors(TARGETS, 1), vectors(200, 2)
    log_q = -torch.rand(200, generator=torch.Generator().manual_seed(3))
    log_q[::7] = torch.inf
    index = torch.where(torch.arange(TARGETS) % 3 == 0, torch.arange(TARGETS), -1)
    weight = torch.rand(TARGETS, generator=torch.Generator().manual_seed(4))
    results = []
    for limit in (2**12, 2**26):
        monkeypatch.setattr(shared_loss, "LOGITS", {"cpu": limit})
        scaled = h * (60 if large else 1)
        loss = softmax_loss(scaled, positive, candidates, log_q, index, weight)
        results.append((loss, *torch.autograd.grad(loss * 0.5, (h, positive, candidates))))
    assert results[0][0].isfinite()
    for two, one in zip(*results, strict=True):
        # Exponents of a thousand have errors of 1e-4 in float32.
        torch.testing.assert_close(two, one, rtol=3e-3 if large else 1e-4, atol=1e-3 if large else 1e-5)


@given(st.integers(0, 9), st.integers(0, 12), st.integers(1, 4), st.integers(1, 20), st.booleans(), st.integers(0, 99))
def test_blocks_of_any_size_give_the_formula(targets, count, rows, block, kept, seed):
    generator = torch.Generator().manual_seed(seed)
    h, positive = vectors(targets, seed), vectors(targets, seed + 1)
    candidates, log_q = vectors(count, seed + 2), -torch.rand(count, generator=generator)
    log_q[torch.rand(count, generator=generator) < 0.2] = torch.inf
    index = torch.randint(-1, count, (targets,), generator=generator)
    weight = torch.rand(targets, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_loss, "CHUNK", rows)
        patch.setattr(shared_loss, "BLOCK", {"cpu": 4 * block})
        patch.setattr(shared_loss, "LOGITS", {"cpu": 2**20 if kept else 0})
        ours = shared_softmax_loss(h, positive, candidates, log_q, index, weight, torch.float32, Alone())
        found = torch.autograd.grad(ours, (h, positive, candidates))
    logits = (h @ candidates.t() - log_q).masked_fill(torch.arange(count) == index[:, None], -torch.inf)
    own = (h * positive).sum(1, keepdim=True)
    wanted = (weight * (torch.cat([own, logits], 1).logsumexp(1) - own[:, 0])).sum()
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
    wanted_gradients = torch.autograd.grad(wanted, (h, positive, candidates))
    for mine, reference in zip(found, wanted_gradients, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-3, atol=1e-4)
