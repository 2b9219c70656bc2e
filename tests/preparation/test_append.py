"""`prepare --append` against a plain loop over the rows of the log."""

import json
import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.days.records import Days
from recgpt_torchrec.data.reading.histories import HistoryReader
from recgpt_torchrec.data.windows import row_groups
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.days.appending import append
from recgpt_torchrec.preparation.days.folder import DaysFolder
from tests.preparation.prepare_helpers import Row, make, write_csv
from tests.support import read_files

CASES = int(os.environ.get("RECGPT_CASES", "4"))


def append_day(folder: Path, rows: list[Row], day: int, **options: Any):
    log = write_csv(folder / f"day{day}.csv", rows)
    return append(Prepare(append=True, input=[str(log)], output=str(folder / "data"), **options))


def keys_of(folder: Path, kind: str) -> list[str]:
    """Keys by id, of all days."""
    dataset = Dataset.open(str(folder))
    parts = dataset.manifest.item_parts if kind == "item" else dataset.manifest.user_parts
    rows = [row for part in parts for row in pq.read_table(folder / part.path).to_pylist()]
    assert [row[f"{kind}_id"] for row in rows] == list(range(len(rows)))
    return [row["key"] for row in rows]


def read_day(folder: Path, day: int) -> dict[str, list[tuple[str, int, int]]]:
    """Per user of a day, the entries (item, time, trained)."""
    users, items = keys_of(folder, "user"), keys_of(folder, "item")
    rows = {}
    for part in Dataset.open(str(folder / f"days/{day:04d}")).manifest.sequences:
        for row in pq.read_table(folder / part.path).to_pylist():
            lists = zip(row["item_ids"], row["timestamps"], row["trained"], strict=True)
            assert users[row["user_id"]] not in rows
            rows[users[row["user_id"]]] = [(items[item], time, trained) for item, time, trained in lists]
    return rows


@dataclass
class Entry:
    item: str
    time: int
    trained: bool = False


@dataclass
class PlainDays:
    """What the days of a log hold, kept as plain lists of all entries."""

    history: int
    hold_out: str
    users: dict[str, list[Entry]] = field(default_factory=dict)
    repeated: int = 0
    too_late: int = 0
    late: int = 0

    def append(self, rows: list[Row]) -> tuple[dict[str, list[tuple[str, int, int]]], list[tuple[str, str, tuple]]]:
        """The rows of the day, and its new targets as (user, item, items before)."""
        keep = self.history + (2 if self.hold_out == "last" else 0)
        expected: dict[str, list[tuple[str, int, int]]] = {}
        targets = []
        by_user: dict[str, list[Row]] = {}
        for row in rows:
            by_user.setdefault(row[0], []).append(row)
        for user, own in by_user.items():
            entries = self.users.get(user, [])
            known, cut = entries[-keep:], len(entries) > keep
            there = [(entry.item, entry.time) for entry in known]
            fresh = []
            for _, item, time in own:
                if (item, time) in there:
                    there.remove((item, time))
                    self.repeated += 1
                elif cut and time <= known[0].time:
                    self.too_late += 1
                else:
                    self.late += bool(known) and time < known[-1].time
                    fresh.append(Entry(item, time))
            if not fresh:
                continue
            row_entries = sorted([*known, *fresh], key=lambda entry: entry.time)
            expected[user] = [(entry.item, entry.time, int(entry.trained)) for entry in row_entries]
            trains = len(row_entries) - (2 if self.hold_out == "last" and len(row_entries) >= 3 else 0)
            for place, entry in enumerate(row_entries[:trains]):
                if not entry.trained and place > 0:
                    targets.append((user, entry.item, tuple(each.item for each in row_entries[:place])))
                entry.trained = True
            self.users[user] = entries[: len(entries) - len(known)] + row_entries
        return expected, targets


@st.composite
def days_of_logs(draw: st.DrawFn) -> tuple[list[list[Row]], int, str]:
    """Days of a log with late and repeated rows, the length of histories and what is held out."""
    source = random.Random(draw(st.integers(0, 2**32)))
    count, now = draw(st.integers(2, 4)), 100
    log: list[list[Row]] = []
    for _ in range(count):
        rows: list[Row] = []
        for _ in range(source.randint(1, 25)):
            now += source.choice([0, 0, 1, 3])
            rows.append((f"u{source.randrange(4)}", f"i{source.randrange(5)}", now))
        now += 1
        earlier = [row for day in log for row in day]
        if earlier:
            rows[:0] = source.sample(earlier, min(len(earlier), source.choice([0, 0, 1, 3])))
            rows[:0] = [(f"u{source.randrange(4)}", "i0", 2 * source.randrange(50, now // 2)) for _ in range(2)]
        rows += [("u0", "i0", now)]  # a known item in every day
        log.append(rows)
    return log, draw(st.sampled_from([1, 3, 200])), draw(st.sampled_from(["last", "none"]))


@settings(max_examples=CASES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(days_of_logs())
def test_days_hold_what_a_plain_loop_makes_of_the_log(tmp_path_factory, case):
    log, history, hold_out = case
    folder = tmp_path_factory.mktemp("days")
    plain = PlainDays(history, hold_out)
    seen: dict[str, int] = {}
    for number, rows in enumerate(log, 1):
        expected, targets = plain.append(rows)
        before = (plain.repeated, plain.too_late, plain.late)
        manifest = append_day(folder, rows, number, history=history, hold_out=hold_out).manifest
        assert read_day(folder / "data", number) == expected
        assert manifest.preparation["split"]["training_targets"] == len(targets)
        day = manifest.day
        assert day is not None
        seen = {name: seen.get(name, 0) + getattr(day, name) for name in ("repeated", "too_late", "late")}
        assert (*seen.values(),) == before
    # Together: every user once, with the newest row; counts of items.
    whole = Dataset.open(str(folder / "data"))
    users, items = keys_of(folder / "data", "user"), keys_of(folder / "data", "item")
    keep = history + (2 if hold_out == "last" else 0)
    read = HistoryReader(dataset=whole, split="all", max_len=1000).read(row_groups(whole))
    assert sorted(users[user] for user in read.users) == sorted(plain.users)
    for place, user in enumerate(read.users):
        entries = [items[item] for item in read.items[read.offsets[place] : read.offsets[place + 1]]]
        all_entries = [entry.item for entry in plain.users[users[user]]]
        assert len(entries) >= min(keep, len(all_entries)) and entries == all_entries[-len(entries) :]
    for row in [
        row for part in whole.manifest.item_parts for row in pq.read_table(folder / "data" / part.path).to_pylist()
    ]:
        own = [entry for entries in plain.users.values() for entry in entries if entry.item == row["key"]]
        assert (row["count"], row["train_count"]) == (len(own), sum(entry.trained for entry in own))
    assert whole.manifest.interactions == sum(len(entries) for entries in plain.users.values())
    held_out = sum(len(entries) >= 3 for entries in plain.users.values()) if hold_out == "last" else 0
    assert whole.manifest.count_targets("test") == held_out


@pytest.mark.parametrize("hold_out", ["last", "none"])
def test_the_new_targets_of_all_days_are_those_of_the_whole_log_prepared_at_once(tmp_path, hold_out):
    source = random.Random(3)
    log = [(f"u{source.randrange(30)}", f"i{source.randrange(20)}", 10 + n) for n in range(500)]
    cuts, plain, found = [0, 90, 100, 230, 500], PlainDays(200, hold_out), []
    for number, (first, last) in enumerate(zip(cuts, cuts[1:], strict=False), 1):
        append_day(tmp_path, log[first:last], number, hold_out=hold_out)
        starts = plain.hold_out == "last"
        for user, row in read_day(tmp_path / "data", number).items():
            trains = len(row) - (2 if starts and len(row) >= 3 else 0)
            found += [
                (user, row[place][0], row[place][1], tuple(item for item, _, _ in row[:place]))
                for place in range(1, trains)
                if not row[place][2]
            ]
    make(write_csv(tmp_path / "log.csv", log), tmp_path / "whole", hold_out=hold_out)
    whole = Dataset.open(str(tmp_path / "whole"))
    users, items = (pq.read_table(tmp_path / "whole" / name)["key"].to_pylist() for name in ("users", "items"))
    expected = []
    for part in whole.manifest.sequences:
        for row in pq.read_table(tmp_path / "whole" / part.path).to_pylist():
            names = [items[item] for item in row["item_ids"]]
            trains = len(names) - (2 if hold_out == "last" and len(names) >= 3 else 0)
            expected += [
                (users[row["user_id"]], names[place], row["timestamps"][place], tuple(names[:place]))
                for place in range(1, trains)
            ]
    # A user of two interactions is trained on the second before a third one holds it out, so such a target may be more.
    assert len(found) == len(set(found))
    assert {*found} >= {*expected}
    assert {target[3] for target in {*found} - {*expected}} <= {(item,) for item in items}


def test_an_input_appended_again_changes_nothing_and_part_of_an_earlier_one_is_refused(tmp_path):
    days = [[("a", "x", 1), ("b", "y", 2)], [("a", "y", 3), ("c", "x", 4)], [("a", "x", 5)]]
    for number, rows in enumerate(days[:2], 1):
        assert not append_day(tmp_path, rows, number).already_there
    before = read_files(tmp_path / "data")
    again = append_day(tmp_path, days[1], 7)  # under another name
    assert again.already_there and again.manifest.day.number == 2
    with pytest.raises(InputError, match="has it already, as day 1"):
        append_day(tmp_path, days[0], 8)
    assert read_files(tmp_path / "data") == before
    assert append_day(tmp_path, days[2], 3).manifest.day.number == 3


@pytest.mark.parametrize("moment", ["before the day", "after the day"])
def test_a_killed_append_leaves_the_folder_as_it_was_and_the_next_one_redoes_it(tmp_path, monkeypatch, moment):
    days = [[("a", "x", 1), ("b", "y", 2)], [("a", "y", 3), ("c", "x", 4)]]
    append_day(tmp_path, days[0], 1)
    before = Days.read(str(tmp_path / "data"))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        target = "commit" if moment == "after the day" else "begin"
        patch.setattr(DaysFolder, target, killed)
        with pytest.raises(KeyboardInterrupt):
            append_day(tmp_path, days[1], 2)
    assert Days.read(str(tmp_path / "data")) == before
    assert Dataset.open(str(tmp_path / "data")).manifest.interactions == 2
    assert append_day(tmp_path, days[1], 2).manifest.day.number == 2
    assert Dataset.open(str(tmp_path / "data")).manifest.interactions == 4
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    for number, rows in enumerate(days, 1):
        append_day(undisturbed, rows, number)
    for name, content in read_files(undisturbed / "data").items():
        if not name.endswith(".json"):  # the manifest records where the input lies
            assert (tmp_path / "data" / name).read_bytes() == content


def test_what_does_not_fit_the_days_is_refused(tmp_path):
    append_day(tmp_path, [("a", "x", 10), ("b", "y", 20)], 1)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"seed": 1}, "--seed: 0 there, 1 now"),
        ({"hold_out": "none"}, "--hold_out: last there, none now"),
        ({"item_column": "timestamp"}, "--item_column: item_id there"),
        ({"history": 5}, "--history: 200 there, 5 now"),
    ]
    for options, message in cases:
        with pytest.raises(InputError, match=message):
            append_day(tmp_path, [("a", "x", 30)], 2, **options)
    with pytest.raises(InputError, match="not newer than .*newest row has time 19, day 1 reaches 20"):
        append_day(tmp_path, [("a", "y", 19)], 2)
    with pytest.raises(InputError, match="none of the 2 items .* is in the day"):
        append_day(tmp_path, [("a", "z", 30)], 2)
    with pytest.raises(InputError, match="has all of its interactions already"):
        append_day(tmp_path, [("b", "y", 20)], 2)
    make(write_csv(tmp_path / "log.csv", [("a", "x", 1)]), tmp_path / "plain")
    with pytest.raises(InputError, match="is a dataset, not a folder of days"):
        append(Prepare(append=True, input=[str(tmp_path / "log.csv")], output=str(tmp_path / "plain")))
    with pytest.raises(InputError, match="holds something that is not a finished dataset|already holds"):
        make(tmp_path / "log.csv", tmp_path / "data")
    append_day(tmp_path, [("a", "x", 30)], 2)
    (tmp_path / "data/days/0001").rename(tmp_path / "gone")
    with pytest.raises(InputError, match="day 1 of 2 is missing"):
        append_day(tmp_path, [("a", "x", 40)], 3)
    with pytest.raises(InputError, match="day 1 of 2 is missing"):
        Dataset.open(str(tmp_path / "data"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hold_out": "time", "test_from": "90%"}, "with --append it must be last or none"),
        ({"vocabulary": "data"}, "leave --vocabulary out"),
        ({"engine": "pyspark"}, "leave --engine out"),
        ({"min_count": 3}, "--append keeps every user and item"),
        ({"history": 0}, "--history"),
    ],
)
def test_options_that_do_not_go_with_append_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Prepare(append=True, input=["log.csv"], output="data", **options)


def test_shown_rows_stay_between_interactions_of_different_days(tmp_path):
    header, log = (
        "user_id,item_id,timestamp,click\n",
        [
            ["a,x,1,1", "a,y,2,0", "b,x,1,1", "b,y,3,1"],
            ["a,y,3,1", "b,x,4,0"],
            ["a,x,4,0", "b,x,5,1"],
        ],
    )
    for number, rows in enumerate(log, 1):
        (tmp_path / f"{number}.csv").write_text(header + "\n".join(rows) + "\n")
        options: dict[str, Any] = {"click_column": "click", "hold_out": "none", "history": 3}
        append(Prepare(append=True, input=[str(tmp_path / f"{number}.csv")], output=str(tmp_path / "data"), **options))
    items, users = keys_of(tmp_path / "data", "item"), keys_of(tmp_path / "data", "user")

    def entries(day: int) -> dict[str, list[tuple[str, int, int]]]:
        rows = pq.read_table(tmp_path / f"data/days/{day:04d}/sequences").to_pylist()
        return {
            users[row["user_id"]]: [
                (items[item], segment, trained)
                for item, segment, trained in zip(row["item_ids"], row["segment_ids"], row["trained"], strict=True)
            ]
            for row in rows
        }

    assert entries(1) == {"a": [("x", 0, 0), ("y", 2, 0)], "b": [("x", 0, 0), ("y", 0, 0)]}
    assert entries(2) == {"a": [("x", 0, 1), ("y", 2, 0), ("y", 0, 0)], "b": [("x", 0, 1), ("y", 0, 1), ("x", 2, 0)]}
    assert entries(3) == {
        "a": [("x", 0, 1), ("y", 2, 0), ("y", 0, 1), ("x", 2, 0)],
        "b": [("x", 0, 1), ("y", 0, 1), ("x", 2, 0), ("x", 0, 0)],
    }


def test_a_later_day_need_not_have_rows_of_every_word_of_the_options(tmp_path):
    def append_rows(day: int, rows: list[str]) -> int:
        (tmp_path / f"{day}.csv").write_text("user_id,item_id,timestamp,what\n" + "\n".join(rows) + "\n")
        words = {"click_values": ["click", "buy"], "dislike_values": ["hide"]}
        options: dict[str, Any] = {"click_column": "what", "hold_out": "none", **words}
        config = Prepare(append=True, input=[str(tmp_path / f"{day}.csv")], output=str(tmp_path / "data"), **options)
        return append(config).manifest.interactions

    with pytest.raises(InputError, match="no row has 'buy'"):
        append_rows(1, ["a,x,1,click", "a,y,2,hide"])
    assert append_rows(1, ["a,x,1,click", "a,y,2,hide", "a,y,3,buy"]) == 2
    assert append_rows(2, ["a,x,4,click", "a,y,5,show"]) == 3
    assert append_rows(3, ["a,y,6,buy"]) == 4
    with pytest.raises(InputError, match="no row has 'click' or 'buy'"):
        append_rows(4, ["a,y,7,hide"])


def test_a_damaged_list_of_days_is_told(tmp_path):
    append_day(tmp_path, [("a", "x", 1), ("b", "y", 2)], 1)
    path = tmp_path / "data/days.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "days": ["0001", "0003"]}))
    with pytest.raises(InputError, match=r"days.json is damaged"):
        Dataset.open(str(tmp_path / "data"))


def test_days_carry_event_types_and_tables_of_attributes_as_of_each_day(tmp_path):
    logs = [["a,x,1,view", "b,y,2,buy"], ["a,z,3,gift", "b,x,4,view", "a,x,4,view", "a,x,4,buy"]]
    items = [["x,red", "y,blue"], ["x,green", "y,blue", "z,red"]]
    users = [["a,north", "b,south"], ["a,south", "b,south"]]
    found = []

    def options(day: int, tables: int) -> Prepare:
        return Prepare(
            append=True,
            input=[str(tmp_path / f"log{day}.csv")],
            output=str(tmp_path / "data"),
            hold_out="none",
            event_column="kind",
            items=[str(tmp_path / f"items{tables}.csv")],
            item_attributes=["colour"],
            users=[str(tmp_path / f"users{tables}.csv")],
            user_attributes=["region"],
        )

    for day, (log, item_rows, user_rows) in enumerate(zip(logs, items, users, strict=True), 1):
        for name, header, rows in (
            ("log", "user_id,item_id,timestamp,kind", log),
            ("items", "item_id,colour", item_rows),
            ("users", "user_id,region", user_rows),
        ):
            (tmp_path / f"{name}{day}.csv").write_text("\n".join([header, *rows]) + "\n")
        append(options(day, day))
        manifest = Dataset.open(str(tmp_path / "data")).manifest
        values: dict[str, Any] = {}
        for attribute in manifest.attributes:
            parts = [pq.read_table(tmp_path / "data" / part.path) for part in attribute.parts]
            words = [word for part in parts for word in part["key"].to_pylist()]
            of_entity = manifest.item_parts if attribute.entity == "item" else manifest.user_parts
            described = [row for part in of_entity for row in pq.read_table(tmp_path / "data" / part.path).to_pylist()]
            values |= {row["key"]: [words[value] for value in row[attribute.column]] for row in described}
        found.append(values)
    assert found[0] == {"x": ["red"], "y": ["blue"], "a": ["north"], "b": ["south"]}
    assert found[1] == {"x": ["green"], "y": ["blue"], "z": ["red"], "a": ["south"], "b": ["south"]}
    keys = keys_of(tmp_path / "data", "user")
    events = {
        keys[row["user_id"]]: [manifest.events[event - 1] for event in row["event_ids"]]
        for row in pq.read_table(tmp_path / "data/days/0002/sequences").to_pylist()
    }
    assert events == {"a": ["view", "gift", "view", "buy"], "b": ["buy", "view"]}
    assert append(options(2, 2)).already_there
    with pytest.raises(InputError, match=r"log2.csv: .* has it already, as day 2, with other tables of attributes"):
        append(options(2, 1))
