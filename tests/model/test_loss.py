"""The losses against torch's own cross-entropy and against plain loops."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from recgpt_torchrec.config import Loss, Model
from recgpt_torchrec.model.dense import Dense
from recgpt_torchrec.model.losses import shared_loss
from recgpt_torchrec.model.losses.loss import bce_loss, softmax_loss


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradients(value: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, leaves, retain_graph=True))


def sampled_by_loop(h: Tensor, positive: Tensor, candidates: Tensor, log_q: Tensor, own: Tensor) -> Tensor:
    """The module docstring's formula, one position and one candidate at a time, differentiated by autograd."""
    total = h.new_zeros(())
    for p in range(len(h)):
        s = h[p].dot(positive[p])
        partition = s.exp()
        for c in range(len(candidates)):
            if c != int(own[p]):
                partition = partition + (h[p].dot(candidates[c]) - log_q[c]).exp()
        total = total + partition.log() - s
    return total


@pytest.mark.parametrize("positions", [1, 7, shared_loss.CHUNK, shared_loss.CHUNK + 1, 2 * shared_loss.CHUNK + 3])
def test_the_whole_catalogue_is_torchs_cross_entropy_in_value_and_gradients(positions):
    h, catalogue = vectors(positions, 8), vectors(30, 8, seed=1)
    targets = torch.randint(30, (positions,), generator=torch.Generator().manual_seed(2))
    ours = softmax_loss(h, catalogue[targets], catalogue, torch.zeros(30), targets)
    reference = F.cross_entropy(h @ catalogue.t(), targets, reduction="sum")
    torch.testing.assert_close(ours, reference)
    for mine, theirs in zip(gradients(ours * 0.5, h, catalogue), gradients(reference * 0.5, h, catalogue), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("candidates", [1, 6])
def test_the_sampled_loss_is_the_formula_with_and_without_the_own_target_among_the_candidates(candidates):
    h, positive, drawn = vectors(5, 4), vectors(5, 4, seed=1), vectors(candidates, 4, seed=2)
    log_q = -torch.rand(candidates, generator=torch.Generator().manual_seed(3)) * 3
    own = torch.tensor([-1, 0, candidates - 1, -1, 0])
    ours, reference = (f(h, positive, drawn, log_q, own) for f in (softmax_loss, sampled_by_loop))
    torch.testing.assert_close(ours, reference)
    leaves = (h, positive, drawn)
    for mine, theirs in zip(gradients(ours, *leaves), gradients(reference, *leaves), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_soft_targets_are_torchs_cross_entropy_with_probabilities():
    """A batch whose targets share their place with answers, through the model's own sum of losses."""
    h, catalogue = vectors(5, 8), vectors(12, 8, seed=1)
    targets, answers = torch.tensor([3, 0, 5, 11, 7]), torch.tensor([[1, 2], [3, 4], [6, 7], [5, 5], [8, 9]])
    weights = torch.tensor([[0.2, 0.1], [0.3, 0.0], [0.0, 0.0], [0.15, 0.15], [0.25, 0.05]])
    batch: Any = SimpleNamespace(
        target_bag=targets,
        candidate_bag=torch.arange(12),
        candidate_log_q=torch.zeros(12),
        candidates_first=False,
        target_candidate=targets,
        target_weight=None,
        soft_bag=answers,
        soft_weight=weights,
    )
    dense = Dense(Model(dim=8), Loss(candidates="all"))
    ours = dense.sum_of_losses(h, catalogue, batch)
    probabilities = F.one_hot(targets, 12) * (1 - weights.sum(1, keepdim=True))
    probabilities = probabilities.scatter_add(1, answers, weights)
    reference = F.cross_entropy(h @ catalogue.t(), probabilities, reduction="sum")
    torch.testing.assert_close(ours, reference)
    for mine, theirs in zip(gradients(ours, h, catalogue), gradients(reference, h, catalogue), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_the_loss_times_a_factor_has_the_factor():
    h, positive, drawn = vectors(5, 4), vectors(5, 4, seed=1), vectors(6, 4, seed=2)
    value = softmax_loss(h, positive, drawn, torch.zeros(6), torch.full((5,), -1))
    for once, thrice in zip(gradients(value, h, drawn), gradients(value * 3, h, drawn), strict=True):
        torch.testing.assert_close(once * 3, thrice)


def test_large_scores_neither_overflow_nor_vanish():
    h = torch.tensor([[200.0, 0.0], [0.0, -200.0]], requires_grad=True)
    catalogue = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.3, 1.0]], requires_grad=True)
    targets = torch.tensor([1, 2])
    ours = softmax_loss(h, catalogue[targets], catalogue, torch.zeros(3), targets)
    reference = F.cross_entropy(h @ catalogue.t(), targets, reduction="sum")
    torch.testing.assert_close(ours, reference)
    for mine, theirs in zip(gradients(ours, h, catalogue), gradients(reference, h, catalogue), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_no_targets_give_zero_loss_and_zero_gradients():
    h, positive, drawn = vectors(0, 4), vectors(0, 4), vectors(6, 4)
    own = torch.zeros(0, dtype=torch.int64)
    for value in (softmax_loss(h, positive, drawn, torch.zeros(6), own), bce_loss(h, positive, drawn, own, 2)):
        assert value == 0
        for gradient in gradients(value, h, positive, drawn):
            assert not gradient.any()


def test_a_target_without_other_candidates_has_zero_loss():
    h, positive = vectors(3, 4), vectors(1, 4, seed=1)
    value = softmax_loss(h, positive.expand(3, 4), positive, torch.zeros(1), torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(value, torch.tensor(0.0))
    loss = softmax_loss(h, positive.expand(3, 4), positive[:0], torch.zeros(0), torch.full((3,), -1))
    torch.testing.assert_close(loss, torch.tensor(0.0))


def test_log_q_makes_the_sampled_partition_function_unbiased():
    items, count, draws = 40, 10, 1500
    h, catalogue = vectors(1, 4).detach() / 2, vectors(items, 4, seed=1).detach() / 2
    target = torch.tensor([3])
    scores = (h @ catalogue.t())[0]
    generator = torch.Generator().manual_seed(0)
    partitions = []
    for _ in range(draws):
        ids = torch.randperm(items, generator=generator)[:count]
        own = (ids == target).nonzero().flatten()
        log_q = torch.full((count,), math.log(count / items))
        own = own if own.numel() else torch.tensor([-1])
        value = softmax_loss(h, catalogue[target], catalogue[ids], log_q, own)
        partitions.append(float((value + scores[target]).exp()))
    full = float(scores.exp().sum())
    spread = torch.tensor(partitions).std().item() / math.sqrt(draws)
    assert abs(sum(partitions) / draws - full) < 4 * spread < 0.1 * full


@pytest.mark.parametrize(("candidates", "negatives"), [(7, 1), (7, 3), (2, 5), (30, 2), (0, 2)])
def test_bce_is_the_plain_loop(candidates, negatives):
    h, positive, drawn = vectors(5, 4), vectors(5, 4, seed=1), vectors(candidates, 4, seed=2)
    own = torch.tensor([-1, 0, 1, -1, 1]).clamp(max=candidates - 1)  # -1 where there are none
    expected = (drawn * 0).sum()
    for p in range(5):
        expected = expected - torch.sigmoid(h[p].dot(positive[p])).log()
        for n in range(negatives if candidates else 0):
            c = (p * negatives + n) % candidates
            if c != own[p]:
                expected = expected - (1 - torch.sigmoid(h[p].dot(drawn[c]))).log()
    ours = bce_loss(h, positive, drawn, own, negatives)
    torch.testing.assert_close(ours, expected)
    leaves = (h, positive, drawn)
    for mine, theirs in zip(gradients(ours, *leaves), gradients(expected, *leaves), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
