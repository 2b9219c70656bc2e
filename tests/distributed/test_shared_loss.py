"""The loss over the candidates of all ranks equals dense softmax losses in one process, in values and gradients."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from recgpt_torchrec.catalogue.softmax import SharedSoftmax
from recgpt_torchrec.config import Loss
from recgpt_torchrec.data.candidates import SOURCES, Candidates, ItemStatistics, Place
from recgpt_torchrec.data.packed import LAST_ID
from recgpt_torchrec.model.losses import shared_loss
from tools.ranks import run_ranks

ITEMS, DIM, SCALE = 37, 8, 0.25
COUNTS = np.arange(1, ITEMS + 1)
TOKENS = 24
"""Of all ranks."""
WAYS = {"kept": {}, "padded": {}, "blocks": {"LOGITS": {"cpu": 0}, "BLOCK": {"cpu": 5 * 3 * 4}, "CHUNK": 3}}
"""How logits are held: all of them, or in blocks of 3 targets and 5 candidates, computed twice. padded: all, in batches
that are filled up to fixed sizes."""


def targets_of(rank: int, world_size: int) -> list[int]:
    """Indices of the targets on a rank; the last of several ranks has none."""
    if world_size == 1:
        return list(range(TOKENS - 3))
    return [n for n in range(TOKENS - 3) if (n * n % 7) % (world_size - 1) == rank]


def problem(large: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs [targets, dim], vectors [items, dim], targets [targets], weights [targets] of the whole batch."""
    rng = np.random.default_rng(3)
    h = torch.from_numpy(rng.standard_normal((TOKENS - 3, DIM), np.float32)) * (40 if large else 1)
    vectors = torch.from_numpy(rng.standard_normal((ITEMS, DIM), np.float32))
    targets = torch.from_numpy(rng.integers(0, ITEMS, TOKENS - 3))
    weights = torch.from_numpy(rng.uniform(0, 2, TOKENS - 3).astype(np.float32))
    return h, vectors, targets, weights


def draw(loss: Loss, targets: Tensor, place: Place) -> Candidates:
    """A rank's candidates."""
    source = SOURCES[loss.candidates].make(loss, ItemStatistics(ITEMS, lambda: COUNTS), TOKENS // place.ranks, place)
    return source.draw(targets.numpy(), np.random.default_rng((11, *source.seed)))


def compute(rank: int, world_size: int, loss: Loss, way: str, large: bool, dtype: torch.dtype) -> tuple[Any, ...]:
    """This rank's loss, and the gradients of its outputs and of all vectors."""
    for name, value in WAYS[way].items():
        setattr(shared_loss, name, value)
    h, vectors, targets, weights = problem(large)
    mine = targets_of(rank, world_size)
    own_h, own_targets, own_weights = h[mine].requires_grad_(), targets[mine], weights[mine]
    vectors.requires_grad_()
    candidates = draw(loss, own_targets, Place(rank, world_size))
    ids, log_q = torch.from_numpy(candidates.ids), torch.from_numpy(candidates.log_q)
    all_h, target_item, candidate_item, bags = own_h, own_targets, ids, ids
    if way == "padded":  # as in a packed batch: padding is bag 0
        missing, few = TOKENS - len(mine), 4
        all_h = torch.cat([own_h, own_h.new_ones(missing, DIM)])
        own_targets = torch.cat([own_targets, own_targets.new_zeros(missing)])
        target_item = torch.cat([target_item, target_item.new_full((missing,), -1)])
        own_weights = torch.cat([own_weights, own_weights.new_zeros(missing)])
        bags = torch.cat([ids, ids.new_zeros(few)])
        candidate_item = torch.cat([ids, ids.new_full((few,), LAST_ID)])
        log_q = torch.cat([log_q, log_q.new_full((few,), torch.inf)])
    batch: Any = SimpleNamespace(
        target_item=target_item,
        candidate_item=candidate_item,
        candidate_log_q=log_q,
        most_targets=max(len(targets_of(rank, world_size)) for rank in range(world_size)),
        target_weight=own_weights,
    )
    softmax = SharedSoftmax(each_once=loss.candidates == "in_batch")
    value = softmax(all_h, vectors[own_targets], vectors[bags], batch, dtype) * SCALE
    value.backward()
    assert own_h.grad is not None and vectors.grad is not None
    return float(value), own_h.grad, vectors.grad, candidates


def dense(loss: Loss, large: bool, all_candidates: list[Candidates]) -> tuple[Tensor, Tensor, Tensor]:
    """The losses [targets] of the whole batch in one process, by torch; gradients of outputs and of vectors."""
    h, vectors, targets, weights = problem(large)
    h.requires_grad_(), vectors.requires_grad_()
    if loss.candidates == "all":
        losses = F.cross_entropy(h @ vectors.t(), targets, reduction="none")
    else:
        logits = []
        for target, output in zip(targets.tolist(), h, strict=True):
            scores, seen = [output @ vectors[target]], set()
            for candidates in all_candidates:
                for item, log_q in zip(candidates.ids.tolist(), candidates.log_q.tolist(), strict=True):
                    if item != target and not (loss.candidates == "in_batch" and item in seen):
                        scores.append(output @ vectors[item] - log_q)
                    seen.add(item)
            logits.append(torch.stack(scores))
        losses = torch.stack([each.logsumexp(0) - each[0] for each in logits])
    losses = losses * weights * SCALE
    losses.sum().backward()
    assert h.grad is not None and vectors.grad is not None
    return losses.detach(), h.grad, vectors.grad


ALL, IN_BATCH = Loss(candidates="all"), Loss(candidates="in_batch")
DIFFERENT = Loss(negatives=9, negatives_by="log_uniform", negatives_across_ranks="different")
CASES = [
    (loss, way, large, dtype)
    for loss in (ALL, IN_BATCH, DIFFERENT)
    for way in WAYS
    for large in (False, True)
    for dtype in (torch.float32, torch.bfloat16)
    if dtype == torch.float32 or not large
]


def compute_cases(rank: int, world_size: int) -> list[tuple[Any, ...]]:
    before = {name: getattr(shared_loss, name) for name in WAYS["blocks"]}
    results = []
    for case in CASES:
        results.append(compute(rank, world_size, *case) if crosses(case[0], world_size) else ())
        for name, value in before.items():
            setattr(shared_loss, name, value)
    return results


def crosses(loss: Loss, world_size: int) -> bool:
    """Whether sources share their candidates; on one rank that of the whole catalogue does not, but can be."""
    return loss.crosses_ranks(world_size) or loss is ALL


@pytest.fixture(scope="module")
def computed() -> dict[int, list[Any]]:
    return {world: run_ranks(compute_cases, world) for world in (1, 2, 4)}


@pytest.mark.parametrize(
    ("world_size", "number"),
    [(world, n) for world in (1, 2, 4) for n, case in enumerate(CASES) if crosses(case[0], world)],
)
def test_values_and_gradients_are_those_of_the_dense_loss(computed, number, world_size):
    loss, _, large, dtype = CASES[number]
    by_rank = [results[number] for results in computed[world_size]]
    losses, grad_h, grad_vectors = dense(loss, large, [result[3] for result in by_rank])
    tolerance: Any = {"rtol": 1e-4, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.03}
    for rank, (value, own_h, *_) in enumerate(by_rank):
        mine = targets_of(rank, world_size)
        torch.testing.assert_close(torch.tensor(value), losses[mine].sum(), **tolerance)
        torch.testing.assert_close(own_h, grad_h[mine], **tolerance)
    total = sum(result[2] for result in by_rank)
    if large:  # outputs 40 times as large
        tolerance["atol"] *= 40
    torch.testing.assert_close(total, grad_vectors, **tolerance)
    assert grad_vectors.abs().max() > 0.1


def test_the_ranks_of_all_have_equal_parts_and_of_different_other_negatives(computed):
    ids = [[result[3].ids.tolist() for result in results] for results in computed[2]]
    everything, in_batch, different = (
        next(n for n, case in enumerate(CASES) if case[0] is loss) for loss in (ALL, IN_BATCH, DIFFERENT)
    )
    assert ids[0][everything] + ids[1][everything] == list(range(ITEMS))
    assert [len(rank[different]) for rank in ids] == [9, 9] and ids[0][different] != ids[1][different]
    assert ids[1][in_batch] == []  # its rank has no targets


def test_in_batch_log_q_counts_the_tokens_of_all_ranks(computed):
    (number,) = [n for n, case in enumerate(CASES) if case[0] is IN_BATCH][:1]
    candidates: Candidates = computed[2][0][number][3]
    p = COUNTS[candidates.ids] / COUNTS.sum()
    np.testing.assert_allclose(np.exp(candidates.log_q), 1 - (1 - p) ** TOKENS, rtol=1e-5)
