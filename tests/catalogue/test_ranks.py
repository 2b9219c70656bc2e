"""Ranks against a plain loop over Python numbers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recgpt_torchrec.catalogue.ranks import RankCounter, both_ranks, in_history, ranks_of
from recgpt_torchrec.data.ragged import Ragged


def plain_rank(scores: list[float], target: int, history: list[int]) -> float:
    """The definition, item by item."""
    if target in history:
        return math.inf
    higher = equal = 0
    for item, score in enumerate(scores):
        if item == target or item in history:
            continue
        higher += score > scores[target]
        equal += score == scores[target]
    return higher + equal / 2


@st.composite
def cases(draw: st.DrawFn):
    """Scores from few values, so that most of them tie; histories with repeats, sometimes with the target inside."""
    items = draw(st.integers(1, 8))
    users = draw(st.integers(0, 4))
    score = st.sampled_from([-1.0, 0.0, 0.5, 2.0])
    item = st.integers(0, items - 1)
    scores = draw(st.lists(st.lists(score, min_size=items, max_size=items), min_size=users, max_size=users))
    targets = draw(st.lists(item, min_size=users, max_size=users))
    histories = draw(st.lists(st.lists(item, max_size=5), min_size=users, max_size=users))
    return torch.tensor(scores).reshape(users, items), torch.tensor(targets, dtype=torch.int64), histories


def equal(some: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, other, strict=True))


def no_history(users: int) -> Ragged:
    return Ragged.from_lists([[] for _ in range(users)])


def unmasked_ranks(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    masked, unmasked = both_ranks(scores, targets, no_history(len(targets)))
    assert torch.equal(masked, unmasked)  # no history, nothing to mask
    return unmasked


@given(cases())
def test_ranks_agree_with_a_plain_loop_ties_and_masks_included(case):
    scores, targets, histories = case
    before = scores.clone()
    for got, masked in zip(both_ranks(scores, targets, Ragged.from_lists(histories)), (True, False), strict=True):
        expected = [
            plain_rank(row.tolist(), int(target), history if masked else [])
            for row, target, history in zip(scores, targets, histories, strict=True)
        ]
        assert got.dtype == torch.float32
        assert got.tolist() == expected
    assert torch.equal(scores, before)


@given(cases(), st.sampled_from([-30.0, -1.5, -1.0, 0.0, 0.5, 1.0, 3.0]), st.integers(1, 9))
def test_with_a_bias_unmasked_ranks_are_those_of_the_biased_scores_and_masked_ones_stay(case, bias, block):
    scores, targets, histories = case
    history, biased = Ragged.from_lists(histories), scores.clone()
    for row, items in enumerate(histories):
        biased[row, sorted(set(items))] += bias  # each item once, however often it is in the history
    own = biased.gather(1, targets[:, None])[:, 0]
    counter = RankCounter(targets, own, history, torch.full((len(targets),), bias))
    for first in range(0, scores.shape[1], block):
        counter.update(scores[:, first : first + block], first)
    masked, unmasked = ranks_of(counter.counts)
    assert torch.equal(masked, both_ranks(scores, targets, history)[0])
    assert unmasked.tolist() == [
        plain_rank(row.tolist(), int(target), []) for row, target in zip(biased, targets, strict=True)
    ]
    assert in_history(targets, history).tolist() == [
        int(target) in items for target, items in zip(targets, histories, strict=True)
    ]


@given(cases(), st.integers(1, 3))
def test_blocks_of_items_in_any_order_give_the_ranks_of_the_whole_matrix(case, block):
    scores, targets, histories = case
    history = Ragged.from_lists(histories)
    counter = RankCounter(targets, scores.gather(1, targets[:, None])[:, 0], history)
    for first in reversed(range(0, scores.shape[1], block)):
        counter.update(scores[:, first : first + block], first)
    assert equal(ranks_of(counter.counts), both_ranks(scores, targets, history))


@given(cases(), st.randoms(use_true_random=False))
def test_ranks_do_not_change_under_a_permutation_of_item_ids(case, random):
    scores, targets, histories = case
    new_id = list(range(scores.shape[1]))
    random.shuffle(new_id)
    moved = torch.empty_like(scores)
    moved[:, new_id] = scores
    renamed = torch.tensor([new_id[t] for t in targets.tolist()], dtype=torch.int64)
    after = both_ranks(moved, renamed, Ragged.from_lists([[new_id[i] for i in items] for items in histories]))
    assert equal(after, both_ranks(scores, targets, Ragged.from_lists(histories)))


@given(cases())
def test_ranks_do_not_change_under_a_monotone_transform_of_the_scores(case):
    scores, targets, histories = case
    history = Ragged.from_lists(histories)
    expected = both_ranks(scores, targets, history)
    assert equal(both_ranks(scores * 3 + 7, targets, history), expected)
    assert equal(both_ranks(scores.exp(), targets, history), expected)


def test_equal_scores_everywhere_rank_in_the_middle_whatever_the_id():
    scores = torch.zeros(3, 5)
    assert unmasked_ranks(scores, torch.tensor([0, 2, 4])).tolist() == [2.0, 2.0, 2.0]


def test_a_catalogue_of_one_item_ranks_it_first():
    assert unmasked_ranks(torch.tensor([[3.0]]), torch.tensor([0])).tolist() == [0.0]


def test_a_score_of_minus_infinity_is_not_retrieved_and_plus_infinity_ranks_first():
    scores = torch.tensor([[-math.inf, 0.0, math.inf], [-math.inf, 0.0, math.inf]])
    assert unmasked_ranks(scores, torch.tensor([0, 2])).tolist() == [math.inf, 0.0]


@pytest.mark.parametrize("where", [(0, 0), (1, 2)])
def test_nan_scores_raise(where):
    scores = torch.zeros(2, 3)
    scores[where] = math.nan
    with pytest.raises(ValueError, match="1 of 2 users are NaN"):
        both_ranks(scores, torch.tensor([0, 0]), no_history(2))


def test_a_history_outside_the_offsets_it_comes_with_raises():
    with pytest.raises(ValueError, match="offsets do not fit"):
        both_ranks(torch.zeros(1, 3), torch.tensor([0]), Ragged(np.array([1, 2]), np.array([0, 1])))


def test_half_precision_scores_are_refused():
    with pytest.raises(ValueError, match="bfloat16"):
        both_ranks(torch.zeros(1, 3, dtype=torch.bfloat16), torch.tensor([0]), no_history(1))


def test_targets_outside_the_catalogue_raise():
    with pytest.raises(ValueError, match="the scores have 3 items"):
        both_ranks(torch.zeros(1, 3), torch.tensor([3]), no_history(1))
