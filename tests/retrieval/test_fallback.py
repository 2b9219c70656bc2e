"""`--fallback popular`: users without a vector get the items with the most interactions, against a plain loop."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.retrieval import fallback
from recgpt_torchrec.retrieval.exports.reading import open_export
from recgpt_torchrec.retrieval.fallback import find_absent_users, find_popular, popular_lists
from recgpt_torchrec.retrieval.list_folder import open_lists
from tests.retrieval.filter_helpers import ITEMS, USERS, WALKS, make_export, plain_list, retrieve
from tests.support import stage, training_part
from tools.ranks import run_ranks

ABSENT = [0, 7, 8, USERS - 1]


def counted(trained: bool) -> Counter[int]:
    """How often each item was interacted with, in the training part or at all."""
    return Counter(item for walk in WALKS for item in (training_part(walk) if trained else walk))


def plain_popular(k: int, allowed: list[int], trained: bool) -> list[int]:
    counts = counted(trained)
    return sorted(allowed, key=lambda item: (-counts[item], item))[:k]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A dataset and an export without some of its users."""
    path = tmp_path_factory.mktemp("fallback")
    make_export(path, absent=ABSENT)
    return path


@given(st.integers(1, ITEMS + 5), st.none() | st.sets(st.integers(0, ITEMS - 1), min_size=1), st.booleans())
def test_popular_items_are_those_of_a_plain_sort_whatever_the_block(folder, k, ids, trained):
    before, fallback.BLOCK = fallback.BLOCK, 7
    try:
        allowed = None if ids is None else np.isin(np.arange(ITEMS), list(ids))
        column = "train_count" if trained else "count"
        items, counts = find_popular(Dataset.open(str(folder / "data")), k, allowed, column)  # type: ignore[arg-type]
    finally:
        fallback.BLOCK = before
    assert items.tolist() == plain_popular(k, list(range(ITEMS)) if ids is None else sorted(ids), trained)
    assert counts.tolist() == [counted(trained)[item] for item in items.tolist()]


def absent(rank: int, world_size: int, folder: str) -> tuple[list[int], list[int]]:
    export, dataset = open_export(f"{folder}/vectors"), Dataset.open(f"{folder}/data")
    users = [user for batch in popular_lists(export, dataset, 3, None) for user in batch.users.tolist()]
    return find_absent_users(export, dataset).tolist(), users


def test_each_rank_finds_the_absent_users_of_its_range(folder):
    found = run_ranks(absent, 3, str(folder))
    assert [user for users, _ in found for user in users] == ABSENT
    assert all(users == written for users, written in found) and found[1][0] == []


@pytest.mark.parametrize("history", ["all", "test"])
def test_users_without_a_vector_get_popular_allowed_items(tmp_path, capfd, history):
    make_export(tmp_path, absent=ABSENT, history=history)
    (tmp_path / "deny").write_text("".join(f"item {item}\n" for item in range(0, ITEMS, 2)))
    odd = list(range(1, ITEMS, 2))
    options = {"data": tmp_path / "data", "deny": tmp_path / "deny"}
    without = retrieve(tmp_path, tmp_path / "without", **options)
    found = retrieve(tmp_path, tmp_path / "lists", **options, fallback="popular")
    popular = plain_popular(5, odd, trained=history == "test")
    assert found == without | dict.fromkeys(ABSENT, popular) and without.keys() == set(range(USERS)) - set(ABSENT)
    seen = {user: walk if history == "all" else walk[:-1] for user, walk in enumerate(WALKS)}
    assert without == {user: plain_list(user, 5, odd, seen[user]) for user in without}
    for row in pq.read_table(tmp_path / "lists" / "lists").to_pylist():
        assert row["key"] == f"user {row['user_id']}" and row["item_keys"] == [f"item {i}" for i in row["item_ids"]]
        if row["user_id"] in ABSENT:
            assert set(row["interests"]) == {-1}
            assert row["scores"] == [counted(history == "test")[item] for item in popular]
        else:
            assert set(row["interests"]) == {0}
    assert open_lists(str(tmp_path / "lists")).popular == len(ABSENT)
    assert f"fallback    {len(ABSENT)} users without a vector got popular items" in capfd.readouterr().out
    retrieve(tmp_path, tmp_path / "lists", **options, fallback="popular")
    said = capfd.readouterr().out
    assert "Already there" in said and f"fallback    {len(ABSENT)} users" in said
    retrieve(tmp_path, tmp_path / "lists", 2, **options)
    assert "fallback: popular there, none now" in capfd.readouterr().err


def test_where_every_user_has_a_vector_the_fallback_says_so(tmp_path, capfd):
    make_export(tmp_path)
    found = retrieve(tmp_path, tmp_path / "lists", data=tmp_path / "data", fallback="popular")
    assert len(found) == USERS and "fallback    not needed: every user of --data has a vector" in capfd.readouterr().out


def test_refused(folder, tmp_path, capfd):
    retrieve(folder, tmp_path / "lists", 2, fallback="popular")
    assert "give the dataset whose users and counts it needs: --data" in capfd.readouterr().err
    shutil.copytree(folder / "data", tmp_path / "data")
    part = next((tmp_path / "data" / "users").iterdir())
    part.write_bytes(part.read_bytes()[:-1])
    options = {"--export": folder / "vectors", "--output": tmp_path / "lists", "--data": tmp_path / "data"}
    assert stage("retrieve", {**options, "--k": 5, "--fallback": "popular"}) == 2
    said = capfd.readouterr().err
    assert "the part users/part-00000.parquet" in said and "Traceback" not in said
    assert not (tmp_path / "lists").exists()


def test_lists_are_made_batch_by_batch_however_long_they_are(folder, monkeypatch):
    monkeypatch.setattr(fallback, "PLACES", 2 * ITEMS)
    export, dataset = open_export(str(folder / "vectors")), Dataset.open(str(folder / "data"))
    for k, sizes in {ITEMS: [2, 2], 3 * ITEMS: [1] * 4, 3: [4]}.items():
        assert [len(batch.users) for batch in popular_lists(export, dataset, k, None)] == sizes
