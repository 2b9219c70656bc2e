"""Metrics of ranks against a plain loop over Python numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recgpt_torchrec.catalogue.ranks import both_ranks
from recgpt_torchrec.data.ragged import Ragged
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.evaluation.metrics import RankingMetrics, list_ranks


def plain_metrics(all_ranks: list[float], ks: list[int]) -> dict[str, float]:
    result = {}
    for k in ks:
        hits = gains = 0.0
        for rank in all_ranks:
            if rank < k:
                hits += 1
                gains += 1 / math.log2(rank + 2)
        result[f"HR@{k}"] = hits / len(all_ranks)
        result[f"NDCG@{k}"] = gains / len(all_ranks)
    return result


def test_a_target_in_its_own_history_cannot_be_hit_when_masked_and_can_otherwise():
    scores, target, history = torch.tensor([[9.0, 1.0]]), torch.tensor([0]), Ragged.from_lists([[0]])
    metrics = RankingMetrics(ks=(100,))
    masked, unmasked = both_ranks(scores, target, history)
    metrics.update(masked)
    assert metrics.result() == {"HR@100": 0.0, "NDCG@100": 0.0}
    assert unmasked.tolist() == [0.0]


@given(
    st.lists(st.one_of(st.integers(0, 20).map(lambda n: n / 2), st.just(math.inf)), min_size=1, max_size=20),
    st.lists(st.integers(1, 12), min_size=1, max_size=3, unique=True),
    st.integers(0, 20),
)
def test_metrics_agree_with_a_plain_loop_however_the_users_are_split_over_processes(all_ranks, ks, cut):
    here, there = RankingMetrics(ks), RankingMetrics(ks)
    here.update(torch.tensor(all_ranks[:cut], dtype=torch.float32))
    there.update(torch.tensor(all_ranks[cut:], dtype=torch.float32))
    here.state().add_(there.state())  # as an all-reduce does
    got = here.result()
    expected = plain_metrics(all_ranks, ks)
    assert list(got) == list(expected)
    assert got == pytest.approx(expected, abs=1e-6)


def test_result_names_come_in_the_order_of_the_published_tables():
    metrics = RankingMetrics()
    metrics.update(torch.tensor([0.0, 7.0]))
    assert list(metrics.result()) == ["HR@5", "NDCG@5", "HR@10", "NDCG@10"]
    assert metrics.users == 2


def test_k_larger_than_the_catalogue_hits_every_target():
    metrics = RankingMetrics(ks=(50,))
    masked, _ = both_ranks(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([0]), Ragged.from_lists([[]]))
    metrics.update(masked)
    assert metrics.result() == pytest.approx({"HR@50": 1.0, "NDCG@50": 0.5})


def test_no_user_at_all_is_an_error_and_not_a_zero():
    with pytest.raises(InputError, match="no user was ranked"):
        RankingMetrics().result()


@pytest.mark.parametrize("ks", [(), (0, 5)])
def test_list_lengths_under_one_are_refused(ks):
    with pytest.raises(ValueError, match="at least 1"):
        RankingMetrics(ks)


def test_list_ranks_is_the_place_in_the_list_and_infinite_outside_it():
    lists = torch.tensor([[4, 7, -1], [4, 7, 4], [1, 2, 3]])
    assert list_ranks(lists, torch.tensor([7, 4, 9])).tolist() == [1.0, 0.0, math.inf]
    assert list_ranks(lists[:, :0], torch.tensor([7, 4, 9])).tolist() == [math.inf] * 3
