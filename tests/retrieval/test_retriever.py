"""Searching, leaving the history out and filling up: against plain sorting, with every index."""

import subprocess
import sys
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from recgpt_torchrec.catalogue.catalogue import Catalogue
from recgpt_torchrec.catalogue.rounds import Rounds
from recgpt_torchrec.data.ragged import Ragged
from recgpt_torchrec.retrieval.merging import merge_by_score, merge_quota
from recgpt_torchrec.retrieval.search.index import Shard, build
from recgpt_torchrec.retrieval.search.restricted import RestrictedSearch
from recgpt_torchrec.retrieval.search.retriever import ApproximateSearch, ExactSearch, Retriever
from recgpt_torchrec.retrieval.search.sharded_index import ShardedIndex

ITEMS, DIM = 40, 8


def vectors(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(*shape, DIM)).astype(np.float32)


def exact(items: np.ndarray) -> ExactSearch:
    return ExactSearch(Catalogue.of_vectors(torch.from_numpy(items)))


def plain(scores: np.ndarray, seen: list[int], k: int) -> list[int]:
    """The k best items that were not seen, by sorting everything."""
    order = [item for item in np.argsort(-scores, kind="stable").tolist() if item not in seen]
    return order[:k] + [-1] * (k - len(order))


@given(st.data())
def test_one_interest_gives_the_best_unseen_items_however_long_the_history(data):
    k, users = data.draw(st.integers(1, ITEMS)), data.draw(st.integers(1, 12))
    history = st.lists(st.integers(0, ITEMS - 1), max_size=data.draw(st.sampled_from([3, 2 * ITEMS])))
    seen = [data.draw(history) for _ in range(users)]
    items, queries = vectors(ITEMS), vectors(users, 1, seed=1)
    retriever = Retriever(exact(items), k, lambda lists: merge_by_score(lists, k))
    found = retriever.lists(queries, Ragged.from_lists(seen))
    expected = [plain(items @ queries[u, 0], seen[u], k) for u in range(users)]
    assert found.items.tolist() == expected
    for u, row in enumerate(expected):
        there = [item for item in row if item >= 0]
        np.testing.assert_allclose(found.scores[u, : len(there)], items[there] @ queries[u, 0], rtol=1e-5, atol=1e-6)


@given(st.data())
def test_items_of_the_history_compete_with_a_bias_exactly_and_by_an_index_and_among_allowed_ones(data):
    """Against a sort of all biased scores; an index serves biases of at most 0 alone. Without a bias they are left out,
    together with what is excluded."""
    k, users = data.draw(st.integers(1, ITEMS)), data.draw(st.integers(1, 6))
    bias = data.draw(st.sampled_from([None, -30.0, -1.0, -0.1, 0.0, 0.5, 30.0]))
    history = st.lists(st.integers(0, ITEMS - 1), max_size=data.draw(st.sampled_from([3, 2 * ITEMS])))
    seen, excluded = ([data.draw(history) for _ in range(users)] for _ in range(2))
    items, queries = vectors(ITEMS), vectors(users, 1, seed=1)
    scores = queries[:, 0] @ items.T
    for row, of_user in enumerate(seen):
        scores[row, sorted(set(of_user))] += np.float32(bias or 0.0)
    own = [of_user if bias is None else [] for of_user in seen]

    def lists(search: Any, out: list[list[int]] | None = None) -> list[list[int]]:
        retriever = Retriever(search, k, lambda lists: merge_by_score(lists, k), bias=bias)
        left_out = None if out is None else Ragged.from_lists(out)
        return retriever.lists(queries, Ragged.from_lists(seen), left_out).items.tolist()

    assert lists(exact(items)) == [plain(row, out, k) for row, out in zip(scores, own, strict=True)]
    both = [[*first, *second] for first, second in zip(own, excluded, strict=True)]
    assert lists(exact(items), excluded) == [plain(row, out, k) for row, out in zip(scores, both, strict=True)]
    allowed = np.sort(np.random.default_rng(k).choice(ITEMS, ITEMS // 2, replace=False))
    others = sorted({*range(ITEMS)} - {*allowed.tolist()})
    expected = [plain(row, others + out, k) for row, out in zip(scores, own, strict=True)]
    assert lists(RestrictedSearch(exact(items[allowed]), allowed)) == expected
    if bias is None or bias <= 0:
        shard = Shard(build("flat", lambda: iter([items]), ITEMS, DIM, {}), "flat", {})
        assert lists(ApproximateSearch(ShardedIndex([shard], ITEMS, DIM, Rounds()))) == lists(exact(items))


def test_without_a_history_everything_may_be_found():
    items, queries = vectors(ITEMS), vectors(5, 2, seed=1)
    retriever = Retriever(exact(items), 6, lambda lists: merge_quota(lists, (4, 2)))
    found = retriever.lists(queries)
    for u in range(5):
        first, second = (plain(items @ queries[u, i], [], 6) for i in range(2))
        assert found.items[u].tolist() == first[:4] + [item for item in second if item not in first[:4]][:2]


def test_where_an_approximate_search_finds_too_few_the_exact_one_is_asked():
    items, queries, seen = vectors(ITEMS), vectors(9, 2, seed=1), [[u, u + 1] for u in range(9)]
    parameters = {"ivf.clusters": 20, "ivf.probes": 1}
    shard = Shard(build("ivf", lambda: iter([items]), ITEMS, DIM, parameters), "ivf", parameters)
    poor = ApproximateSearch(ShardedIndex([shard], ITEMS, DIM, Rounds()))
    k = ITEMS - 2
    retriever = Retriever(poor, k, lambda lists: merge_by_score(lists, k), exact(items))
    found = retriever.lists(queries, Ragged.from_lists(seen))
    for u in range(9):
        assert sorted(found.items[u].tolist()) == sorted(set(range(ITEMS)) - set(seen[u]))
    alone = Retriever(poor, k, lambda lists: merge_by_score(lists, k)).lists(queries, Ragged.from_lists(seen))
    assert (alone.items < 0).any()  # or the test proves nothing


def test_lists_of_an_export_and_their_metrics_are_made_without_torchrec():
    """Its import takes 2.5 s of each start; ranks, metrics, exact and approximate search are imported with them."""
    modules = "recgpt_torchrec.retrieval.search.searching, recgpt_torchrec.evaluation.list_quality"
    code = f"import sys; sys.modules['torchrec'] = None; import {modules}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
