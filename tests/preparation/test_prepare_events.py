"""Event types in prepare: ids by word, what is held out by type, and what is refused, against plain loops."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.reading.histories import HistoryReader
from recgpt_torchrec.data.split import SplitName
from recgpt_torchrec.data.windows import row_groups
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.prepare import summary
from tests.preparation.prepare_helpers import make, read_keys, read_sequences

Event = tuple[str, str, int, Any]
WORDS = ["view", "buy", "add to cart", None]


def random_events(count: int = 400, users: int = 25, items: int = 15, seed: int = 0) -> list[Event]:
    rng = np.random.default_rng(seed)
    drawn = rng.choice(len(WORDS), size=count, p=[0.5, 0.2, 0.2, 0.1])
    times = rng.permutation(10 * count)[:count]
    return [
        (f"u{rng.integers(users)}", f"i{rng.integers(items)}", int(time), WORDS[word])
        for word, time in zip(drawn, times, strict=True)
    ]


def write(path: Path, events: list[Event]) -> Path:
    """In the format of the path's ending; a missing word is empty text, null or absent."""
    names = ("user_id", "item_id", "timestamp", "event")
    if path.suffix == ".parquet":
        pq.write_table(pa.table({n: [row[k] for row in events] for k, n in enumerate(names)}), path)
    elif path.suffix == ".jsonl":
        rows = [{n: v for n, v in zip(names, row, strict=True) if v is not None} for row in events]
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    elif path.suffix == ".inter":
        lines = ["\t".join(f"{n}:token" for n in names).replace("timestamp:token", "timestamp:float")]
        path.write_text("\n".join(lines + ["\t".join(str(v or "") for v in row) for row in events]) + "\n")
    else:
        path.write_text("\n".join([",".join(names), *(",".join(str(v or "") for v in row) for row in events)]) + "\n")
    return path


def words_of(folder: Path) -> list[str]:
    return json.loads((folder / "manifest.json").read_text())["events"]


def read_words(folder: Path) -> dict[str, list[str | None]]:
    """User -> the words of the events, in the order of the dataset."""
    words = [None, *words_of(folder)]
    return {user: [words[id] for id in ids] for user, ids in read_sequences(folder, "event_ids").items()}


def in_order(events: list[Event], column: int) -> dict[str, list[Any]]:
    result: dict[str, list[Any]] = {}
    for row in sorted(events, key=lambda row: row[2]):
        result.setdefault(row[0], []).append(row[column])
    return result


@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl", "inter"])
def test_every_format_keeps_the_type_of_each_event(tmp_path, ending):
    events = random_events()
    result = make(write(tmp_path / f"log.{ending}", events), tmp_path / "data", event_column="event")
    assert read_sequences(tmp_path / "data") == in_order(events, 1)
    assert read_words(tmp_path / "data") == in_order(events, 3)
    counts = Counter(row[3] for row in events)
    by_frequency = sorted((w for w in counts if w), key=lambda w: (-counts[w], w))
    assert words_of(tmp_path / "data") == by_frequency
    record = result.manifest.preparation["events"]
    assert record == {"rows": {w: counts[w] for w in by_frequency}, "unknown": counts[None]}
    text = summary(Prepare(input=["log"], output="data", event_column="event"), result)
    assert f"events      view {counts['view']}, " in text and f"unknown {counts[None]} (event)" in text
    assert Dataset.open(str(tmp_path / "data")).manifest.events == by_frequency


def test_words_are_spelled_like_keys_and_null_words_are_unknown(tmp_path):
    rows = [("a", "i", 1, " 2"), ("a", "i", 2, "2.0"), ("a", "i", 3, "NULL"), ("a", "i", 4, "3")]
    make(write(tmp_path / "log.csv", rows), tmp_path / "data", event_column="event")
    assert words_of(tmp_path / "data") == ["2", "3"]
    assert read_sequences(tmp_path / "data", "event_ids") == {"a": [1, 1, 0, 2]}


def test_a_later_log_keeps_the_ids_of_words_and_adds_new_ones_after_them(tmp_path):
    first = [("a", "i", 1, "view"), ("a", "j", 2, "buy"), ("a", "i", 3, "view")]
    later = [*first, *(("a", "j", 10 + k, word) for k, word in enumerate(["wish", "fav", "fav", "wish", "save"]))]
    make(write(tmp_path / "1.csv", first), tmp_path / "one", event_column="event")
    options = {"event_column": "event", "vocabulary": str(tmp_path / "one")}
    make(write(tmp_path / "2.csv", later), tmp_path / "two", **options)
    assert words_of(tmp_path / "two") == ["view", "buy", "fav", "wish", "save"]
    assert read_sequences(tmp_path / "two", "event_ids") == {"a": [1, 2, 1, 4, 3, 3, 4, 5]}
    with pytest.raises(InputError, match=r"has event types \(view, buy\); name their column .* --event_column"):
        make(tmp_path / "2.csv", tmp_path / "three", vocabulary=str(tmp_path / "one"))


def test_types_and_shown_rows_may_come_of_the_same_column(tmp_path):
    events = [("a", "i", 1, "buy"), ("a", "j", 2, "view"), ("a", "k", 3, "cart"), ("a", "j", 4, "buy")]
    options = {"click_column": "event", "click_values": ["buy", "cart"], "event_column": "event"}
    make(write(tmp_path / "log.csv", events), tmp_path / "data", hold_out="none", **options)
    assert read_sequences(tmp_path / "data") == {"a": ["i", "j", "k", "j"]}
    assert read_sequences(tmp_path / "data", "segment_ids") == {"a": [0, 2, 0, 0]}
    assert read_words(tmp_path / "data") == {"a": ["buy", "view", "cart", "buy"]}


def read_split(folder: Path, split: SplitName) -> dict[str, tuple[list[str], str | None]]:
    """User -> the keys of the history, and the held-out item's."""
    dataset = Dataset.open(str(folder))
    users, items = read_keys(folder, "users", "user_id"), read_keys(folder, "items", "item_id")
    histories = HistoryReader(dataset=dataset, split=split, max_len=999).read(row_groups(dataset))
    held_out = [None] * histories.users.size if histories.held_out is None else histories.held_out.tolist()
    return {
        users[user]: ([items[i] for i in histories.part(n, n + 1).items], None if held is None else items[held])
        for n, (user, held) in enumerate(zip(histories.users.tolist(), held_out, strict=True))
    }


@pytest.mark.parametrize("targets", [["buy"], ["buy", "add to cart"]])
def test_the_last_two_of_the_target_types_are_held_out_after_everything_before(tmp_path, targets):
    events = [
        *random_events(seed=3),
        ("one buy", "i1", 1, "view"),
        ("one buy", "i2", 2, "buy"),
        ("no buy", "i1", 1, "view"),
    ]
    events += [("only buys", "i1", 1, "buy"), ("only buys", "i2", 2, "buy"), ("only buys", "i3", 3, "view")]
    options = {"event_column": "event", "hold_out": "targets", "target_events": targets}
    result = make(write(tmp_path / "log.csv", events), tmp_path / "data", **options)
    wanted: dict[SplitName, dict[str, Any]] = {"training": {}, "validation": {}, "test": {}}
    for user, items in in_order(events, 1).items():
        words = in_order(events, 3)[user]
        places = [n for n, word in enumerate(words) if word in targets][-2:]
        if len(places) < 2 or places[0] == 0:
            wanted["training"][user] = (items, None)
            continue
        wanted["training"][user] = (items[: places[0]], None)
        wanted["validation"][user] = (items[: places[0]], items[places[0]])
        wanted["test"][user] = (items[: places[1]], items[places[1]])
    for split, expected in wanted.items():
        assert read_split(tmp_path / "data", split) == expected, split
    assert {"one buy", "no buy", "only buys"} <= wanted["training"].keys() - wanted["test"].keys()
    record = result.manifest.preparation["split"]
    assert record["test_users"] == record["validation_users"] == len(wanted["test"]) > 5
    trained = Counter(item for history, _ in wanted["training"].values() for item in history)
    table = pq.read_table(tmp_path / "data" / "items").to_pylist()
    assert {row["key"]: row["train_count"] for row in table} == {row["key"]: trained[row["key"]] for row in table}


def test_parts_begin_in_the_order_of_places_where_times_are_equal(tmp_path):
    rows = ["a,view,1,1", "b,buy,2,2", "c,view,2,1", "d,buy,3,2", "e,view,3,1"]
    (tmp_path / "log.csv").write_text("item_id,event,timestamp,place,user_id\n" + "".join(f"{r},u\n" for r in rows))
    options = {"hold_out": "targets", "target_events": ["buy"], "event_column": "event", "position_column": "place"}
    make(tmp_path / "log.csv", tmp_path / "data", **options)
    assert read_sequences(tmp_path / "data") == {"u": ["a", "c", "b", "e", "d"]}
    (row,) = pq.read_table(tmp_path / "data" / "sequences").to_pylist()
    assert (row["validation_start"], row["test_start"]) == (2, 4)


def test_a_type_of_shown_rows_alone_is_no_target(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp,event\nu,a,1,buy\nu,b,2,view\nu,c,3,buy\n")
    options = {"event_column": "event", "click_column": "event", "click_values": ["buy"]}
    with pytest.raises(InputError, match="--target_events view: none of the 2 interactions that are kept is of these"):
        make(tmp_path / "log.csv", tmp_path / "data", hold_out="targets", target_events=["view"], **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"event_column": "user_id"}, r"--event_column user_id: it has 300 different values, such as 'u0' and 'u1'"),
        ({"event_column": "empty"}, r"--event_column empty: it has no value in any of 300 usable rows"),
        ({"event_column": "kind"}, r"has no column 'kind' for the event; it has .*--event_column"),
        (
            {"event_column": "event", "hold_out": "targets", "target_events": ["by"]},
            r"--target_events by: no row has the event type 'by'; the log has buy \(300\)",
        ),
    ],
)
def test_columns_that_hold_no_event_types_are_refused(tmp_path, options, message):
    rows = [f"u{n},i,{n},buy," for n in range(300)]
    (tmp_path / "log.csv").write_text("\n".join(["user_id,item_id,timestamp,event,empty", *rows]) + "\n")
    with pytest.raises(InputError, match=message):
        make(tmp_path / "log.csv", tmp_path / "data", **options)
    assert not (tmp_path / "data" / "manifest.json").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hold_out": "targets", "event_column": "event"}, "--hold_out targets needs --target_events"),
        ({"hold_out": "targets", "target_events": ["buy"]}, "--hold_out targets needs --event_column"),
        ({"target_events": ["buy"]}, "--target_events belongs to --hold_out targets"),
    ],
)
def test_options_that_do_not_fit_each_other_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Prepare(input=["log"], output="data", **options)


def test_histories_have_no_column_of_types(tmp_path):
    (tmp_path / "log.txt").write_text("a i j k\n")
    with pytest.raises(InputError, match="--event_column event: files of the format sequences have no columns"):
        make(tmp_path / "log.txt", tmp_path / "data", event_column="event")
