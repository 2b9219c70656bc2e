"""The paired bootstrap against a plain one that draws users."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recgpt_torchrec.evaluation.comparing import paired
from recgpt_torchrec.evaluation.comparing.paired import Interval, PairCounts, RankCounts
from recgpt_torchrec.evaluation.metrics import RankingMetrics


def gain(rank: float, k: int, metric: str) -> float:
    """What a user adds to a metric: a plain definition."""
    return 0.0 if rank >= k else 1.0 if metric == "HR" else float(1 / np.log2(float(rank) + 2))


def drawn_ranks(users: int, seed: int, shift: float) -> np.ndarray:
    """Ranks with halves and misses."""
    rng = np.random.default_rng(seed)
    ranks = np.floor(rng.exponential(6 + shift, users) * 2) / 2
    return np.where(rng.random(users) < 0.2, np.inf, ranks).astype(np.float32)


@pytest.mark.parametrize("metric", ["NDCG", "HR"])
def test_the_interval_is_that_of_a_plain_bootstrap_over_users(metric: str) -> None:
    first, second = drawn_ranks(300, 1, 0.0), drawn_ranks(300, 2, 2.0)
    gains = np.array([[gain(rank, 10, metric) for rank in ranks] for ranks in (first, second)])
    differences = gains[0] - gains[1]
    rng = np.random.default_rng(5)
    plain = [differences[rng.integers(0, 300, 300)].mean() for _ in range(4000)]
    low, high = np.quantile(plain, [0.025, 0.975])
    counts = PairCounts(10).add(first[:100], second[:100]).add(first[100:], second[100:])
    found = counts.difference(metric)  # type: ignore[arg-type]
    assert found.mean == pytest.approx(differences.mean(), abs=1e-12)
    # Both are samples of 4,000: their ends differ by some hundredths of the interval.
    assert found.low == pytest.approx(low, abs=0.08 * (high - low))
    assert found.high == pytest.approx(high, abs=0.08 * (high - low))
    # The normal approximation is the same with so many users.
    error = 1.96 * differences.std() / np.sqrt(300)
    assert found.low == pytest.approx(differences.mean() - error, abs=0.1 * error)
    assert counts.mean(metric, 1) == pytest.approx(gains[1].mean())  # type: ignore[arg-type]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 4.5, 9.0, 9.5, 10.0, 37.0, float("inf")]), min_size=1), st.integers(1, 12)
)
def test_means_are_those_of_the_metrics_for_every_rank(drawn: list[float], k: int) -> None:
    import torch

    metrics = RankingMetrics((k,))
    metrics.update(torch.tensor(drawn))
    counts = RankCounts(k).add(np.array(drawn, np.float32))
    assert counts.users == len(drawn)
    for metric in ("HR", "NDCG"):
        assert counts.interval(metric).mean == pytest.approx(metrics.result()[f"{metric}@{k}"], abs=1e-6)


def test_the_same_seed_gives_the_same_interval_and_equal_paths_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = drawn_ranks(50, 3, 0.0)
    counts = PairCounts(10).add(ranks, drawn_ranks(50, 4, 0.0))
    before = counts.difference("NDCG")
    assert before == counts.difference("NDCG") and before != counts.difference("NDCG", seed=1)
    monkeypatch.setattr(paired, "CELLS", 30)  # drawn in several parts
    parts = counts.difference("NDCG")
    assert (parts.low, parts.high) == pytest.approx((before.low, before.high), abs=1e-12)
    assert PairCounts(10).add(ranks, ranks).difference("NDCG") == Interval(0.0, 0.0, 0.0)
    assert not Interval(0.1, -0.1, 0.3).beyond_chance and Interval(-0.2, -0.3, -0.1).beyond_chance
