"""Ways to compute a training step: layouts, precisions and compilation give the loss and gradients of the plain one."""

from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from recgpt_torchrec.config import Loss, Model
from recgpt_torchrec.data.candidates import Candidates
from recgpt_torchrec.data.packed import Capacity, FixedShape, Layout, PackedBatch, pack_histories
from recgpt_torchrec.data.reading.histories import Histories
from recgpt_torchrec.model.dense import Compute, Dense

ITEMS, USERS, DIM, TOKENS = 40, 12, 16, 128
NEGATIVES = Candidates(np.arange(0, ITEMS, 2), np.full(ITEMS // 2, -0.7, dtype=np.float32))


def batch_of(seed: int, layout: Layout = "grid", padded: bool = False, more_candidates: int = 3) -> PackedBatch:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 11, USERS - seed)
    histories = Histories(
        users=np.arange(lengths.size),
        items=rng.integers(0, ITEMS, lengths.sum()),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
    )
    batch, _ = pack_histories(
        histories,
        row_length=10,
        capacity=Capacity(USERS, ITEMS),
        predict=True,
        draw=lambda targets: NEGATIVES,
        layout=layout,
        pad=FixedShape(TOKENS, USERS, ITEMS // 2 + more_candidates) if padded else None,
    )
    return batch


def step(batch: PackedBatch, compute: Compute, loss: str = "sampled", **model: Any) -> list[torch.Tensor]:
    """Loss and gradients of a training step from fixed initial values."""
    torch.manual_seed(0)
    options = {"dropout": 0.0, "attention_dropout": 0.0, "user_dropout": 0.0, **model}
    dense = Dense(Model(dim=DIM, layers=2, max_len=10, **options), Loss(candidates=loss)).train()  # type: ignore
    dense.set_compute(compute)
    users, items = torch.randn(USERS, DIM).requires_grad_(), torch.randn(ITEMS, DIM).requires_grad_()
    value, _ = dense(users, items, items, batch)
    leaves = [users, items, *(p for p in dense.parameters() if p.requires_grad)]
    return [value.detach(), *torch.autograd.grad(value, leaves, allow_unused=True)]


def assert_same(
    ours: list[torch.Tensor], reference: list[torch.Tensor], rtol: float = 1e-4, atol: float = 1e-5
) -> None:
    for mine, theirs in zip(ours, reference, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("loss", ["sampled", "bce"])
@pytest.mark.parametrize("padded", [False, True])
def test_sequences_end_to_end_train_as_on_the_grid(padded, loss):
    # Of the candidates of bce every target takes some by number; their count is fixed, so they are never padded.
    batch = batch_of(1, "row", padded, more_candidates=3 * (loss != "bce"))
    assert_same(step(batch, Compute(), loss), step(batch_of(1), Compute(), loss))


@pytest.mark.parametrize("layout", ["grid", "row"])
def test_bfloat16_products_round_and_nothing_else(layout):
    ours, reference = step(batch_of(1, layout), Compute(torch.bfloat16)), step(batch_of(1), Compute())
    for mine, theirs in zip(ours, reference, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() <= 0.05 * theirs.norm() + 1e-3
        assert not torch.equal(mine, theirs)


def test_evaluation_is_in_float32_whatever_training_is():
    dense = Dense(Model(dim=DIM, max_len=10), Loss()).eval()
    users, items = torch.randn(USERS, DIM), torch.randn(ITEMS, DIM)
    plain = dense(users, items, items, batch_of(1))
    dense.set_compute(Compute(torch.bfloat16, compile=True))
    other = dense(users, items, items, batch_of(1))
    assert torch.equal(plain[0], other[0]) and torch.equal(plain[1][1], other[1][1])


def test_compiled_steps_are_the_same_and_padded_batches_compile_once(monkeypatch):
    counter: Any = CompileCounterWithBackend("aot_eager")
    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_with(function, backend=counter, fullgraph=True))
    torch._dynamo.reset()
    for seed in (1, 2, 3):
        batch = batch_of(seed, "row", padded=True)
        assert_same(step(batch, Compute(compile=True)), step(batch, Compute()))
    assert counter.frame_count == 1


def test_compiled_dropout_depends_on_the_seed_alone(monkeypatch):
    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_with(function, backend="aot_eager"))
    torch._dynamo.reset()
    batch = batch_of(1)
    once, again = (step(batch, Compute(compile=True), dropout=0.3, attention_dropout=0.3) for _ in range(2))
    for first, second in zip(once, again, strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(once[0], step(batch, Compute())[0])
