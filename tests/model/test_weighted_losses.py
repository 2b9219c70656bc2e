"""Weights of targets multiply their losses, in every loss: values and gradients against a plain loop."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recgpt_torchrec.config import Loss, Model
from recgpt_torchrec.data.candidates import Candidates
from recgpt_torchrec.data.histories import Histories
from recgpt_torchrec.data.packed import Capacity, FixedShape, pack_histories
from recgpt_torchrec.data.targets import SoftShares
from recgpt_torchrec.model.dense import Dense
from recgpt_torchrec.model.losses import loss as losses

TARGETS, CANDIDATES, DIM = 7, 11, 8
WEIGHTS = torch.tensor([1.0, 0.25, 5.0, 0.0, 0.5, 3.0, 1.0])


def problem() -> tuple[Tensor, Tensor, Any]:
    """Outputs [targets, dim], vectors [items, dim], and what a batch says of them."""
    generator = torch.Generator().manual_seed(0)
    h, vectors = (torch.randn(n, DIM, generator=generator).requires_grad_() for n in (TARGETS, 2 * CANDIDATES))
    targets = torch.randint(2 * CANDIDATES, (TARGETS,), generator=generator)
    drawn = torch.randperm(2 * CANDIDATES, generator=generator)[:CANDIDATES]
    places = {int(item): place for place, item in enumerate(drawn)}
    answers = torch.randint(2 * CANDIDATES, (TARGETS, 2), generator=generator)
    batch = SimpleNamespace(
        target_bag=targets,
        candidate_bag=drawn,
        candidate_log_q=-torch.rand(CANDIDATES, generator=generator),
        candidates_first=False,
        target_candidate=torch.tensor([places.get(int(target), -1) for target in targets]),
        target_weight=WEIGHTS,
        soft_bag=answers,
        soft_weight=torch.zeros(TARGETS, 0),
    )
    return h, vectors, batch


def loop(h: Tensor, vectors: Tensor, batch: Any, kind: str) -> Tensor:
    """The weighted sum of losses, one target and one candidate at a time."""
    total = h.new_zeros(())
    for t in range(TARGETS):
        own = int(batch.target_candidate[t])
        score = h[t].dot(vectors[batch.target_bag[t]])
        if kind == "bce":
            negative = [c % CANDIDATES for c in range(3 * t, 3 * t + 3)]
            value = -score.sigmoid().log()
            for c in negative:
                if c != own:
                    value = value - (-h[t].dot(vectors[batch.candidate_bag[c]])).sigmoid().log()
        else:
            partition = score.exp()
            for c in range(CANDIDATES):
                if c != own:
                    partition = partition + (h[t].dot(vectors[batch.candidate_bag[c]]) - batch.candidate_log_q[c]).exp()
            value = partition.log() - score
        total = total + WEIGHTS[t] * value
    return total


@pytest.mark.parametrize("way", ["one pass", "blocks", "bce"])
def test_every_loss_is_the_weighted_sum_of_a_plain_loop(way, monkeypatch):
    h, vectors, batch = problem()
    kind: Any = "bce" if way == "bce" else "sampled"
    dense = Dense(Model(dim=DIM), Loss(candidates=kind, bce_negatives=3))
    monkeypatch.setattr(losses, "rows_at_once", lambda *_: 0 if way == "blocks" else 3)
    ours, reference = dense.sum_of_losses(h, vectors, batch), loop(h, vectors, batch, kind)
    torch.testing.assert_close(ours, reference)
    pairs = zip(*(torch.autograd.grad(each, (h, vectors)) for each in (ours, reference)), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    batch.target_weight = None
    assert abs(float((dense.sum_of_losses(h, vectors, batch) - reference).detach())) > 0.5, "weights make a difference"


def pack(weights: np.ndarray | None, pad: bool) -> Any:
    """One history of five entries with two answers each, packed with soft targets."""
    rng = np.random.default_rng(0)
    histories = Histories(
        users=np.array([0]),
        items=np.array([3, 1, 4, 0, 5]),
        offsets=np.array([0, 5]),
        answers=rng.integers(6, 9, (5, 2)),
        answer_scores=rng.standard_normal((5, 2)).astype(np.float32),
        weights=weights,
    )
    packed, ids = pack_histories(
        histories,
        row_length=8,
        capacity=Capacity(4, 40),
        predict=True,
        soft_shares=SoftShares(0.4),
        draw=lambda _: Candidates(np.arange(9), np.zeros(9, np.float32)),
        layout="row" if pad else "grid",
        pad=FixedShape(8, 4, 12) if pad else None,
    )
    return packed, ids, histories


@pytest.mark.parametrize("pad", [False, True])
def test_a_weight_multiplies_target_and_answers_alike(pad):
    """The loss of a packed batch with soft targets, against cross-entropy with probabilities in a loop."""
    weights = np.array([9, 2, 0, 0.5, 1], np.float32)
    packed, ids, histories = pack(weights, pad)
    assert packed.targets == 3 and float(packed.global_targets) == 3.5
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(9, DIM, generator=generator)
    rows = torch.zeros(max(40, len(ids.items)), DIM)
    rows[: len(ids.items)] = table[torch.from_numpy(ids.items)]
    h = torch.randn(len(packed.target_slot), DIM, generator=generator)
    ours = Dense(Model(dim=DIM), Loss(candidates="all")).sum_of_losses(h, rows, packed)
    total = 0.0
    for index, entry in enumerate([1, 3, 4]):
        log_p = (table @ h[index]).log_softmax(0)
        scores = np.exp(histories.answer_scores[entry - 1] - histories.answer_scores[entry - 1].max())
        shares = 0.4 * scores / scores.sum()
        value = 0.6 * -log_p[histories.items[entry]]
        for answer, share in zip(histories.answers[entry - 1], shares, strict=True):
            value = value - share * log_p[answer]
        total += float(weights[entry]) * float(value)
    assert float(ours) == pytest.approx(total, rel=1e-5)


def test_weights_of_one_change_no_bit():
    dense = Dense(Model(dim=DIM), Loss(candidates="all")).eval()
    vectors = torch.randn(40, DIM, generator=torch.Generator().manual_seed(0))
    batches = [pack(weights, False)[0] for weights in (None, np.ones(5, np.float32))]
    values = [dense(vectors[:4], vectors, vectors, batch)[0] for batch in batches]
    assert torch.equal(*values) and math.isfinite(float(values[0].detach()))
