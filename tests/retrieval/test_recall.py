"""Merging the lists of several interests, and going on from a history: against plain loops and by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recgpt_torchrec.data.batch import Sequences
from recgpt_torchrec.retrieval.recall import appended, interests, masked, merge_by_score, merge_quota, top


@st.composite
def ordered_lists(draw):
    """Scores of a few users for a few items, by several interests, all different within a row."""
    users, items, count = draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.integers(1, 4))
    seed = draw(st.integers(0, 2**20))
    rng = np.random.default_rng(seed)
    scores = [
        torch.tensor(np.stack([rng.permutation(items * 3)[:items] for _ in range(users)]), dtype=torch.float32)
        for _ in range(count)
    ]
    return scores, draw(st.integers(1, 9))


def filled(row: list[int], length: int) -> list[int]:
    return row + [-1] * (length - len(row))


@given(ordered_lists(), st.data())
def test_quota_takes_the_next_new_items_of_each_list_in_turn(case, data):
    scores, _ = case
    quotas = [data.draw(st.integers(0, 4)) for _ in scores]
    depth = sum(quotas) or 1
    lists = [top(s, depth) for s in scores]
    found = merge_quota(lists, quotas).tolist()
    for user in range(len(scores[0])):
        merged: list[int] = []
        for number, (ranked, quota) in enumerate(zip(lists, quotas, strict=True)):
            new = [i for i in ranked[user].tolist() if i >= 0 and i not in merged][:quota]
            merged += new if number else [i for i in ranked[user].tolist()][:quota]
        kept = [i for i in found[user] if i >= 0]
        assert kept == [i for i in merged if i >= 0] and len(set(kept)) == len(kept)
        assert len(found[user]) == sum(quotas)


@given(ordered_lists())
def test_by_score_keeps_each_item_once_with_its_best_score(case):
    scores, length = case
    items = scores[0].shape[1]
    lists = [top(s, items) for s in scores]
    values = [s.gather(1, ranked) for s, ranked in zip(scores, lists, strict=True)]
    found = merge_by_score(lists, values, length)
    for user in range(len(scores[0])):
        best = torch.stack([s[user] for s in scores]).amax(0)
        kept = [i for i in found[user].tolist() if i >= 0]
        assert len(kept) == min(items, length) == len(set(kept))
        # Ties between interests may come in either order: compare scores, not ids.
        assert best[kept].tolist() == best.sort(descending=True).values[: len(kept)].tolist()
        assert found[user].tolist() == filled(kept, length)


def test_top_is_short_where_scores_run_out():
    scores = masked(torch.tensor([[3.0, 1.0, 2.0]]), (np.array([0]), np.array([0, 1])))
    assert top(scores, 5).tolist() == [[2, 1, -1, -1, -1]]


def test_an_appended_entry_is_generated_and_pushes_the_oldest_out():
    sequences = Sequences(
        users=np.array([0, 1]),
        items=np.array([5, 6, 7, 8]),
        offsets=np.array([0, 3, 4]),
        segments=np.array([0, 1, 0, 0], dtype=np.int8),
    )
    longer = appended(sequences, np.array([1, 2]), max_len=3)
    assert longer.items.tolist() == [6, 7, 1, 8, 2]
    assert longer.offsets.tolist() == [0, 3, 5]
    assert longer.segments is not None and longer.segments.tolist() == [1, 0, 1, 0, 1]


class Repeats(torch.nn.Module):
    """A model whose output is the vector of the newest entry: it expects what it just heard."""

    def __init__(self, catalogue: torch.Tensor) -> None:
        super().__init__()
        self.catalogue = catalogue

    def forward(self, batch):
        newest = batch.items.values()[batch.item_bag.flatten()[batch.last_slot]]
        vectors = self.catalogue[newest]
        return None, (None, vectors)


def test_two_steps_of_a_two_item_catalogue_by_hand():
    from recgpt_torchrec.config import Batch, Loss
    from recgpt_torchrec.data.dataset import Dataset, Manifest
    from recgpt_torchrec.data.stream import BatchMaker

    catalogue = torch.eye(2)
    dataset = Dataset(path="none", manifest=Manifest(users=1, items=2))
    maker = BatchMaker(dataset=dataset, split="all", batch=Batch(tokens=8), loss=Loss(), max_len=4, seed=0, grows=2)
    history = Sequences(
        users=np.array([0]), items=np.array([0]), offsets=np.array([0, 1]), seen=(np.array([], int), np.array([0, 0]))
    )
    first = torch.tensor([[1.0, 0.5]])  # expects item 0, then item 1
    vectors = interests(Repeats(catalogue), maker, history, first, catalogue, 2)
    # Its best item, 0, is appended; the output there is item 0's vector again.
    assert vectors.tolist() == [[[1.0, 0.5], [1.0, 0.0]]]
    lists = [top(vectors[:, i] @ catalogue.t(), 2) for i in range(2)]
    assert merge_quota(lists, (1, 1)).tolist() == [[0, 1]]  # 0 from the first, the best new one from the second
    # With item 0 seen, item 1 is the best that may be answered, and is what the second step hears.
    seen = Sequences(history.users, history.items, history.offsets, seen=(np.array([0]), np.array([0, 1])))
    assert interests(Repeats(catalogue), maker, seen, first, catalogue, 2).tolist() == [[[1.0, 0.5], [0.0, 1.0]]]


@pytest.mark.parametrize("count", [1, 3])
def test_no_history_at_all_takes_part_with_nothing(count):
    from recgpt_torchrec.config import Batch, Loss
    from recgpt_torchrec.data.batch import no_sequences
    from recgpt_torchrec.data.dataset import Dataset, Manifest
    from recgpt_torchrec.data.stream import BatchMaker

    dataset = Dataset(path="none", manifest=Manifest(users=1, items=2))
    maker = BatchMaker(dataset=dataset, split="all", batch=Batch(tokens=8), loss=Loss(), max_len=4, seed=0, grows=2)
    vectors = interests(Repeats(torch.eye(2)), maker, no_sequences(), torch.zeros(0, 2), torch.eye(2), count)
    assert vectors.shape == (0, count, 2)
