"""Several interests of a history, and what each finds: by hand."""

import numpy as np
import pytest
import torch

from recgpt_torchrec.data.batch import Sequences
from recgpt_torchrec.retrieval import interests as interests_module
from recgpt_torchrec.retrieval.interests import appended, found_by, interests, masked, top
from recgpt_torchrec.retrieval.merging import merge_quota


def test_top_is_short_where_scores_run_out():
    scores = masked(torch.tensor([[3.0, 1.0, 2.0]]), (np.array([0]), np.array([0, 1])))
    assert top(scores, 5).tolist() == [[2, 1, -1, -1, -1]]


def test_what_is_found_does_not_depend_on_how_many_users_are_scored_at_once(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    vectors, catalogue = torch.randn(5, 2, 4, generator=generator), torch.randn(9, 4, generator=generator)
    seen = (np.array([3, 4, 0]), np.array([0, 2, 2, 3, 3, 3]))
    whole = found_by(vectors, catalogue, 8, seen)
    scores = torch.einsum("uid,nd->uin", vectors, catalogue)
    scores[0, :, [3, 4]], scores[2, :, 0] = -torch.inf, -torch.inf
    assert whole.items[0, :, 7].tolist() == [-1, -1]  # seven are left
    assert whole.items[1].tolist() == scores[1].argsort(dim=1, descending=True)[:, :8].tolist()
    assert whole.items[2].tolist() == scores[2].argsort(dim=1, descending=True)[:, :8].tolist()
    monkeypatch.setattr(interests_module, "SCORES", 20)
    parts = found_by(vectors, catalogue, 8, seen)
    assert torch.equal(parts.items, whole.items)
    torch.testing.assert_close(parts.scores, whole.scores)


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
    lists = found_by(vectors, catalogue, 2, None)
    assert merge_quota(lists, (1, 1)).items.tolist() == [[0, 1]]  # 0 from the first, the best new one from the second
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
