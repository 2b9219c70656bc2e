"""A sample of users: exactly so many, by the seed alone, and read from a part of the dataset where that is large."""

from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recgpt_torchrec.config import Batch, Model
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.reading.hashing import hash_numbers
from recgpt_torchrec.data.reading.reader import Reader
from recgpt_torchrec.data.reading.sample import UserSample
from recgpt_torchrec.data.stream import encoding_stream
from recgpt_torchrec.evaluation import sampling
from recgpt_torchrec.evaluation.sampling import choose_users
from tests.support import walks, write_dataset
from tools.ranks import run_ranks

USERS, ITEMS = 400, 20


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Users in 100 row groups; about a fifth have no held-out item."""
    folder = tmp_path_factory.mktemp("sampling") / "data"
    return write_dataset(folder, walks(USERS, ITEMS, shortest=1, longest=9), rows_per_group=4, groups_per_part=5)


def with_target() -> list[int]:
    """Users with held-out items, independent of the package."""
    return [user for user, history in enumerate(walks(USERS, ITEMS, shortest=1, longest=9)) if len(history) >= 3]


def read(dataset: Dataset, sample: UserSample | None, split: Any = "test") -> list[int]:
    """The users that a stream of a sample encodes."""
    stream = encoding_stream(dataset, split, Model(max_len=8, dim=8), Batch(tokens=64), item_keys=4, sample=sample)
    return [int(user) for batch in stream.batches() for user in batch.histories.users]


@pytest.mark.parametrize("users", [1, 7, 60, 250])
def test_a_sample_has_exactly_so_many_users_all_with_a_held_out_item(dataset: Dataset, users: int) -> None:
    sample = choose_users(dataset, "test", users, seed=3)
    assert sample is not None
    chosen = read(dataset, sample)
    assert len(chosen) == len(set(chosen)) == users and set(chosen) <= set(with_target())
    assert read(dataset, choose_users(dataset, "test", users, seed=3)) == chosen
    if users < 250:
        other = choose_users(dataset, "test", users, seed=4)
        assert set(read(dataset, other)) != set(chosen)


def test_a_sample_is_the_smallest_hashes_of_its_row_groups(dataset: Dataset) -> None:
    sample = choose_users(dataset, "test", 30, seed=0)
    assert sample is not None and len(sample.groups) == sampling.GROUPS
    firsts = [20 * group.part + 4 * group.group for group in sample.groups]
    in_groups = {first + row for first in firsts for row in range(4)}
    candidates = np.array(sorted(in_groups & set(with_target())))
    expected = candidates[np.argsort(hash_numbers(candidates, 0))[:30]]
    assert sorted(read(dataset, sample)) == sorted(expected.tolist())


def test_only_the_sample_s_row_groups_are_read(dataset: Dataset) -> None:
    seen = []
    read_group = Reader.read

    def noted(self: Reader, group: Any) -> Any:
        seen.append(group)
        return read_group(self, group)

    with mock.patch.object(sampling, "GROUPS", 5), mock.patch.object(Reader, "read", noted):
        sample = choose_users(dataset, "test", 8, seed=1)
        assert sample is not None and len(seen) == 5
        seen.clear()
        assert len(read(dataset, sample)) == 8
    assert set(seen) == set(sample.groups) and len(seen) == 5


def test_more_users_than_there_are_take_all_with_a_line(dataset: Dataset, capfd: Any) -> None:
    assert choose_users(dataset, "test", USERS, seed=0) is None
    count = len(with_target())
    assert f"Sample: {count} users have a test item, fewer than {USERS}" in capfd.readouterr().out
    assert choose_users(dataset, "test", count, seed=0) is None
    assert choose_users(dataset, "test", 0, seed=0) is None
    assert capfd.readouterr().out == ""


def choose_on_ranks(rank: int, world_size: int, path: str, users: int) -> UserSample | None:
    return choose_users(Dataset.open(path), "validation", users, seed=5)


@pytest.mark.parametrize("users", [20, 240])
def test_every_number_of_ranks_chooses_the_same(dataset: Dataset, users: int) -> None:
    alone = choose_users(dataset, "validation", users, seed=5)
    for world_size in (2, 3):
        for sample in run_ranks(choose_on_ranks, world_size, dataset.path, users):
            assert sample == alone


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=50, unique=True), st.integers(0, 2**32 - 1))
def test_no_two_users_have_the_same_hash(users: list[int], seed: int) -> None:
    assert len(set(hash_numbers(np.array(users), seed).tolist())) == len(users)


def test_hashes_are_spread_evenly_and_differ_by_seed() -> None:
    share = hash_numbers(np.arange(100_000), 0) / 2.0**64
    counts, _ = np.histogram(share, 10, (0, 1))
    assert abs(counts - 10_000).max() < 400  # four standard deviations
    assert abs(np.corrcoef(share, hash_numbers(np.arange(100_000), 1) / 2.0**64)[0, 1]) < 0.02
