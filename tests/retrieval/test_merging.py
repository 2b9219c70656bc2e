"""Merging the lists of several interests: by hand on tiny catalogues, and against plain loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recgpt_torchrec.retrieval.merging import Lists, even_quotas, merge_by_score, merge_quota


def lists_of(scores: list[list[list[float]]], depth: int) -> Lists:
    """The `depth` best items of each interest of each user, by plain sorting of [users][interests][items] scores."""
    users, interests = len(scores), len(scores[0])
    items = torch.full((users, interests, depth), -1)
    values = torch.full((users, interests, depth), -torch.inf)
    for u, rows in enumerate(scores):
        for i, row in enumerate(rows):
            for place, item in enumerate(sorted(range(len(row)), key=lambda item: -row[item])[:depth]):
                items[u, i, place], values[u, i, place] = item, row[item]
    return Lists(items, values)


# Five items; user 0's interests agree on item 3, user 1's do not agree at all.
FIRST = [[[1.0, 8.0, 2.0, 9.0, 0.0], [3.0, 7.0, 6.0, 8.5, 1.0]], [[9.0, 8.0, 7.0, 1.0, 0.0], [0.0, 1.0, 2.0, 8.0, 9.5]]]


@pytest.mark.parametrize(
    ("quotas", "items", "interests"),
    [
        ((2, 1), [[3, 1, 2], [0, 1, 4]], [[0, 0, 1], [0, 0, 1]]),
        ((1, 2), [[3, 1, 2], [0, 4, 3]], [[0, 1, 1], [0, 1, 1]]),
        ((3, 0), [[3, 1, 2], [0, 1, 2]], [[0, 0, 0], [0, 0, 0]]),
        ((0, 3), [[3, 1, 2], [4, 3, 2]], [[1, 1, 1], [1, 1, 1]]),
    ],
)
def test_two_steps_take_m_of_the_first_and_n_new_of_the_second(quotas, items, interests):
    merged = merge_quota(lists_of(FIRST, 3), quotas)
    assert merged.items.tolist() == items
    assert merged.interests.tolist() == interests
    for u, row in enumerate(items):
        assert merged.scores[u].tolist() == [FIRST[u][i][item] for item, i in zip(row, interests[u], strict=True)]


def test_by_score_each_item_comes_from_the_interest_that_has_it_likeliest():
    # Logs of the shares of user 0: items 3, 1, 2 have -.31, -1.31, -7.31 and -.27, -1.77, -2.77; of user 1: items
    # 0, 1, 2 have -.41, -1.41, -2.41, items 4, 3, 2 have -.20, -1.70, -7.70.
    merged = merge_by_score(lists_of(FIRST, 3), 3)
    assert merged.items.tolist() == [[3, 1, 2], [4, 0, 1]]
    assert merged.interests.tolist() == [[1, 0, 1], [1, 0, 0]]
    assert merged.scores.tolist() == [[8.5, 8.0, 6.0], [9.5, 9.0, 8.0]]


def test_an_interest_that_scores_everything_higher_does_not_win_by_that():
    higher = lists_of([[row, [score + 5 for score in other]] for row, other in FIRST], 3)
    for merged, same in zip(merge_by_score(higher, 3)[::2], merge_by_score(lists_of(FIRST, 3), 3)[::2], strict=True):
        assert torch.equal(merged, same)


def test_a_list_that_ran_out_is_made_up_for_by_the_best_of_the_others():
    lists = Lists(
        torch.tensor([[[3, -1, -1], [3, 1, 2]]]), torch.tensor([[[9.0, -torch.inf, -torch.inf], [8.0, 7.0, 6.0]]])
    )
    merged = merge_quota(lists, (2, 1))
    assert (merged.items.tolist(), merged.interests.tolist()) == ([[3, 1, 2]], [[0, 1, 1]])
    short = merge_quota(lists, (3, 3))
    assert short.items.tolist() == [[3, 1, 2, -1, -1, -1]]
    assert short.interests.tolist() == [[0, 1, 1, -1, -1, -1]]
    assert short.scores.tolist() == [[9.0, 7.0, 6.0] + [-torch.inf] * 3]


def test_quotas_are_dealt_evenly():
    assert [even_quotas(10, n) for n in (1, 2, 4, 6)] == [[10], [5, 5], [3, 3, 2, 2], [2, 2, 2, 2, 1, 1]]


@st.composite
def some_scores(draw):
    """Scores of a few users for a few items by several interests."""
    users, items, count = draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    return torch.randn(users, count, items, generator=generator).tolist(), items


@given(some_scores(), st.data())
def test_quotas_against_a_plain_loop(case, data):
    scores, items = case
    quotas = [data.draw(st.integers(0, 4)) for _ in scores[0]]
    length = sum(quotas)
    lists = lists_of(scores, max(1, length))
    found = merge_quota(lists, quotas)
    for u in range(len(scores)):
        merged: list[tuple[int, int]] = []
        for i, quota in enumerate(quotas):
            known = {item for item, _ in merged}
            merged += [(item, i) for item in lists.items[u, i].tolist() if item >= 0 and item not in known][:quota]
        assert len(merged) == min(length, items)  # lists as long as the merged one never run out
        merged += [(-1, -1)] * (length - len(merged))
        assert list(zip(found.items[u].tolist(), found.interests[u].tolist(), strict=True)) == merged


@given(some_scores(), st.integers(1, 9))
def test_by_score_against_a_plain_loop(case, length):
    scores, items = case
    found = merge_by_score(lists_of(scores, length), length)
    for u, rows in enumerate(scores):
        best: dict[int, tuple[float, int]] = {}
        for i, row in enumerate(rows):
            listed = sorted(range(items), key=lambda item: -row[item])[:length]
            total = sum(math.exp(row[item]) for item in listed)
            for item in listed:
                best[item] = max(best.get(item, (0.0, 0)), (math.exp(row[item]) / total, -i))
        expected = sorted(best, key=lambda item: best[item], reverse=True)[:length]
        filled = [-1] * (length - len(expected))
        assert found.items[u].tolist() == expected + filled
        assert found.interests[u].tolist() == [-best[item][1] for item in expected] + filled
        there = [rows[-best[item][1]][item] for item in expected]
        assert found.scores[u].tolist() == pytest.approx(there + [-torch.inf] * len(filled))
