"""Ids as slots of a table of fixed size: by hash, and by torchrec's managed collision."""

import csv
import hashlib
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    LFU_EvictionPolicy,
    LRU_EvictionPolicy,
    MCHManagedCollisionModule,
)
from torchrec.sparse.jagged_tensor import JaggedTensor

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.ids.slots import reassigned_ids
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.ids.managed import ManagedTable
from recgpt_torchrec.prepare import summary
from tests.preparation.prepare_helpers import Row, make, read_keys, read_sequences, write_csv

POLICIES = ("lru", "lfu", "distance_lfu")
DAY = 86400


def feed(table: ManagedTable, keys: dict[int, int], now: int) -> None:
    """Count each key's interactions in step `now`, as `prepare` does: keys with a slot first."""
    found = dict(zip(keys, table.find(np.array([*keys], np.int64)).tolist(), strict=True))
    for has_slot in (True, False):
        some = {key: count for key, count in keys.items() if (found[key] >= 0) == has_slot}
        hashes, counts = np.array([*some], np.int64), np.array([*some.values()], np.int64)
        table.count(hashes, counts, np.full(len(some), now), now)
    table.number_new()


DAYS = st.lists(st.dictionaries(st.integers(0, 40), st.integers(1, 5), min_size=1, max_size=12), min_size=1, max_size=6)


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 20), policy=st.sampled_from(POLICIES), days=DAYS, shuffled=st.randoms())
def test_a_managed_table(rows, policy, days, shuffled):
    """A key keeps its slot while it has one; slots fill from 0 without holes; no two keys share one; and the order of
    the keys and a restart change nothing."""
    table, other = ManagedTable(rows, policy), ManagedTable(rows, policy)
    every = np.arange(41)
    seen: Counter[int] = Counter()
    for number, keys in enumerate(days, 1):
        before = table.find(every)
        feed(table, keys, number)
        after = table.find(every)
        seen.update(keys.keys())
        taken = after[after >= 0]
        assert sorted(taken) == [*range(table.used)]
        assert table.used == min(rows, len(seen)), "a table that is not full refuses nobody"
        kept = (before >= 0) & (after >= 0)
        assert (before[kept] == after[kept]).all()
        permuted = [*keys.items()]
        shuffled.shuffle(permuted)
        feed(other, dict(permuted), number)
        restarted = ManagedTable(rows, policy)
        restarted.restore(*other.state())
        other = restarted
        assert (other.find(every) == after).all()


def plain_eviction(rows: int, policy: str, days: list[dict[int, int]]) -> set[int]:
    """The keys that have a slot in the end, by a plain loop."""
    seen: dict[int, int] = {}
    last: dict[int, int] = {}
    for now, keys in enumerate(days, 1):
        new = {}
        for key, count in keys.items():
            if key in seen:
                seen[key], last[key] = seen[key] + count, now
            else:
                new[key] = count
        for key, count in sorted(new.items(), key=lambda each: (-each[1], each[0])):
            seen[key], last[key] = count, now

        ages = {key: now - last[key] + 1 for key in seen}
        scores = {
            key: {"lru": -ages[key], "lfu": count, "distance_lfu": count / ages[key]}[policy]
            for key, count in seen.items()
        }
        # Where scores are equal, keys with a slot come before new ones, and frequent ones before others.
        ranked = [(-scores[key], key in new, -new.get(key, 0), key) for key in seen]
        seen = {key: seen[key] for *_, key in sorted(ranked)[:rows]}
    return set(seen)


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 15), policy=st.sampled_from(POLICIES), days=DAYS)
def test_who_is_evicted(rows, policy, days):
    table = ManagedTable(rows, policy)
    for number, keys in enumerate(days, 1):
        feed(table, keys, number)
    assert {*np.flatnonzero(table.find(np.arange(41)) >= 0).tolist()} == plain_eviction(rows, policy, days)


@pytest.mark.parametrize("policy", POLICIES)
def test_it_is_what_torchrecs_module_does_with_the_same_interactions_in_a_batch(policy):
    source = np.random.default_rng(1)
    rows, table = 12, ManagedTable(12, policy)
    kind = {"lru": LRU_EvictionPolicy, "lfu": LFU_EvictionPolicy, "distance_lfu": DistanceLFU_EvictionPolicy}[policy]
    module = MCHManagedCollisionModule(rows + 1, torch.device("cpu"), kind(), eviction_interval=1)
    for now in range(1, 8):
        batch = source.integers(0, 30, 40)
        ids = torch.from_numpy(batch)
        module({"key": JaggedTensor(values=ids, lengths=torch.ones(40, dtype=torch.int64))})
        keys, counts = np.unique(batch, return_counts=True)
        table.count(keys, counts, np.full(len(keys), now), now)
        table.number_new()
        theirs = set(module._mch_sorted_raw_ids.tolist()) - {torch.iinfo(torch.int64).max}
        assert {*np.flatnonzero(table.find(np.arange(30)) >= 0).tolist()} == theirs


# -- whole datasets


def growing_log(days: int, seed: int = 0) -> list[Row]:
    """Each day has its own ten items beside twenty of the days around it, and five new users."""
    source = random.Random(seed)
    return [
        (f"u{source.randrange(20 + 5 * day)}", f"i{source.randrange(10 * day, 30 + 10 * day)}", day * DAY + second)
        for day in range(days)
        for second in sorted(source.sample(range(DAY), 150))
    ]


def write_days(folder: Path, days: int, order: random.Random | None = None) -> list[Path]:
    """One log per day that holds all days up to it."""
    rows, logs = growing_log(days), []
    for day in range(days):
        some = [row for row in rows if row[2] < (day + 1) * DAY]
        if order is not None:
            order.shuffle(some)
        logs.append(write_csv(folder / f"log{day}.csv", some))
    return logs


def prepare_days(folder: Path, days: int, logs: list[Path] | None = None, **options: Any) -> list[Path]:
    folder.mkdir(exist_ok=True)
    logs = logs or write_days(folder, days)
    for day in range(days):
        before = {"vocabulary": str(folder / f"data{day - 1}")} if day else {}
        make(logs[day], folder / f"data{day}", **before, **options)
    return [folder / f"data{day}" for day in range(days)]


MANAGED: dict[str, Any] = {"ids": "managed", "user_rows": 22, "item_rows": 35}


@pytest.fixture(scope="module")
def managed(tmp_path_factory) -> list[Path]:
    return prepare_days(tmp_path_factory.mktemp("managed"), 3, **MANAGED)


def test_slots_of_evicted_items_go_to_new_ones_and_histories_drop_their_entries(managed):
    rows = growing_log(3)
    keys = [read_keys(folder, "items", "item_id") for folder in managed]
    assert [len(each) for each in keys] == [30, 35, 35]
    for day in (1, 2):
        since = pq.read_table(managed[day] / "items")["since"].to_pylist()
        before = keys[day - 1]
        for slot, key in enumerate(keys[day][: len(before)]):
            assert (since[slot] == day) == (key != before[slot])
        assert set(keys[day]) >= {item for _, item, time in rows if time >= day * DAY and time < (day + 1) * DAY} & set(
            keys[day - 1]
        ), "an item that was seen today kept its slot"
    has_slot = {*keys[2]}, {*read_keys(managed[2], "users", "user_id")}
    expected: dict[str, list[str]] = {user: [] for user in has_slot[1]}
    for user, item, _ in sorted(rows, key=lambda row: row[2]):
        if item in has_slot[0] and user in has_slot[1]:
            expected[user].append(item)
    assert read_sequences(managed[2]) == expected
    manifest = Dataset.open(str(managed[2])).manifest
    kept = sum(map(len, expected.values()))
    assert manifest.interactions == kept
    assert manifest.preparation["ids"]["left_out"] == len(rows) - kept


def test_new_targets_are_those_that_the_day_before_did_not_train_on(managed):
    """`trained` marks an entry if the earlier dataset's training part held it, of the same user and item."""

    def training_part(folder: Path) -> set[tuple[str, str, int]]:
        items, times = read_sequences(folder), read_sequences(folder, "timestamps")
        return {
            (u, i, t) for u in items for i, t in [*zip(items[u], times[u], strict=True)][: max(len(items[u]) - 2, 0)]
        }

    before, items = training_part(managed[1]), read_sequences(managed[2])
    times, trained = read_sequences(managed[2], "timestamps"), read_sequences(managed[2], "trained")
    marked = 0
    for user, of_user in trained.items():
        for item, time, mark in zip(items[user], times[user], of_user, strict=True):
            assert mark == ((user, item, time) in before)
            marked += mark
    assert 0 < marked < sum(map(len, items.values()))


@pytest.mark.parametrize("options", [{**MANAGED, "eviction": "lfu"}, {"ids": "hash", "item_rows": 20}])
def test_the_order_of_rows_changes_nothing(options, tmp_path):
    (tmp_path / "other").mkdir()
    folders = prepare_days(tmp_path / "one", 2, **options)
    others = prepare_days(tmp_path / "two", 2, write_days(tmp_path / "other", 2, random.Random(3)), **options)
    for one, two in zip(folders, others, strict=True):
        for name in ("items", "users", "sequences"):
            assert pq.read_table(one / name).equals(pq.read_table(two / name)), name
        manifests = [Dataset.open(str(folder)).manifest for folder in (one, two)]
        assert manifests[0].vocabulary == manifests[1].vocabulary
        assert manifests[0].id_tables == manifests[1].id_tables


def test_the_same_log_again_moves_nobody(managed, tmp_path):
    make(managed[2].parent / "log2.csv", tmp_path / "again", vocabulary=str(managed[2]), **MANAGED)
    for name in ("items", "users"):
        before, after = (pq.read_table(folder / name) for folder in (managed[2], tmp_path / "again"))
        assert before.equals(after)
    again = Dataset.open(str(tmp_path / "again")).manifest
    assert again.vocabulary == Dataset.open(str(managed[2])).manifest.vocabulary
    assert again.reassigned_since(again.vocabulary) == {}


def test_reassigned_ids_since_each_earlier_day(managed):
    last = Dataset.open(str(managed[2]))
    keys = [read_keys(folder, "items", "item_id") for folder in managed]
    for day in (0, 1):
        version = last.manifest.reassigned_since(Dataset.open(str(managed[day])).manifest.vocabulary)
        assert version["item"] == day
        (ids,) = reassigned_ids(last, "item", version["item"])
        known = {slot for slot, key in enumerate(keys[day]) if keys[2][slot] != key}
        assert known <= {*ids.tolist()} <= {*range(len(keys[2]))}
        assert {slot for slot in ids.tolist() if slot < len(keys[day])} == known
    assert last.manifest.reassigned_since(last.manifest.vocabulary) == {}


def test_leaving_new_keys_out_changes_no_slot(managed, tmp_path):
    make(
        managed[2].parent / "log2.csv",
        tmp_path / "same",
        vocabulary=str(managed[0]),
        new_keys="leave_out",
        **MANAGED,
    )
    same, before = Dataset.open(str(tmp_path / "same")).manifest, Dataset.open(str(managed[0])).manifest
    assert same.vocabulary == before.vocabulary
    assert [table.until for table in same.id_tables] == [table.until for table in before.id_tables]
    for column in ("key", "since", "last_seen"):
        one, two = (pq.read_table(folder / "items")[column] for folder in (managed[0], tmp_path / "same"))
        assert one.equals(two)


def bucket(key: str, rows: int, seed: int = 0) -> int:
    return (int(hashlib.md5(f"{seed}:{key}".encode()).hexdigest()[:16], 16) >> 1) % rows


def test_keys_with_one_bucket_share_a_row(tmp_path):
    folders = prepare_days(tmp_path, 2, ids="hash", item_rows=20)
    rows = growing_log(3)
    slot_of_bucket: dict[int, int] = {}
    for day, folder in enumerate(folders):
        some = [row for row in rows if row[2] < (day + 1) * DAY]
        counts = Counter(item for _, item, _ in some)
        listed = pq.read_table(folder / "item_keys").to_pylist()
        assert sorted(each["key"] for each in listed) == sorted(counts)
        assert [each["item_id"] for each in listed] == sorted(each["item_id"] for each in listed)
        slot_of = {each["key"]: each["item_id"] for each in listed}
        for key, slot in slot_of.items():
            assert slot_of_bucket.setdefault(bucket(key, 20), slot) == slot, "a bucket keeps its row on every day"
        assert sorted(slot_of_bucket.values()) == [*range(len(slot_of_bucket))]
        items = pq.read_table(folder / "items").to_pylist()
        for each in items:
            sharing = [key for key, slot in slot_of.items() if slot == each["item_id"]]
            assert each["keys"] == len(sharing)
            assert {bucket(key, 20) for key in sharing} == {each["bucket"]}
            assert counts[each["key"]] == max(counts[key] for key in sharing)
            assert each["count"] == sum(counts[key] for key in sharing)
        expected: dict[str, list[int]] = {}
        for user, item, _ in sorted(some, key=lambda row: row[2]):
            expected.setdefault(user, []).append(slot_of[item])
        users = read_keys(folder, "users", "user_id")
        stored = pq.read_table(folder / "sequences")["item_ids"].to_pylist()
        assert dict(zip(users, stored, strict=True)) == expected
        assert len(users) == len(expected), "users have a vocabulary"


def test_what_the_summary_says(managed, tmp_path):
    config = Prepare(input=["x"], output=str(managed[2]), min_count=1, **MANAGED)
    result = make(managed[2].parent / "log2.csv", managed[2], vocabulary=str(managed[1]), **MANAGED)
    assert result.already_there
    text = summary(config, result)
    record = json.loads((managed[2] / "manifest.json").read_text())["preparation"]["ids"]
    assert f"35 of 35 rows of items are used (100%); {record['tables'][1]['evicted']} keys lost theirs" in text
    assert f"{record['left_out']} interactions left out, whose user or item has no row" in text


@pytest.mark.parametrize(
    "options, message",
    [
        ({"item_rows": 10}, "--item_rows 10 belongs to --ids hash or managed"),
        ({"ids": "managed"}, "--ids managed needs the size of a table"),
        ({"ids": "hash", "user_rows": 0}, "--user_rows is 0; it must be from 1"),
        ({"ids": "managed", "item_rows": 5, "eviction_step": 0}, "--eviction_step"),
        ({"ids": "hash", "item_rows": 5, "vocabulary": "x", "new_keys": "leave_out"}, "every key has an id"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        Prepare(input=["x"], output="y", **options)


@pytest.mark.parametrize(
    "changed",
    [
        {"item_rows": 36},
        {"item_rows": 34},
        {"user_rows": None},
        {"eviction": "lfu"},
        {"ids": "hash"},
        {"ids": "vocabulary", "item_rows": None, "user_rows": None},
        {"seed": 1},
        {"eviction_step": 3600},
    ],
)
def test_the_rule_may_not_change_from_day_to_day(managed, changed, tmp_path):
    options = {**MANAGED, **changed}
    with pytest.raises(InputError, match="was prepared with .*, which now is .*tables keep their size"):
        make(managed[2].parent / "log2.csv", tmp_path / "out", vocabulary=str(managed[1]), **options)
    assert not (tmp_path / "out").exists()


def test_days_without_times_cannot_be_told_apart(tmp_path):
    with (tmp_path / "log.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("user_id", "item_id"), *((f"u{n % 5}", f"i{n % 7}") for n in range(40))])
    options = {"ids": "managed", "item_rows": 5, "time_column": None}
    make(tmp_path / "log.csv", tmp_path / "data0", **options)
    with pytest.raises(InputError, match="which needs times, but --time_column is null"):
        make(tmp_path / "log.csv", tmp_path / "data1", vocabulary=str(tmp_path / "data0"), **options)
