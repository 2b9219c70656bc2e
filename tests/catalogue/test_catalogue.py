"""Exact top-k and ranks among all items, against plain sorting: small whole numbers, so scores are exact and tie."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recgpt_torchrec.catalogue import catalogue as catalogue_module
from recgpt_torchrec.catalogue.catalogue import FEW, Best, Catalogue, best_items, mask_seen
from recgpt_torchrec.catalogue.ranks import both_ranks
from recgpt_torchrec.data.ragged import Ragged


def plain(scores: list[float], left_out: list[int], k: int) -> tuple[list[int], list[float]]:
    """The definition: sorted by score, of equal ones the smaller id first; filled up with -1 and -inf."""
    left = sorted((-score, item) for item, score in enumerate(scores) if item not in left_out)[:k]
    short = k - len(left)
    return [item for _, item in left] + [-1] * short, [-score for score, _ in left] + [-np.inf] * short


def same(found: Best, expected: list[tuple[list[int], list[float]]]) -> bool:
    return found.items.tolist() == [items for items, _ in expected] and found.scores.tolist() == [
        scores for _, scores in expected
    ]


@st.composite
def cases(draw: st.DrawFn):
    """Vectors, queries, seen and forbidden items; scores from few values, so that most of them tie."""
    items, rows, dim = draw(st.integers(1, 3 * FEW)), draw(st.integers(0, 9)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    vectors, queries = (torch.from_numpy(rng.integers(-1, 2, (n, dim)).astype(np.float32)) for n in (items, rows))
    seen = forbidden = None
    if draw(st.booleans()):
        most = draw(st.sampled_from([3, 2 * items]))
        seen = [rng.integers(0, items, rng.integers(0, most + 1)).tolist() for _ in range(rows)]
    if draw(st.booleans()):
        forbidden = torch.from_numpy(rng.integers(0, items, (rows, draw(st.integers(0, 2 * items)))))
    return vectors, queries, seen, forbidden


K = st.one_of(st.integers(1, FEW), st.sampled_from([FEW, FEW + 1]), st.integers(FEW + 1, 4 * FEW))
"""Below and above what is found by a pass each, and more than there are items."""


@given(cases(), K, st.integers(1, 100))
def test_top_k_is_a_plain_sort_however_many_rows_are_scored_at_once(case, k, held):
    vectors, queries, seen, forbidden = case
    scores = (queries @ vectors.t()).tolist()
    left_out: list[list[int]] = seen if seen is not None else [[] for _ in scores]
    if forbidden is not None:
        left_out = [row + more for row, more in zip(left_out, forbidden.tolist(), strict=True)]
    expected = [plain(row, gone, k) for row, gone in zip(scores, left_out, strict=True)]
    before = vectors.clone(), queries.clone()
    history = None if seen is None else Ragged.from_lists(seen)
    assert same(Catalogue(vectors).top_k(queries, k, history, forbidden), expected)
    with mock.patch.multiple(catalogue_module, SCORES={"cpu": held}, FEWEST_ROWS=1):
        found = Catalogue(vectors).top_k(queries, k, history, forbidden)
    assert same(found, expected)
    assert found.items.shape == found.scores.shape == (len(queries), k)
    assert found.items.dtype == torch.int64 and found.scores.dtype == torch.float32
    assert torch.equal(vectors, before[0]) and torch.equal(queries, before[1])


@given(cases(), K)
def test_the_best_of_scores_some_of_which_are_left_out_are_a_plain_sort(case, k):
    vectors, queries, seen, _ = case
    scores = queries @ vectors.t()
    expected = [plain(row, gone, k) for row, gone in zip(scores.tolist(), seen or [[]] * len(scores), strict=True)]
    if seen is not None:
        mask_seen(scores, Ragged.from_lists(seen))
    assert same(best_items(scores, k), expected)


@given(cases(), st.integers(1, 100), st.randoms(use_true_random=False))
def test_ranks_are_those_of_the_whole_matrix_however_many_rows_are_scored_at_once(case, held, random):
    vectors, queries, seen, _ = case
    history = Ragged.from_lists([[]] * len(queries) if seen is None else seen)
    targets = torch.tensor([random.randrange(len(vectors)) for _ in queries], dtype=torch.int64)
    with mock.patch.multiple(catalogue_module, RANKED_SCORES=held, FEWEST_ROWS=1):
        masked, unmasked = Catalogue(vectors).ranks(queries, targets, history)
    expected = both_ranks(queries @ vectors.t(), targets, history)
    assert torch.equal(masked, expected[0]) and torch.equal(unmasked, expected[1])


@pytest.mark.parametrize("k", [1, 2, 3, FEW, FEW + 1])
def test_it_is_short_where_scores_run_out(k):
    scores = torch.tensor([[3.0, 1.0, 2.0]])
    mask_seen(scores, Ragged.from_lists([[0]]))
    items, values = best_items(scores, k)
    assert items.tolist() == [([2, 1] + [-1] * k)[:k]]
    assert values.tolist() == [([2.0, 1.0] + [-np.inf] * k)[:k]]


def test_of_equal_scores_the_smallest_id_is_answered():
    catalogue = Catalogue(torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]))
    outputs = torch.tensor([[1.0, 0.0]] * 2)
    assert catalogue.top_k(outputs, 1).items.tolist() == [[1], [1]]
    assert catalogue.top_k(outputs, 1, forbidden=torch.tensor([[1, 1], [2, 0]])).items.tolist() == [[2], [1]]
    items, scores = catalogue.top_k(outputs, 2, forbidden=torch.tensor([[0, 1, 2, 3], [1, 2, 3, 3]]))
    assert items.tolist() == [[-1, -1], [0, -1]]
    assert scores.tolist() == [[-np.inf, -np.inf], [0, -np.inf]]
    assert catalogue.top_k(outputs, 3, forbidden=torch.tensor([[1], [2]])).items.tolist() == [[2, 3, 0], [1, 3, 0]]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_the_shares_of_all_ranks_are_every_item_once_in_order(world_size):
    catalogue = Catalogue(torch.arange(10.0).reshape(5, 2))
    shares = [catalogue.share(rank, world_size) for rank in range(world_size)]
    assert np.concatenate([ids for ids, _ in shares]).tolist() == list(range(5))
    assert np.concatenate([vectors for _, vectors in shares]).tolist() == catalogue.vectors.tolist()
