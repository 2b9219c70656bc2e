"""Negatives are distinct, and the log probabilities they come with are those they are really drawn with."""

import itertools
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recgpt_torchrec.config import Loss
from recgpt_torchrec.data.candidates import (
    ALONE,
    DISTRIBUTIONS,
    SOURCES,
    AllItems,
    Candidates,
    CandidateSource,
    InBatch,
    ItemStatistics,
    LogUniform,
    Place,
    Uniform,
    id_range,
    leave_out_untrained,
    no_candidates,
    training_counts,
)
from recgpt_torchrec.errors import InputError
from tests.support import promise_of, write_dataset

COUNTS = np.array([3, 50, 0, 12, 7, 1, 30, 5, 2, 9])


def inclusion(sampler, items: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each item was drawn, as a share, and its mean promised probability over the draws it came in."""
    drawn, promised = np.zeros(items), np.zeros(items)
    for n in range(draws):
        ids, log_q = sampler.draw(np.random.default_rng((5, n)))
        assert (ids.dtype, log_q.dtype, ids.shape, log_q.shape) == (np.int64, np.float32, log_q.shape, ids.shape)
        assert np.unique(ids).size == ids.size == sampler.count and ids.min() >= 0 and ids.max() < items
        drawn[ids] += 1
        promised[ids] += np.exp(log_q)
    return drawn / draws, promised / np.maximum(drawn, 1)


@pytest.mark.parametrize("count", [1, 4, 10])
def test_uniform_draws_each_item_as_often_as_its_log_probability_says(count):
    share, promised = inclusion(Uniform(10, count), 10, 1500)
    np.testing.assert_allclose(promised, count / 10, rtol=1e-6)
    np.testing.assert_allclose(share, promised, atol=0.05)


@pytest.mark.parametrize("count", [1, 16])
def test_log_uniform_draws_each_item_as_often_as_its_log_probability_says(count):
    counts = np.random.default_rng(0).permutation(60)
    share, promised = inclusion(LogUniform(counts, count), 60, 1500)
    seen = share > 0.02  # the promise of an item that hardly came is not known well
    assert seen.sum() >= 10
    # The number of tries is itself random, so for many negatives the promise is an approximation, good to some percent.
    np.testing.assert_allclose(share[seen], promised[seen], atol=0.05)


@pytest.mark.parametrize(("items", "count"), [(1, 1), (5, 5), (60, 16), (1000, 1000), (20000, 3000)])
def test_log_uniform_draws_what_a_plain_loop_over_the_tries_draws(items, count):
    counts = np.random.default_rng(1).permutation(items)
    ids, log_q = LogUniform(counts, count).draw(np.random.default_rng(7))
    rng, by_rank = np.random.default_rng(7), np.argsort(-counts, kind="stable")
    seen: list[int] = []
    among = set()
    tries = 0
    while len(seen) < count:
        for u in rng.random(max(count, 16)).tolist():
            rank = min(int(np.exp(u * np.log(items + 1))) - 1, items - 1)
            tries += 1
            if rank not in among:
                among.add(rank)
                seen.append(rank)
            if len(seen) == count:
                break
    assert ids.tolist() == by_rank[seen].tolist()
    for rank, found in zip(seen, log_q.tolist(), strict=True):
        p = min(math.log((rank + 2) / (rank + 1)) / math.log(items + 1), 1 - 1e-12)
        assert math.exp(found) == pytest.approx(1 - (1 - p) ** tries, rel=1e-5)


@pytest.mark.parametrize("items", [7, 400])  # numpy draws in another way from 50 times as many items on
def test_every_set_of_uniform_negatives_is_as_likely_as_any_other(items):
    draws, count, classes = 8000, 2, 7
    sampler = Uniform(items, count)
    drawn = [np.sort(sampler.draw(np.random.default_rng((9, n)))[0] % classes) for n in range(draws)]
    found = Counter(map(tuple, np.array(drawn).tolist()))
    of_class = np.bincount(np.arange(items) % classes).tolist()
    for a, b in itertools.combinations_with_replacement(range(classes), 2):
        ways = of_class[a] * of_class[b] if a != b else math.comb(of_class[a], 2)
        share = ways / math.comb(items, 2)
        assert found[a, b] / draws == pytest.approx(share, abs=4 * math.sqrt(share / draws))


def test_popular_items_are_drawn_more_often_by_log_uniform_and_alike_by_uniform():
    sampler = LogUniform(COUNTS, 1)
    drawn = np.bincount([sampler.draw(np.random.default_rng((1, n)))[0][0] for n in range(3000)], minlength=10)
    popular, rarest = np.argsort(-COUNTS, kind="stable")[[0, -1]]
    # the Zipf-like law of the rank r: log((r + 2) / (r + 1)) / log(items + 1)
    assert drawn[popular] / 3000 == pytest.approx(np.log(2) / np.log(11), abs=0.03)
    assert drawn[rarest] / 3000 == pytest.approx(np.log(11 / 10) / np.log(11), abs=0.02)


@pytest.mark.parametrize("make", [lambda n: Uniform(3, n), lambda n: LogUniform(COUNTS[:3], n)], ids=["uniform", "log"])
def test_more_negatives_than_items_are_all_items_always_there(make):
    ids, log_q = make(50).draw(np.random.default_rng(0))
    assert sorted(ids.tolist()) == [0, 1, 2]
    if isinstance(make(50), Uniform):
        assert np.allclose(log_q, 0)


def test_the_same_generator_draws_the_same_negatives():
    for sampler in (Uniform(100, 20), LogUniform(np.arange(100), 20)):
        first, second = (sampler.draw(np.random.default_rng((1, 2))) for _ in range(2))
        assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])
        assert not np.array_equal(first[0], sampler.draw(np.random.default_rng((1, 3)))[0])


def test_a_catalogue_of_one_item():
    for sampler in (Uniform(1, 5), LogUniform(np.array([4]), 5)):
        ids, log_q = sampler.draw(np.random.default_rng(0))
        assert ids.tolist() == [0] and np.isfinite(log_q).all()


# ------------------------------------------------------------------------------------------------------ sources

CHOICES = {name: get_args(get_type_hints(Loss)[name]) for name in ("candidates", "negatives_by")}
"""Values that the options take."""


def test_every_value_of_the_options_has_a_source_and_a_distribution():
    assert set(CHOICES["candidates"]) == SOURCES.keys() and len(SOURCES) >= 4
    assert set(CHOICES["negatives_by"]) == DISTRIBUTIONS.keys() and len(DISTRIBUTIONS) >= 2


@pytest.mark.parametrize("negatives_by", CHOICES["negatives_by"])
@pytest.mark.parametrize("candidates", CHOICES["candidates"])
def test_a_source_keeps_to_its_room(candidates, negatives_by):
    loss, items = Loss(candidates=candidates, negatives_by=negatives_by, negatives=4), COUNTS.size
    source = SOURCES[candidates]
    made = source.make(loss, ItemStatistics(items, lambda: COUNTS), 20)
    for n, targets in enumerate(([], [3], [7, 7, 0, 9, 7])):
        drawn, again = (made.draw(np.array(targets, dtype=np.int64), np.random.default_rng(n)) for _ in range(2))
        assert np.array_equal(drawn.ids, again.ids) and np.array_equal(drawn.log_q, again.log_q)
        assert (drawn.ids.dtype, drawn.log_q.dtype) == (np.int64, np.float32)
        assert drawn.log_q.shape == drawn.ids.shape and np.isfinite(drawn.log_q).all()
        assert np.unique(drawn.ids).size == drawn.ids.size
        assert set(drawn.ids.tolist()) <= set(range(items))
        assert len(set(drawn.ids.tolist()) - set(targets)) <= made.room
        if drawn.bags is not None:
            assert drawn.ids.tolist() == list(range(items))


@pytest.mark.parametrize(
    ("candidates", "negatives_by", "counts"),
    [
        ("all", "uniform", False),
        ("all", "log_uniform", False),
        ("sampled", "uniform", False),
        ("sampled", "log_uniform", True),
        ("bce", "uniform", False),
        ("bce", "log_uniform", True),
        ("in_batch", "uniform", True),
        ("in_batch", "log_uniform", True),
    ],
)
def test_popularity_is_asked_for_where_it_is_needed_only(candidates, negatives_by, counts):
    loss, asked = Loss(candidates=candidates, negatives_by=negatives_by), []

    def read() -> np.ndarray:
        asked.append(True)
        return COUNTS

    SOURCES[candidates].make(loss, ItemStatistics(COUNTS.size, read), 20)
    assert bool(asked) == counts


@pytest.mark.parametrize("candidates", ["sampled", "bce"])
@pytest.mark.parametrize(("negatives_by", "kind"), [("uniform", Uniform), ("log_uniform", LogUniform)])
def test_sampled_sources_draw_from_the_distribution_of_that_name(candidates, negatives_by, kind):
    loss = Loss(candidates=candidates, negatives_by=negatives_by, negatives=4)
    source = SOURCES[candidates].make(loss, ItemStatistics(COUNTS.size, lambda: COUNTS), 20)
    drawn = source.draw(np.array([1, 2]), np.random.default_rng(3))
    wanted = (
        DISTRIBUTIONS[negatives_by].make(ItemStatistics(COUNTS.size, lambda: COUNTS), 4).draw(np.random.default_rng(3))
    )
    assert DISTRIBUTIONS[negatives_by] is kind
    assert np.array_equal(drawn.ids, wanted[0]) and np.array_equal(drawn.log_q, wanted[1])
    assert source.room == drawn.ids.size == 4 and drawn.bags is None


def test_the_whole_catalogue_is_every_item_for_certain_and_takes_no_draw():
    rng = np.random.default_rng(0)
    drawn = AllItems(7).draw(np.array([3, 3]), rng)
    assert drawn.bags is not None and drawn.ids.tolist() == drawn.bags.tolist() == list(range(7))
    assert not drawn.log_q.any() and not drawn.shared
    assert rng.bit_generator.state == np.random.default_rng(0).bit_generator.state


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 40))
def test_in_batch_candidates_are_the_distinct_targets_with_the_chance_that_each_is_there(targets, tokens):
    drawn = InBatch(COUNTS, tokens).draw(np.array(targets, dtype=np.int64), np.random.default_rng(0))
    assert drawn.ids.tolist() == sorted(set(targets)) and drawn.bags is None
    total = int(COUNTS.sum())
    for item, log_q in zip(drawn.ids.tolist(), drawn.log_q.tolist(), strict=True):
        p = max(int(COUNTS[item]), 0.5) / total  # an item that never came counts half
        assert math.exp(log_q) == pytest.approx(1 - (1 - p) ** tokens, rel=1e-5)


def test_in_batch_log_q_is_the_share_of_batches_an_item_is_a_target_of():
    tokens, batches = 12, 4000
    rng = np.random.default_rng(0)
    targets = rng.choice(COUNTS.size, (batches, tokens), p=COUNTS / COUNTS.sum())
    share = np.array([(targets == item).any(1).mean() for item in range(COUNTS.size)])
    drawn = InBatch(COUNTS, tokens).draw(np.arange(COUNTS.size), rng)
    often = COUNTS > 0
    np.testing.assert_allclose(np.exp(drawn.log_q[often]), share[often], atol=0.03)


@pytest.mark.parametrize("counts", [[9], [0], [0, 0, 0], [5, 0]])
def test_in_batch_log_q_of_items_that_always_or_never_came_is_finite(counts):
    drawn = InBatch(np.array(counts), 64).draw(np.arange(len(counts)), np.random.default_rng(0))
    assert np.isfinite(drawn.log_q).all() and (drawn.log_q <= 0).all()


def test_no_candidates_are_empty_arrays():
    empty = no_candidates()
    assert (empty.ids.dtype, empty.log_q.dtype) == (np.int64, np.float32)
    assert empty.ids.shape == empty.log_q.shape == (0,) and empty.bags is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"item_id": [0, 1, 2, 3, 9]}, "an item has no count, or an id outside 0 to 4"),
        ({"item_id": [0, 1, 2, 3, -1]}, "an item has no count, or an id outside 0 to 4"),
        ({"train_count": [1, None, 1, 1, 1]}, "an item has no count"),
        ({"train_count": ["x"] * 5}, "cannot be read"),
        ({"train_count": None}, "cannot be read"),
    ],
)
def test_item_counts_that_are_damaged_are_refused(changes: dict[str, list[Any] | None], message: str, tmp_path: Path):
    dataset = write_dataset(tmp_path / "data", [[0, 1, 2, 3, 4]] * 3, items=5)
    path = tmp_path / "data" / dataset.manifest.item_parts[0].path
    columns = {**pq.read_table(path).to_pydict(), **changes}
    pq.write_table(pa.table({name: values for name, values in columns.items() if values is not None}), path)
    vars(dataset.manifest.item_parts[0]).update(promise_of(path))
    with pytest.raises(InputError, match=f"items/part-00000.parquet.*{message}"):
        training_counts(dataset)


@pytest.mark.parametrize(("count", "ranks"), [(10, 3), (1, 4), (12_101, 2), (7, 7)])
def test_id_ranges_cover_every_id_once_and_differ_by_one_at_most(count, ranks):
    ranges = [id_range(count, rank, ranks) for rank in range(ranks)]
    assert [i for first, stop in ranges for i in range(first, stop)] == list(range(count))
    assert max(stop - first for first, stop in ranges) - min(stop - first for first, stop in ranges) <= 1


def make(loss: Loss, place: Place = ALONE, counts: np.ndarray = COUNTS, tokens: int = 20) -> CandidateSource:
    return SOURCES[loss.candidates].make(loss, ItemStatistics(counts.size, lambda: counts), tokens, place)


@pytest.mark.parametrize(("items", "ranks"), [(10, 3), (10, 1), (2, 3), (12, 4)])
def test_the_ranks_of_all_share_the_catalogue_with_equal_room(items, ranks):
    sources = [AllItems(items, Place(rank, ranks)) for rank in range(ranks)]
    assert len({source.room for source in sources}) == 1 and sources[0].room == -(-items // ranks)
    drawn = [source.draw(np.array([1]), np.random.default_rng(0)) for source in sources]
    assert [item for each in drawn for item in each.ids.tolist()] == list(range(items))
    for each, source in zip(drawn, sources, strict=True):
        assert each.bags is not None and each.bags.tolist() == list(range(each.ids.size))
        assert each.ids.size <= source.count and each.shared == (ranks > 1)


@pytest.mark.parametrize("negatives_by", CHOICES["negatives_by"])
def test_different_negatives_are_those_of_the_ranks_own_stream_expected_on_any_rank(negatives_by):
    loss = Loss(negatives=4, negatives_by=negatives_by, negatives_across_ranks="different")
    same = make(replace(loss, negatives_across_ranks="same"), Place(1, 3))
    sources = [make(loss, Place(rank, 3)) for rank in range(3)]
    assert same.seed == make(loss).seed == () and [source.seed for source in sources] == [(0,), (1,), (2,)]
    for source in sources:
        drawn, plain = (each.draw(np.zeros(0, np.int64), np.random.default_rng(5)) for each in (source, same))
        order = np.argsort(plain.ids)
        assert drawn.ids.tolist() == plain.ids[order].tolist() == sorted(drawn.ids.tolist())
        np.testing.assert_allclose(drawn.log_q, plain.log_q[order] + math.log(3), rtol=1e-6)
        assert drawn.shared and not plain.shared
    alone = make(loss).draw(np.zeros(0, np.int64), np.random.default_rng(5))
    assert alone.ids.tolist() == plain.ids.tolist() and not alone.shared


@pytest.mark.parametrize("negatives_by", CHOICES["negatives_by"])
def test_the_negatives_of_all_ranks_estimate_the_partition_function(negatives_by):
    """Mean over draws of the target's term and the corrected terms of all ranks' negatives but the target."""
    items, ranks, draws, target = 40, 3, 800, 7
    scores = np.random.default_rng(0).standard_normal(items)
    counts = np.random.default_rng(1).permutation(items)
    loss = Loss(negatives=6, negatives_by=negatives_by, negatives_across_ranks="different")
    sources = [make(loss, Place(rank, ranks), counts) for rank in range(ranks)]
    estimates = []
    for n in range(draws):
        estimate = np.exp(scores[target])
        for source in sources:
            drawn = source.draw(np.array([target]), np.random.default_rng((n, *source.seed)))
            others = drawn.ids != target
            estimate += np.exp(scores[drawn.ids[others]] - drawn.log_q[others]).sum()
        estimates.append(estimate)
    full = np.exp(scores).sum()
    spread = np.std(estimates) / math.sqrt(draws)
    # The expected count of a log-uniform negative is an approximation, see `LogUniform`.
    assert abs(np.mean(estimates) - full) < 4 * spread + (0.03 * full if negatives_by == "log_uniform" else 0)
    assert 4 * spread < 0.1 * full


@pytest.mark.parametrize("candidates", ["all", "in_batch", "bce"])
def test_different_negatives_are_for_sampled_ones(candidates):
    with pytest.raises(ValueError, match=f"for --loss.candidates sampled, not {candidates}; leave it out"):
        Loss(candidates=candidates, negatives_across_ranks="different")


def test_what_is_held_per_item_is_small():
    assert LogUniform(COUNTS, 3).by_rank.dtype == np.int32 and InBatch(COUNTS, 3).log_q.dtype == np.float32


@pytest.mark.parametrize("candidates", ["all", "sampled"])
def test_items_that_were_never_trained_are_no_negatives(candidates):
    trained = COUNTS > 0
    source = make(Loss(candidates=candidates, negatives=10))
    drawn = source.draw(np.array([1]), np.random.default_rng(0))
    left = leave_out_untrained(drawn, trained)
    counts = np.isfinite(left.log_q)
    assert sorted(left.ids[counts].tolist()) == np.flatnonzero(trained).tolist()
    before = dict(zip(drawn.ids.tolist(), drawn.log_q.tolist(), strict=True))
    assert [before[item] for item in left.ids[counts].tolist()] == left.log_q[counts].tolist()
    assert (left.bags is None) == (candidates == "sampled")
    if left.bags is not None:
        assert left.ids.tolist() == drawn.ids.tolist() and np.isposinf(left.log_q[~counts]).all()


def test_nothing_is_copied_where_all_items_were_trained():
    drawn = Candidates(np.arange(10), np.zeros(10, dtype=np.float32))
    assert leave_out_untrained(drawn, np.ones(10, dtype=bool)) is drawn
