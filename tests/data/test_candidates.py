"""Negatives are distinct, and the log probabilities they come with are those they are really drawn with."""

import numpy as np
import pytest

from recgpt_torchrec.data.candidates import LogUniform, Uniform

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
        assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
        assert not np.array_equal(first[0], sampler.draw(np.random.default_rng((1, 3)))[0])


def test_a_catalogue_of_one_item():
    for sampler in (Uniform(1, 5), LogUniform(np.array([4]), 5)):
        ids, log_q = sampler.draw(np.random.default_rng(0))
        assert ids.tolist() == [0] and np.isfinite(log_q).all()
