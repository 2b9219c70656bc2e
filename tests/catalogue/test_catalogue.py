"""Exact top-k and ranks among all items, against plain sorting: small whole numbers, so scores are exact and tie."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recgpt_torchrec.catalogue import best as best_module
from recgpt_torchrec.catalogue import counting
from recgpt_torchrec.catalogue.best import FEW, Best, BestFinder, best_items
from recgpt_torchrec.catalogue.catalogue import Catalogue
from recgpt_torchrec.catalogue.pairs import Excluded, pairs_of
from recgpt_torchrec.catalogue.ranks import both_ranks
from recgpt_torchrec.catalogue.vectors import StreamedVectors
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


def streamed(vectors: torch.Tensor, rows: int) -> Catalogue:
    """A catalogue that looks `rows` vectors up at once, on one rank."""
    items, dim = vectors.shape
    source = StreamedVectors(lambda ids, room: vectors[torch.from_numpy(ids)], [(0, items)], 0, rows, vectors.device)
    return Catalogue(source, items, dim)


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


@given(cases(), K, st.integers(1, 100), st.integers(1, 12), st.integers(1, 40))
def test_top_k_is_a_plain_sort_however_tiles_are_cut_and_vectors_come(case, k, held, rows, block):
    vectors, queries, seen, forbidden = case
    scores = (queries @ vectors.t()).tolist()
    left_out: list[list[int]] = seen if seen is not None else [[] for _ in scores]
    if forbidden is not None:
        left_out = [row + more for row, more in zip(left_out, forbidden.tolist(), strict=True)]
    expected = [plain(row, gone, k) for row, gone in zip(scores, left_out, strict=True)]
    before = vectors.clone(), queries.clone()
    history = None if seen is None else Ragged.from_lists(seen)
    assert same(Catalogue.of_vectors(vectors).top_k(queries, k, history, forbidden), expected)
    with mock.patch.multiple(best_module, SCORES={"cpu": held}, ROWS=rows):
        found = Catalogue.of_vectors(vectors).top_k(queries, k, history, forbidden)
        assert same(streamed(vectors, block).top_k(queries, k, history, forbidden), expected)
    assert same(found, expected)
    assert found.items.shape == found.scores.shape == (len(queries), k)
    assert found.items.dtype == torch.int64 and found.scores.dtype == torch.float32
    assert torch.equal(vectors, before[0]) and torch.equal(queries, before[1])


@given(cases(), K, st.sampled_from([-30.0, -1.0, 1.0, 30.0]), st.integers(1, 100), st.integers(1, 12))
def test_items_with_a_bias_compete_with_it_each_once_however_tiles_are_cut(case, k, bias, held, rows):
    vectors, queries, seen, forbidden = case
    scores = queries @ vectors.t()
    weighed: list[list[int]] = seen if seen is not None else [[] for _ in scores]
    for row, items in enumerate(weighed):
        scores[row, sorted(set(items))] += bias
    left_out = [[]] * len(queries) if forbidden is None else forbidden.tolist()
    expected = [plain(row, gone, k) for row, gone in zip(scores.tolist(), left_out, strict=True)]
    asked = {"forbidden": forbidden, "weighed": Ragged.from_lists(weighed), "bias": bias}
    assert same(Catalogue.of_vectors(vectors).top_k(queries, k, **asked), expected)
    with mock.patch.multiple(best_module, SCORES={"cpu": held}, ROWS=rows):
        assert same(streamed(vectors, 1 + held % 40).top_k(queries, k, **asked), expected)


@given(cases(), K, st.integers(0, 2**32), st.integers(1, 100), st.integers(1, 12))
def test_items_compete_with_a_value_of_their_own_added_however_tiles_are_cut(case, k, seed, held, rows):
    """Some of them are left out as well: these stay out, whatever is added."""
    vectors, queries, seen, forbidden = case
    rng = np.random.default_rng(seed)
    scores = queries @ vectors.t()
    raised = [rng.permutation(len(vectors))[: rng.integers(0, 5)].tolist() for _ in scores]
    values = [rng.integers(-2, 3, len(row)).astype(np.float32) for row in raised]
    for row, (items, added) in enumerate(zip(raised, values, strict=True)):
        scores[row, items] += torch.from_numpy(added)
    left_out: list[list[int]] = seen if seen is not None else [[] for _ in scores]
    if forbidden is not None:
        left_out = [row + more for row, more in zip(left_out, forbidden.tolist(), strict=True)]
    expected = [plain(row, gone, k) for row, gone in zip(scores.tolist(), left_out, strict=True)]
    bias = np.concatenate([*values, np.zeros(0, np.float32)])
    asked = {"forbidden": forbidden, "weighed": Ragged.from_lists(raised), "bias": bias}
    history = None if seen is None else Ragged.from_lists(seen)
    assert same(Catalogue.of_vectors(vectors).top_k(queries, k, history, **asked), expected)
    with mock.patch.multiple(best_module, SCORES={"cpu": held}, ROWS=rows):
        assert same(Catalogue.of_vectors(vectors).top_k(queries, k, history, **asked), expected)
        assert same(streamed(vectors, 1 + held % 40).top_k(queries, k, history, **asked), expected)


@given(cases(), K, st.sampled_from([1, best_module.MANY]))
def test_the_best_of_scores_some_of_which_are_left_out_are_a_plain_sort(case, k, many):
    vectors, queries, seen, _ = case
    scores = queries @ vectors.t()
    expected = [plain(row, gone, k) for row, gone in zip(scores.tolist(), seen or [[]] * len(scores), strict=True)]
    if seen is not None:
        Excluded(pairs_of(Ragged.from_lists(seen)), 9, scores.device, whole=True).mask(scores, 0, 0)
    with mock.patch.object(best_module, "MANY", many):
        assert same(best_items(scores, k), expected)


@given(cases(), st.integers(1, 2000), st.integers(1, 40), st.randoms(use_true_random=False))
def test_ranks_are_those_of_the_whole_matrix_however_tiles_are_cut_and_vectors_come(case, held, block, random):
    vectors, queries, seen, _ = case
    vectors = vectors.repeat(5, 1)  # more than one tile
    history = Ragged.from_lists([[]] * len(queries) if seen is None else seen)
    targets = torch.tensor([random.randrange(len(vectors)) for _ in queries], dtype=torch.int64)
    with mock.patch.multiple(counting, SCORES={"cpu": held}, NARROWEST={"cpu": 1}):
        found = Catalogue.of_vectors(vectors).ranks(queries, targets, history)
        again = streamed(vectors, block).ranks(queries, targets, history)
    expected = both_ranks(queries @ vectors.t(), targets, history)
    for mine, others, wanted in zip(found, again, expected, strict=True):
        assert torch.equal(mine, wanted) and torch.equal(others, wanted)


@pytest.mark.parametrize("dim", [1, 3, 8, 32, 64, 100, 384])
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 33, 300])
def test_items_with_the_targets_very_vector_tie_wherever_they_are(dim, rows):
    """Scores of random numbers, which round: equal vectors must score the same to the last bit."""
    generator = torch.Generator().manual_seed(rows)
    queries = torch.randn(rows, dim, generator=generator)
    for items in (1, 7, 48, 500, 2611):
        few = torch.randn(items, dim, generator=generator)
        kind = torch.cat([torch.arange(items), torch.randint(items, (items + 3,), generator=generator)])
        targets = torch.randint(len(kind), (rows,), generator=generator)
        copies = torch.bincount(kind, minlength=items)[kind[targets]] - 1
        _, unmasked = Catalogue.of_vectors(few[kind]).ranks(queries, targets, Ragged.from_lists([[]] * rows))
        # A rank of whole items above, in any rounding, and half of those that tie.
        assert torch.equal((2 * unmasked) % 2, (copies % 2).float())
        scores = (queries.double() @ few.double().t())[:, kind]
        own = scores.gather(1, targets[:, None])
        above = (scores > own + 1e-4).sum(1) + copies / 2
        below = (scores > own - 1e-4).sum(1) - copies / 2 - 1
        assert (above <= unmasked).all() and (unmasked <= below.clamp(min=0) + 1e-6).all()


def test_a_score_that_is_not_a_number_is_an_error():
    vectors = torch.eye(3)
    vectors[1, 1] = torch.nan
    with pytest.raises(ValueError, match="scores of 2 of 2 users are NaN; the model has diverged"):
        Catalogue.of_vectors(vectors).ranks(torch.ones(2, 3), torch.tensor([0, 2]), Ragged.from_lists([[], []]))
    assert not Catalogue.of_vectors(vectors).is_finite() and Catalogue.of_vectors(torch.eye(3)).is_finite()


def test_a_target_whose_score_is_minus_infinity_has_no_rank():
    vectors = torch.tensor([[1.0], [-torch.inf], [2.0]])
    masked, unmasked = Catalogue.of_vectors(vectors).ranks(
        torch.ones(2, 1), torch.tensor([1, 0]), Ragged.from_lists([[], [2]])
    )
    assert masked.tolist() == [torch.inf, 0.0] and unmasked.tolist() == [torch.inf, 1.0]


@pytest.mark.parametrize("k", [1, 2, 3, FEW, FEW + 1])
def test_it_is_short_where_scores_run_out(k):
    catalogue = Catalogue.of_vectors(torch.tensor([[3.0], [1.0], [2.0]]))
    items, values = catalogue.top_k(torch.ones(1, 1), k, Ragged.from_lists([[0]]))
    assert items.tolist() == [([2, 1] + [-1] * k)[:k]]
    assert values.tolist() == [([2.0, 1.0] + [-np.inf] * k)[:k]]


def test_of_equal_scores_the_smallest_id_is_answered():
    catalogue = Catalogue.of_vectors(torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]))
    outputs = torch.tensor([[1.0, 0.0]] * 2)
    assert catalogue.top_k(outputs, 1).items.tolist() == [[1], [1]]
    assert catalogue.top_k(outputs, 1, forbidden=torch.tensor([[1, 1], [2, 0]])).items.tolist() == [[2], [1]]
    items, scores = catalogue.top_k(outputs, 2, forbidden=torch.tensor([[0, 1, 2, 3], [1, 2, 3, 3]]))
    assert items.tolist() == [[-1, -1], [0, -1]]
    assert scores.tolist() == [[-np.inf, -np.inf], [0, -np.inf]]
    assert catalogue.top_k(outputs, 3, forbidden=torch.tensor([[1], [2]])).items.tolist() == [[2, 3, 0], [1, 3, 0]]


def test_a_better_item_in_a_later_block_is_found_and_an_equal_one_is_not():
    finder = BestFinder(torch.ones(2, 1), 2, pairs_of(Ragged.from_lists([[], [4]])), items=6)
    for first, block in ((0, [1.0, 3.0]), (2, [3.0, 2.0]), (4, [5.0, 3.0])):
        finder.update(torch.tensor(block)[:, None], first)
    assert finder.best.items.tolist() == [[4, 1], [1, 2]]
    assert finder.best.scores.tolist() == [[5.0, 3.0], [3.0, 3.0]]


def test_the_share_of_a_rank_is_every_item_of_its_range_once_in_order(monkeypatch):
    from recgpt_torchrec.catalogue import catalogue as catalogue_module

    monkeypatch.setattr(catalogue_module, "BLOCK_BYTES", 3 * 8)
    vectors = torch.arange(10.0).reshape(5, 2)
    for catalogue in (Catalogue.of_vectors(vectors), streamed(vectors, 4)):
        blocks = list(catalogue.share())
        assert all(len(ids) == len(each) <= 3 for ids, each in blocks)
        assert np.concatenate([ids for ids, _ in blocks]).tolist() == list(range(5))
        assert np.concatenate([each for _, each in blocks]).tolist() == vectors.tolist()
