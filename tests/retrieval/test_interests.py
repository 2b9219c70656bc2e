"""Several interests of a history, and what each finds: by hand."""

import numpy as np
import pytest
import torch

from recgpt_torchrec.catalogue import best as best_module
from recgpt_torchrec.catalogue.catalogue import Catalogue
from recgpt_torchrec.config import Batch
from recgpt_torchrec.data.dataset import Dataset, Manifest
from recgpt_torchrec.data.histories import Histories, no_histories
from recgpt_torchrec.data.inputs.features import compute_features
from recgpt_torchrec.data.inputs.spec import Feature, Inputs
from recgpt_torchrec.data.inputs.times import VALUES
from recgpt_torchrec.data.ragged import Ragged
from recgpt_torchrec.data.reading.histories import HistoryReader
from recgpt_torchrec.data.stream import BatchMaker
from recgpt_torchrec.retrieval.interests import append_generated, predict_interests, recall_items
from recgpt_torchrec.retrieval.merging import merge_quota
from tests.support import items_of


def test_what_is_found_does_not_depend_on_how_many_users_are_scored_at_once(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    vectors, items = torch.randn(5, 2, 4, generator=generator), torch.randn(9, 4, generator=generator)
    catalogue, seen = Catalogue.of_vectors(items), Ragged.from_lists([[3, 4], [], [0], [], []])
    whole = recall_items(vectors, catalogue, 8, seen)
    scores = torch.einsum("uid,nd->uin", vectors, items)
    scores[0, :, [3, 4]], scores[2, :, 0] = -torch.inf, -torch.inf
    assert whole.items[0, :, 7].tolist() == [-1, -1]  # seven are left
    assert whole.items[1].tolist() == scores[1].argsort(dim=1, descending=True)[:, :8].tolist()
    assert whole.items[2].tolist() == scores[2].argsort(dim=1, descending=True)[:, :8].tolist()
    monkeypatch.setattr(best_module, "SCORES", {"cpu": 20})
    monkeypatch.setattr(best_module, "FEWEST_ROWS", 1)  # blocks of two queries
    parts = recall_items(vectors, catalogue, 8, seen)
    assert torch.equal(parts.items, whole.items)
    torch.testing.assert_close(parts.scores, whole.scores)


def test_an_appended_entry_is_generated_and_pushes_the_oldest_out():
    histories = Histories(
        users=np.array([0, 1]),
        items=np.array([5, 6, 7, 8]),
        offsets=np.array([0, 3, 4]),
        segments=np.array([0, 1, 0, 0], dtype=np.int8),
    )
    longer = append_generated(histories, np.array([1, 2]), max_len=3)
    assert longer.items.tolist() == [6, 7, 1, 8, 2]
    assert longer.offsets.tolist() == [0, 3, 5]
    assert longer.segments is not None and longer.segments.tolist() == [1, 0, 1, 0, 1]


def test_an_appended_entry_has_the_time_of_the_newest_one_so_that_its_request_stays():
    histories = Histories(
        users=np.array([0, 1]),
        items=np.array([5, 6, 7, 8]),
        offsets=np.array([0, 3, 4]),
        times=np.array([10, 20, 30, 100]),
        request_times=np.array([94, 100]),
    )
    inputs = Inputs(features=[Feature(name=name, values=VALUES[name]) for name in ("past_gap", "next_gap")])
    longer = append_generated(append_generated(histories, np.array([1, 2]), 4), np.array([3, 4]), 4)
    assert longer.times is not None and longer.times.tolist() == [20, 30, 30, 30, 100, 100, 100]
    features = compute_features(inputs, longer, np.arange(7))
    # Seconds 64 = 2^6 are bucket 2 + 12; 10 is 2 + floor(2 * 3.32); a tie is 1. Every token's request is the one asked.
    assert features is not None and features.tolist() == [[0, 8, 1, 1, 0, 1, 1], [8, 14, 14, 14, 1, 1, 1]]


class Repeats(torch.nn.Module):
    """A model whose output is the vector of the newest entry: it expects what it just heard."""

    def __init__(self, catalogue: Catalogue) -> None:
        super().__init__()
        self.catalogue = catalogue

    def forward(self, batch):
        newest = items_of(batch)[batch.item_bag.flatten()[batch.last_slot]]
        vectors = self.catalogue.vectors_of(newest)
        return None, (None, vectors)


def maker_of_two_items() -> BatchMaker:
    dataset = Dataset(path="none", manifest=Manifest(users=1, items=2))
    reader = HistoryReader(dataset=dataset, split="all", max_len=4)
    return BatchMaker(reader=reader, batch=Batch(tokens=8), grows=2)


def heard_item_0(seen: list[int]) -> Histories:
    """The history of one user, item 0, beside what may not be answered."""
    return Histories(users=np.array([0]), items=np.array([0]), offsets=np.array([0, 1]), seen=Ragged.from_lists([seen]))


def test_two_steps_of_a_two_item_catalogue_by_hand():
    catalogue, maker = Catalogue.of_vectors(torch.eye(2)), maker_of_two_items()
    first = torch.tensor([[1.0, 0.5]])  # expects item 0, then item 1
    vectors = predict_interests(Repeats(catalogue), maker, [(heard_item_0(seen=[]), first)], catalogue, 2)
    # Its best item, 0, is appended; the output there is item 0's vector again.
    assert vectors.tolist() == [[[1.0, 0.5], [1.0, 0.0]]]
    lists = recall_items(vectors, catalogue, 2, None)
    assert merge_quota(lists, (1, 1)).items.tolist() == [[0, 1]]  # 0 from the first, the best new one from the second
    # With item 0 seen, item 1 is the best that may be answered, and is what the second step hears.
    found = predict_interests(Repeats(catalogue), maker, [(heard_item_0(seen=[0]), first)], catalogue, 2)
    assert found.tolist() == [[[1.0, 0.5], [0.0, 1.0]]]
    # What was answered once is not answered again; where nothing new is left, item 0 is heard.
    found = predict_interests(Repeats(catalogue), maker, [(heard_item_0(seen=[]), first)], catalogue, 4)
    assert found.tolist() == [[[1.0, 0.5], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]]


@pytest.mark.parametrize("count", [1, 3])
def test_no_history_at_all_takes_part_with_nothing(count):
    catalogue = Catalogue.of_vectors(torch.eye(2))
    vectors = predict_interests(
        Repeats(catalogue), maker_of_two_items(), [(no_histories(), torch.zeros(0, 2))], catalogue, count
    )
    assert vectors.shape == (0, count, 2)
