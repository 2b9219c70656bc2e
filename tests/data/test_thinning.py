"""Thinned histories: which entries are left out, and that it does not depend on ranks, order or resuming."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recgpt_torchrec.config import Batch, TrainingBatch
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.histories import Histories, no_histories
from recgpt_torchrec.data.ragged import offsets_of
from recgpt_torchrec.data.reading.thinning import FEWEST, thin
from recgpt_torchrec.data.segments import INTERACTED
from recgpt_torchrec.data.windows import Position
from tests.data.stream_helpers import pairs, stream_of
from tests.support import walks, write_dataset


def histories_of(lists: list[list[int]], segments: list[list[int]] | None = None) -> Histories:
    """Histories of the users 0, 1, ..."""
    flat = np.array([item for each in lists for item in each], dtype=np.int64)
    kinds = None if segments is None else np.array([kind for each in segments for kind in each], dtype=np.int8)
    offsets = offsets_of(np.array([len(each) for each in lists], dtype=np.int64))
    return Histories(users=np.arange(len(lists)), items=flat, offsets=offsets, segments=kinds)


def lists_of(histories: Histories) -> list[list[int]]:
    bounds = zip(histories.offsets[:-1], histories.offsets[1:], strict=True)
    return [histories.items[start:stop].tolist() for start, stop in bounds]


def is_part_in_order(part: list[int], whole: list[int]) -> bool:
    rest = iter(whole)
    return all(item in rest for item in part)


@given(st.lists(st.integers(0, 12), max_size=30), st.floats(0.05, 0.95), st.floats(0, 1), st.integers(0, 5))
def test_what_is_left_is_in_order_and_long_enough_to_predict(lengths, probability, share, epoch):
    wholes = [list(range(100 * u, 100 * u + n)) for u, n in enumerate(lengths)]
    parts = lists_of(thin(histories_of(wholes), probability, share, 3, epoch))
    assert len(parts) == len(wholes)
    for part, whole in zip(parts, wholes, strict=True):
        assert is_part_in_order(part, whole)
        assert len(part) >= min(FEWEST, len(whole))


def test_the_share_of_histories_and_of_their_entries_is_what_was_asked_for():
    wholes = [list(range(20)) for _ in range(4000)]
    lengths = np.array([len(part) for part in lists_of(thin(histories_of(wholes), 0.3, 0.25, 1, 0))])
    touched = lengths < 20  # whole by chance: .7 ** 20, 1 in 1,250
    assert touched.mean() == pytest.approx(0.25, abs=0.02)
    assert lengths[touched].mean() == pytest.approx(20 * 0.7, abs=0.2)


def test_every_epoch_and_every_seed_leaves_out_other_entries_and_every_entry_is_read_in_some():
    whole = histories_of([list(range(10))] * 50)
    thinned = {key: thin(whole, 0.5, 1.0, *key).items.tolist() for key in [(0, e) for e in range(20)] + [(1, 0)]}
    assert len({tuple(each) for each in thinned.values()}) == len(thinned)
    assert set().union(*thinned.values()) == set(range(10))
    assert thin(whole, 0.5, 1.0, 0, 7).items.tolist() == thinned[0, 7]


def test_a_user_is_thinned_alike_wherever_it_stands_in_the_batch():
    whole = histories_of([list(range(8))] * 6)
    alone = [lists_of(thin(whole.part(u, u + 1), 0.5, 0.5, 0, 0))[0] for u in range(6)]
    assert lists_of(thin(whole, 0.5, 0.5, 0, 0)) == alone
    assert lists_of(thin(whole.reorder(np.arange(6)[::-1]), 0.5, 0.5, 0, 0)) == alone[::-1]


def test_prompts_stay_and_go_with_the_interacted_entry_they_follow():
    # Prompts are numbered 10 times their item, plus 1, 2, ...; 5 stands before any item.
    items, kinds = [5, 1, 11, 12, 2, 3, 31, 4], [1, 0, 1, 2, 0, 0, 1, 0]
    kept_items: Counter[int] = Counter()
    for epoch in range(40):
        (left,) = lists_of(thin(histories_of([items], [kinds]), 0.5, 1.0, 0, epoch))
        expected = [i for i in items if i == 5 or (i if i < 10 else i // 10) in left]
        assert left == expected
        kept_items.update(i for i in left if i < 10)
    assert all(0 < kept_items[i] < 40 for i in (1, 2, 3, 4)) and kept_items[5] == 40
    assert INTERACTED == 0


@pytest.mark.parametrize(("probability", "share"), [(0.0, 1.0), (0.5, 0.0)])
def test_nothing_is_left_out_unless_asked_for(probability, share):
    whole = histories_of([[1, 2, 3]])
    assert thin(whole, probability, share, 0, 0) is whole
    assert thin(no_histories(), 0.5, 1.0, 0, 0).items.size == 0


def test_any_number_of_ranks_trains_the_same_thinned_pairs_and_reports_all_entries_as_read(tmp_path):
    histories = walks(users=60, items=40, seed=5)
    write_dataset(tmp_path, histories, items=40)
    found = []
    for ranks in (1, 2, 3):
        stream = stream_of(Dataset.open(str(tmp_path)), max_len=8, tokens=40, thinning=(0.5, 0.5))
        of_ranks: Counter[tuple] = Counter()
        read = 0.0
        for rank in range(ranks):
            for batch in stream.batches(1, Position(1), rank, ranks):
                of_ranks.update(pairs(batch))
                assert batch.histories.read is not None
                read += batch.histories.read.sum()
        found.append((of_ranks, read))
    assert found[0] == found[1] == found[2]
    whole = stream_of(Dataset.open(str(tmp_path)), max_len=8, tokens=40)
    every, entries = Counter[tuple](), 0.0
    for batch in whole.batches(1, Position(1)):
        assert batch.histories.read is not None
        every.update(pairs(batch))
        entries += batch.histories.read.sum()
    assert 0.6 * every.total() < found[0][0].total() < 0.95 * every.total()
    assert found[0][1] == entries


@pytest.mark.parametrize("values", [{"thinning": 1.0}, {"thinning": -0.1}, {"thinned": 1.5}])
def test_what_cannot_be_is_refused(values):
    with pytest.raises(ValueError, match=f"--batch.{next(iter(values))}"):
        TrainingBatch(**values)
    assert Batch(tokens=64).tokens == 64
