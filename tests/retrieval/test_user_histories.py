"""Histories by user id: the same as in the dataset, in any order of users, from few row groups at a time."""

import numpy as np
import pytest

from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.retrieval.user_histories import UserHistories
from tests.support import walks, write_dataset

USERS, ITEMS = 100, 30
WALKS = walks(USERS, ITEMS, shortest=1, longest=9)
CUT = {"all": 0, "test": 1, "validation": 2}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("histories") / "data", WALKS, items=ITEMS, rows_per_group=4)


@pytest.mark.parametrize("split", CUT)
def test_they_are_what_comes_before_the_held_out_item(dataset, split):
    histories = UserHistories(dataset, split)
    whole = [u for u in range(USERS) if split == "all" or len(WALKS[u]) >= 3]
    for seed in range(3):
        users = np.random.default_rng(seed).permutation(whole)[:20]
        found = histories.of(users)
        assert found.seen is not None
        seen = found.seen.to_lists()
        for row, user in enumerate(users):
            kept = len(WALKS[user]) - CUT[split]
            assert seen[row] == WALKS[user][:kept]
            if split != "all":
                assert found.held_out is not None and found.held_out[row] == WALKS[user][kept]


def test_prompts_are_no_part_of_a_history(tmp_path):
    data = write_dataset(tmp_path / "data", [[1, 5, 2, 3]], items=6, segments=[[0, 1, 0, 0]])
    found = UserHistories(data, "all").of(np.array([0]))
    assert found.seen is not None and found.seen.to_lists() == [[1, 2, 3]]


def test_only_a_few_row_groups_are_held_when_users_come_in_order(dataset):
    histories = UserHistories(dataset, "all")
    read: list[int] = []
    inner = histories.reader.read

    def counted(*arguments, **options):
        read.append(1)
        return inner(*arguments, **options)

    object.__setattr__(histories.reader, "read", counted)
    for first in range(0, USERS, 3):
        histories.of(np.arange(first, min(first + 3, USERS)))
        assert len(histories._read) <= UserHistories.KEPT + 2
    assert len(read) == len(histories.groups)  # each once


def test_a_user_without_a_history_is_named(dataset):
    short = next(u for u in range(USERS) if len(WALKS[u]) < 3)
    with pytest.raises(InputError, match=f"no test history of user {short}"):
        UserHistories(dataset, "test").of(np.array([short]))
    with pytest.raises(InputError, match="no all history of user 100"):
        UserHistories(dataset, "all").of(np.array([5, 100]))
    assert UserHistories(dataset, "all").of(np.zeros(0, dtype=np.int64)).users.size == 0
