"""`prepare --append` with ids that are slots of a table of fixed size, against days prepared anew with --vocabulary."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.reading.histories import HistoryReader
from recgpt_torchrec.data.windows import row_groups
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.days.appending import append
from recgpt_torchrec.prepare import summarize_day
from tests.preparation.prepare_helpers import Row, write_csv
from tests.preparation.test_append import append_day
from tests.preparation.test_ids import DAY, prepare_days

DAYS = 3
MANAGED: dict[str, Any] = {"ids": "managed", "user_rows": 30, "item_rows": 35}
"""On the third day users who are gone for two days lose their rows, and those who are gone for one keep theirs."""
HASHED: dict[str, Any] = {"ids": "hash", "user_rows": 15, "item_rows": 20}


def moving_log(days: int) -> list[Row]:
    """Each day has its own ten items beside twenty of the days around it, and its own six users beside eighteen."""
    source = random.Random(0)
    return [
        (f"u{source.randrange(6 * day, 24 + 6 * day)}", f"i{source.randrange(10 * day, 30 + 10 * day)}", day * DAY + n)
        for day in range(days)
        for n in sorted(source.sample(range(DAY), 150))
    ]


def rows_of(log: list[Row], day: int) -> list[Row]:
    return [row for row in log if day * DAY <= row[2] < (day + 1) * DAY]


def read_table(folder: Path, day: int, name: str) -> list[dict[str, Any]]:
    manifest = Dataset.open(str(folder / f"data/days/{day:04d}")).manifest
    parts = {"items": manifest.item_parts, "users": manifest.user_parts, "sequences": manifest.sequences}
    parts["item_keys"] = [part for part in manifest.key_parts if "/item_keys/" in part.path]
    return [row for part in parts[name] for row in pq.read_table(folder / "data" / part.path).to_pylist()]


@pytest.fixture(scope="module")
def managed(tmp_path_factory) -> Path:
    """Three days in managed tables, of which the first alone names the options of ids."""
    folder = tmp_path_factory.mktemp("managed_days")
    log = moving_log(DAYS)
    for day in range(DAYS):
        append_day(folder, rows_of(log, day), day + 1, history=12, hold_out="last", **({} if day else MANAGED))
    return folder


@pytest.mark.parametrize("days, options", [(DAYS, MANAGED), (2, HASHED)])
def test_slots_are_those_of_days_prepared_anew(managed, tmp_path, days, options):
    """The ids, and all that the policy knows of each slot, are those of a chain of datasets of the whole log."""
    folder, log = managed, moving_log(DAYS)
    if options is HASHED:
        folder = tmp_path
        for day in range(days):
            append_day(folder, rows_of(log, day), day + 1, **options)
    logs = [
        write_csv(tmp_path / f"to{day}.csv", [row for row in log if row[2] < (day + 1) * DAY]) for day in range(days)
    ]
    chain = prepare_days(tmp_path / "chain", days, logs, **options)
    ids = "item_id", "user_id", "key", "since", "seen", "last_seen", "bucket", "keys"
    for day in range(days):
        for name in ("items", "users"):
            expected = [
                {k: v for k, v in row.items() if k in ids} for row in pq.read_table(chain[day] / name).to_pylist()
            ]
            found = read_table(folder, day + 1, name)
            assert [{k: v for k, v in row.items() if k in ids} for row in found] == expected, (day, name)
            assert (
                options is MANAGED
                or name == "users"
                or [row["count"] for row in found]
                == [row["count"] for row in pq.read_table(chain[day] / name).to_pylist()]
            )
    if options is HASHED:
        listed = [(row["item_id"], row["key"]) for row in read_table(folder, days, "item_keys")]
        expected_keys = pq.read_table(chain[-1] / "item_keys").to_pylist()
        assert listed == [(row["item_id"], row["key"]) for row in expected_keys]


class PlainSlots:
    """The days of a log in tables of fixed size, as plain lists of keys: who has a slot is read of the days."""

    def __init__(self) -> None:
        self.slots: tuple[dict[int, str], dict[int, str]] = ({}, {})
        self.rows: dict[str, list[list[Any]]] = {}
        """By user, [item, time, trained]."""

    def append(self, rows: list[Row], users: list[str], items: list[str]) -> dict[str, list[tuple[str, int, int]]]:
        """The rows of the day."""
        self.rows = {user: own for user, own in self.rows.items() if user in users}
        gone = {key for slot, key in self.slots[1].items() if items[slot] != key}
        self.gone = gone
        day: dict[str, list[tuple[str, int, int]]] = {}
        for user in dict.fromkeys(row[0] for row in rows):
            fresh = [[item, time, 0] for of, item, time in rows if of == user and user in users and item in items]
            if not fresh:
                continue
            own = [entry for entry in self.rows.get(user, []) if entry[0] not in gone][-14:] + fresh
            day[user] = [(item, time, trained) for item, time, trained in own]
            for entry in own[: len(own) - 2] if len(own) >= 3 else own:
                entry[2] = 1
            self.rows[user] = own[-14:]
        for user, own in self.rows.items():
            if user not in day:
                self.rows[user] = [entry for entry in own if entry[0] not in gone]
        self.slots = dict(enumerate(users)), dict(enumerate(items))
        return day


def test_histories_hold_what_a_plain_loop_leaves_of_them(managed):
    plain, log, forgotten = PlainSlots(), moving_log(DAYS), 0
    for day in range(DAYS):
        users, items = ([row["key"] for row in read_table(managed, day + 1, name)] for name in ("users", "items"))
        expected = plain.append(sorted(rows_of(log, day), key=lambda row: row[2]), users, items)
        found = {
            users[row["user_id"]]: [
                (items[item], time, trained)
                for item, time, trained in zip(row["item_ids"], row["timestamps"], row["trained"], strict=True)
            ]
            for row in read_table(managed, day + 1, "sequences")
        }
        assert found == expected
        manifest = Dataset.open(str(managed / f"data/days/{day + 1:04d}")).manifest
        forgotten += manifest.preparation["ids"]["forgotten"]
        left_out = sum(user not in users or item not in items for user, item, _ in rows_of(log, day))
        assert manifest.preparation["ids"]["left_out"] == left_out
    assert forgotten > 0
    # Together: users who still have their slot, without the items that have lost theirs since their newest day.
    whole = Dataset.open(str(managed / "data"))
    read = HistoryReader(dataset=whole, split="all", max_len=1000).read(row_groups(whole))
    newest = {
        users[user]: [items[item] for item in read.items[read.offsets[place] : read.offsets[place + 1]]]
        for place, user in enumerate(read.users)
    }
    for user, own in plain.rows.items():
        history = [item for item, _, _ in own]
        assert newest.pop(user, [])[-14:] == history, user
    assert not newest
    assert {*plain.rows} - {row[0] for row in rows_of(log, DAYS - 1)}, "some have a row, and no interaction this day"
    assert whole.manifest.count_targets("test") is None
    test = HistoryReader(dataset=whole, split="test", max_len=1000).read(row_groups(whole))
    expected_targets = {user: own[-1][0] for user, own in plain.rows.items() if len(own) >= 3}
    assert test.held_out is not None
    assert {users[u]: items[i] for u, i in zip(test.users, test.held_out, strict=True)} == expected_targets


def test_an_item_whose_row_changed_hands_has_the_counts_of_its_new_key(managed):
    log = moving_log(DAYS)
    before, now = (read_table(managed, day, "items") for day in (DAYS - 1, DAYS))
    users = {row["key"] for row in read_table(managed, DAYS, "users")}
    changed = [slot for slot, row in enumerate(now) if slot < len(before) and before[slot]["key"] != row["key"]]
    assert changed
    for slot in changed:
        own = [row for row in rows_of(log, DAYS - 1) if row[1] == now[slot]["key"] and row[0] in users]
        assert now[slot]["count"] == len(own)
        assert now[slot]["since"] == DAYS - 1
    assert (np.array([row["since"] for row in now]) <= DAYS - 1).all()


def test_options_of_ids_are_fixed_at_the_first_day(managed, tmp_path):
    log = moving_log(DAYS + 1)
    later: dict[str, Any] = {"history": 12, "hold_out": "last"}
    for changed, message in (
        ({"item_rows": 36}, "--item_rows: 35 there, 36 now"),
        ({"eviction": "lfu"}, "--eviction: lru there, lfu now"),
        ({"ids": "hash"}, "--ids: managed there, hash now"),
    ):
        with pytest.raises(InputError, match=message):
            append_day(managed, rows_of(log, DAYS), DAYS + 1, **{**later, **MANAGED, **changed})
    with pytest.raises(InputError, match="which the first day fixes; give --item_rows"):
        append_day(tmp_path, rows_of(log, 0), 1, ids="managed")
    append_day(tmp_path, rows_of(log, 0), 1)
    with pytest.raises(InputError, match="--ids: vocabulary there, managed now"):
        append_day(tmp_path, rows_of(log, 1), 2, **MANAGED)
    result = append_day(managed, rows_of(moving_log(DAYS), DAYS - 1), DAYS, **{**later, **MANAGED})
    assert result.already_there
    text = summarize_day(Prepare(append=True, input=["x"], output=str(managed / "data"), **later), result)
    assert "35 of 35 rows of items are used (100%)" in text and "whose item has lost its row" in text


def test_days_without_times_are_a_step_each_and_bring_attributes_of_the_rows_new_owners(tmp_path):
    days = [["a,x", "a,y", "b,x"], ["a,y", "b,z", "b,y"], ["a,y", "a,w", "b,w"]]
    for number, rows in enumerate(days, 1):
        (tmp_path / f"{number}.csv").write_text("user_id,item_id\n" + "\n".join(rows) + "\n")
        (tmp_path / f"items{number}.csv").write_text("item_id,colour\nx,red\ny,blue\nz,green\nw,white\n")
        append(
            Prepare(
                append=True,
                input=[str(tmp_path / f"{number}.csv")],
                output=str(tmp_path / "data"),
                time_column=None,
                hold_out="none",
                items=[str(tmp_path / f"items{number}.csv")],
                item_attributes=["colour"],
                ids="managed",
                item_rows=2,
            )
        )
        (attribute,) = Dataset.open(str(tmp_path / "data")).manifest.attributes
        words = [w for part in attribute.parts for w in pq.read_table(tmp_path / "data" / part.path)["key"].to_pylist()]
        found = {
            row["key"]: [words[value] for value in row["attribute_colour"]]
            for row in read_table(tmp_path, number, "items")
        }
        assert (
            found
            == [{"x": ["red"], "y": ["blue"]}, {"y": ["blue"], "z": ["green"]}, {"y": ["blue"], "w": ["white"]}][
                number - 1
            ]
        )
    keys = [row["key"] for row in read_table(tmp_path, 3, "items")]
    last = {row["user_id"]: [keys[item] for item in row["item_ids"]] for row in read_table(tmp_path, 3, "sequences")}
    assert sorted(last.values()) == [["y", "w"], ["y", "y", "y", "w"]]
    assert json.loads((tmp_path / "data/days/0003/manifest.json").read_text())["id_tables"][0]["now"] == 3
