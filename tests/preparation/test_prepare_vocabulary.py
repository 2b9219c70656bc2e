"""What prepare makes of a log beside an earlier dataset: ids that stay, new ones after them, what was trained on."""

import hashlib
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from recgpt_torchrec.data.dataset import Dataset, Vocabulary
from recgpt_torchrec.errors import InputError
from tests.preparation.prepare_helpers import Row, make, random_log, read_keys, read_sequences, write_csv


def plain_core(rows: list[Row], k: int, users: list[str], items: list[str]) -> list[Row]:
    """The definition, as a loop: everyone has k interactions, or is known."""
    while True:
        of_user, of_item = Counter(user for user, _, _ in rows), Counter(item for _, item, _ in rows)
        kept = [
            row
            for row in rows
            if (of_user[row[0]] >= k or row[0] in users) and (of_item[row[1]] >= k or row[1] in items)
        ]
        if len(kept) == len(rows):
            return kept
        rows = kept


def plain_ids(present: set[str], known: list[str], seed: int) -> list[str]:
    """Keys by id: the known ones, and the others in a random order."""
    return known + sorted(present - set(known), key=lambda key: hashlib.md5(f"{seed}:{key}".encode()).hexdigest())


def plain_histories(rows: list[Row]) -> dict[str, list[Row]]:
    histories: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row[2]):
        histories.setdefault(row[0], []).append(row)
    return histories


def plain_trained(history: list[Row], old: list[Row]) -> list[int]:
    """1 for what is not newer than the newest of the old training part; at that time, for as many as there were."""
    part = [row[2] for row in (old[:-2] if len(old) >= 3 else old)]
    marks, left = [], part.count(part[-1]) if part else 0
    for _, _, time in history:
        known = bool(part) and (time < part[-1] or (time == part[-1] and left > 0))
        left -= known and time == part[-1]
        marks.append(int(known))
    return marks


def vocabularies(folder: Path) -> tuple[list[str], list[str]]:
    return read_keys(folder, "users", "user_id"), read_keys(folder, "items", "item_id")


def column(folder: Path, name: str) -> dict[str, int]:
    """A column of `items/` by key."""
    table = pq.read_table(folder / "items")
    return dict(zip(table["key"].to_pylist(), table[name].to_pylist(), strict=True))


events = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 6), st.integers(0, 9)).map(lambda e: (f"u{e[0]}", f"i{e[1]}", e[2])),
    min_size=1,
    max_size=40,
)


AT_ONE_TIME = [("u0", f"i{item}", time) for item, time in enumerate((1, 2, 2, 5, 6))]
"""Of these the first three are trained on, two of them at the time of the newest."""


@hypothesis_settings(max_examples=6)
@example(first=AT_ONE_TIME, second=[("u0", "i6", 2), ("u0", "i6", 3)], k=1, whole=True)
@given(first=events, second=events, k=st.integers(1, 3), whole=st.booleans())
def test_ids_counts_histories_and_marks_agree_with_plain_loops(
    tmp_path_factory, first: list[Row], second: list[Row], k: int, whole: bool
) -> None:
    """The second log holds the first one, or not."""
    folder = tmp_path_factory.mktemp("extended")
    log = first + second if whole else second
    old = plain_core(first, k, [], [])
    if not old:
        return
    make(write_csv(folder / "1.csv", first), folder / "old", min_count=k)
    users, items = vocabularies(folder / "old")
    assert users == plain_ids({user for user, _, _ in old}, [], 0)
    kept = plain_core(log, k, users, items)
    second_log = write_csv(folder / "2.csv", log)
    if not {item for _, item, _ in kept} & set(items):
        with pytest.raises(InputError):
            make(second_log, folder / "new", min_count=k, vocabulary=str(folder / "old"), seed=7)
        return
    manifest = make(second_log, folder / "new", min_count=k, vocabulary=str(folder / "old"), seed=7).manifest
    new_users, new_items = plain_ids({u for u, _, _ in kept}, users, 7), plain_ids({i for _, i, _ in kept}, items, 7)
    assert vocabularies(folder / "new") == (new_users, new_items)
    assert (manifest.users, manifest.items, manifest.interactions) == (len(new_users), len(new_items), len(kept))
    histories, before = plain_histories(kept), plain_histories(old)
    found = read_sequences(folder / "new")
    assert found == {user: [row[1] for row in histories.get(user, [])] for user in new_users}
    marks = read_sequences(folder / "new", "trained")
    assert marks == {user: plain_trained(histories.get(user, []), before.get(user, [])) for user in new_users}
    count = Counter(item for _, item, _ in kept)
    assert column(folder / "new", "count") == {item: count[item] for item in new_items}
    trained = Counter(row[1] for h in histories.values() for row in (h[:-2] if len(h) >= 3 else h))
    assert column(folder / "new", "train_count") == {item: trained[item] for item in new_items}
    targets = sum(
        not mark for user, h in histories.items() for mark in marks[user][1 : len(h) - 2 if len(h) >= 3 else len(h)]
    )
    assert manifest.preparation["extends"]["new_targets"] == targets


def test_what_was_trained_on_is_the_earlier_training_part_with_times_and_without(tmp_path: Path) -> None:
    rows = random_log(300, users=12, items=10)
    early = [row for row in rows if row[2] < sorted(r[2] for r in rows)[150]]
    for column in ("timestamp", None):
        folder = tmp_path / str(column)
        folder.mkdir()
        options: dict[str, Any] = {"min_count": 1, "time_column": column, "rows_per_group": 3}
        make(write_csv(folder / "1.csv", early), folder / "old", **options)
        later = write_csv(folder / "2.csv", early + [row for row in rows if row not in early])
        make(later, folder / "new", vocabulary=str(folder / "old"), **options)
        old, new = read_sequences(folder / "old"), read_sequences(folder / "new")
        for user, marks in read_sequences(folder / "new", "trained").items():
            part = old.get(user, [])
            part = part[:-2] if len(part) >= 3 else part
            assert marks == [1] * len(part) + [0] * (len(marks) - len(part))
            assert new[user][: len(part)] == part


def test_ids_within_a_day_are_in_random_order_and_those_of_a_later_day_higher(tmp_path: Path) -> None:
    """Trap 1: an id must not tell when an item appeared. That it is of a later day it does tell."""
    rng = random.Random(0)
    first = [(f"u{rng.randrange(20)}", f"i{item:03d}", item) for item in range(100) for _ in range(3)]
    second = [(f"u{rng.randrange(20)}", f"i{item:03d}", item) for item in range(100, 200) for _ in range(3)]
    make(write_csv(tmp_path / "1.csv", first), tmp_path / "1", min_count=1)
    make(write_csv(tmp_path / "2.csv", first + second), tmp_path / "2", min_count=1, vocabulary=str(tmp_path / "1"))
    days = [int(key[1:]) for key in vocabularies(tmp_path / "2")[1]]
    assert sorted(days[:100]) == list(range(100)) and sorted(days[100:]) == list(range(100, 200))
    for day in (days[:100], days[100:]):
        rising = sum(a < b for a, b in zip(day, day[1:], strict=False))
        assert 30 < rising < 70


def test_the_manifest_says_what_is_extended_over_several_days(tmp_path: Path) -> None:
    rows = random_log(600, users=15, items=900)
    lineage: list[Vocabulary] = []
    previous = None
    for day, events_so_far in enumerate((200, 400, 400, 600)):
        log = write_csv(tmp_path / f"{day}.csv", rows[:events_so_far])
        options: dict[str, Any] = {} if previous is None else {"vocabulary": str(previous)}
        made = make(log, tmp_path / f"day{day}", **options)
        assert made.manifest.lineage == [each for each in lineage if each.fingerprint != made.manifest.vocabulary]
        # Nothing was touched, nothing is done again, and the log of another day is refused.
        assert make(log, tmp_path / f"day{day}", **options).already_there
        previous = tmp_path / f"day{day}"
        manifest = Dataset.open(str(previous)).manifest
        own = Vocabulary(fingerprint=manifest.vocabulary, users=manifest.users, items=manifest.items)
        assert manifest.extends(manifest.vocabulary) == own
        assert [manifest.extends(each.fingerprint) for each in lineage] == lineage
        assert manifest.extends("another") is None
        if own.fingerprint not in [each.fingerprint for each in lineage]:
            lineage = [*lineage, own]
    assert len(lineage) == 3  # the third day brought no new key
    with pytest.raises(InputError, match="vocabulary: .*day2 there, .*day1 now"):
        make(tmp_path / "3.csv", tmp_path / "day3", vocabulary=str(tmp_path / "day1"))
    with pytest.raises(InputError, match="vocabulary: .*day2 there, None now"):
        make(tmp_path / "3.csv", tmp_path / "day3")


def test_without_the_option_the_manifest_does_not_know_it(tmp_path: Path) -> None:
    make(write_csv(tmp_path / "log.csv", random_log(200, users=8, items=10)), tmp_path / "data")
    manifest = json.loads((tmp_path / "data/manifest.json").read_text())
    assert "lineage" not in manifest and manifest["settings"]["vocabulary"] is None
    assert "extends" not in manifest["preparation"]


def test_known_users_and_items_that_do_not_occur_keep_their_ids_without_entries(tmp_path: Path) -> None:
    old = [("a", "x", 1), ("b", "y", 2), ("z", "w", 3)]
    make(write_csv(tmp_path / "1.csv", old), tmp_path / "1", min_count=1)
    new = [("b", "y", 4), ("c", "y", 5), ("c", "y", 6), ("d", "y", 7)]
    made = make(
        write_csv(tmp_path / "2.csv", new),
        tmp_path / "2",
        min_count=2,
        vocabulary=str(tmp_path / "1"),
        rows_per_group=1,
    )
    # b is known: one interaction is enough. d is not.
    assert read_sequences(tmp_path / "2") == {"a": [], "z": [], "b": ["y"], "c": ["y", "y"]}
    assert column(tmp_path / "2", "count") == {"x": 0, "y": 3, "w": 0}
    extends = made.manifest.preparation["extends"]
    names = ("users", "items", "absent_users", "absent_items", "new_targets")
    assert [extends[name] for name in names] == [3, 3, 2, 2, 1]


@pytest.mark.parametrize(
    "vocabulary, message",
    [
        ("data", "is the output folder"),
        ("nowhere", "--vocabulary: .*nowhere is not a dataset"),
        ("unfinished", "--vocabulary: .*unfinished is not a dataset"),
        ("damaged", "--vocabulary: .*the part users/part-00000.parquet is missing"),
        ("others", "none of its 5 items is in the log; its keys are like 'product 0', those of the log .* like 'i0'"),
    ],
)
def test_what_cannot_be_extended_is_refused(tmp_path: Path, vocabulary: str, message: str) -> None:
    log = write_csv(tmp_path / "log.csv", [(f"u{n % 3}", f"i{n % 5}", n) for n in range(60)])
    others = write_csv(tmp_path / "o.csv", [(f"u{n % 3}", f"product {n % 5}", n) for n in range(60)])
    make(others, tmp_path / "others", min_count=1)
    make(others, tmp_path / "damaged", min_count=1)
    (tmp_path / "damaged/users/part-00000.parquet").unlink()
    make(others, tmp_path / "unfinished", min_count=1)
    (tmp_path / "unfinished/manifest.json").unlink()
    with pytest.raises(InputError, match=message):
        make(log, tmp_path / "data", min_count=1, vocabulary=str(tmp_path / vocabulary))
    assert not (tmp_path / "data").exists()


def test_new_keys_can_be_left_out_so_that_the_vocabulary_stays(tmp_path: Path) -> None:
    rows = sorted(random_log(400, 20, 30), key=lambda row: row[2])
    day1, later = rows[:300], [*rows[300:], ("new user", "new item", 10**6), ("u1", "new item", 10**6)]
    old = make(write_csv(tmp_path / "1.csv", day1), tmp_path / "1", min_count=2).manifest
    input = write_csv(tmp_path / "2.csv", day1 + later)
    result = make(input, tmp_path / "2", vocabulary=str(tmp_path / "1"), new_keys="leave_out", min_count=2).manifest
    users, items = (set(keys) for keys in vocabularies(tmp_path / "1"))
    kept = [row for row in day1 + later if row[0] in users and row[1] in items]
    assert result.vocabulary == old.vocabulary and result.lineage == []
    assert vocabularies(tmp_path / "2") == vocabularies(tmp_path / "1")
    assert result.preparation["unknown_left_out"] == len(day1 + later) - len(kept) > 1
    histories = {user: [row[1] for row in history] for user, history in plain_histories(kept).items()}
    assert read_sequences(tmp_path / "2") == {user: histories.get(user, []) for user in users}


def test_new_keys_left_out_belong_to_a_vocabulary_that_knows_some(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--new_keys leave_out belongs to --vocabulary"):
        make(tmp_path / "1.csv", tmp_path / "1", new_keys="leave_out")
    make(write_csv(tmp_path / "1.csv", random_log(50, 5, 5)), tmp_path / "1", min_count=1)
    other = write_csv(tmp_path / "2.csv", [("x", "y", 1), ("x", "z", 2)])
    with pytest.raises(InputError, match="none of the 2 interactions has a user and an item of --vocabulary"):
        make(other, tmp_path / "2", vocabulary=str(tmp_path / "1"), new_keys="leave_out", min_count=1)
