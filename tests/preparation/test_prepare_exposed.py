"""Rows that were shown and not clicked: their place in the history; only the prompts depend on them."""

import csv
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from recgpt_torchrec.config import Batch, Loss, Prepare
from recgpt_torchrec.data.candidates import candidate_source
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.histories import Histories
from recgpt_torchrec.data.reading.histories import HistoryReader
from recgpt_torchrec.data.segments import EXPOSED
from recgpt_torchrec.data.split import SplitName
from recgpt_torchrec.data.stream import BatchMaker
from recgpt_torchrec.data.windows import row_groups, windows_of
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.prepare import summary
from recgpt_torchrec.prompts.intervals import intervals_of, table_of
from tests.preparation.prepare_helpers import make, random_log, read_keys, read_sequences, write_csv
from tests.preparation.test_prepare_bad_input import message
from tests.support import change_json, items_of, write_dataset


class Event(NamedTuple):
    user: str
    item: str
    time: int
    click: Any


def write_log(path: Path, events: list[Event]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["user_id", "item_id", "timestamp", "click"])
        writer.writerows(events)
    return path


def events_of(text: str) -> list[Event]:
    """A log of the words `user item time click`, one event after the other: "u a 1 1, u b 2 0"."""
    words = [event.split() for event in text.split(",")]
    return [Event(user, item, int(time), click) for user, item, time, click in words]


def entries_of(folder: Path) -> dict[str, list[tuple[str, int]]]:
    """User key -> (item key, segment id) of each entry."""
    items, segments = read_sequences(folder), read_sequences(folder, "segment_ids")
    return {user: list(zip(items[user], segments[user], strict=True)) for user in items}


def plainly(events: list[Event], min_count: int, drop: bool) -> tuple[dict[str, list[tuple[str, int]]], dict[str, int]]:
    """What `entries_of` should be, by plain loops, and what became of the shown rows."""
    clicks = [(place, event) for place, event in enumerate(events) if event.click]
    shown = [(place, event) for place, event in enumerate(events) if not event.click]
    counts = {"rows": len(shown)}
    if drop:
        seen: set[tuple] = set()
        unique: list[tuple[int, Event]] = []
        for place, event in clicks + shown:
            if event[:3] not in seen:
                unique.append((place, event))
            seen.add(event[:3])
        clicks, shown = ([pair for pair in unique if bool(pair[1].click) == wanted] for wanted in (True, False))
    while True:
        users, items = Counter(e.user for _, e in clicks), Counter(e.item for _, e in clicks)
        kept = [(p, e) for p, e in clicks if users[e.user] >= min_count and items[e.item] >= min_count]
        if len(kept) == len(clicks):
            break
        clicks = kept
    known = [(place, event) for place, event in shown if event.user in users and event.item in items]
    result, left = {}, 0
    for user in users:
        line = sorted((e.time, place, e.item, 0 if e.click else 2) for place, e in clicks + known if e.user == user)
        places = [number for number, entry in enumerate(line) if entry[3] == 0]
        result[user] = [(item, segment) for _, _, item, segment in line[places[0] :]]
        left += sum(segment == 2 for _, segment in result[user])
    counts |= {"left": left, "outside": len(known) - left}
    return result, counts


EVENTS = st.lists(
    st.builds(Event, st.sampled_from("uvwx"), st.sampled_from("abcde"), st.integers(0, 6), st.booleans()),
    min_size=2,
    max_size=80,
)


@hypothesis_settings(max_examples=12)
@given(events=EVENTS, min_count=st.integers(1, 3), duplicates=st.sampled_from(["keep", "drop"]))
def test_shown_rows_are_placed_between_interactions_as_by_a_plain_loop(
    tmp_path_factory: pytest.TempPathFactory, events: list[Event], min_count: int, duplicates: Any
) -> None:
    assume(0 < sum(event.click for event in events) < len(events))
    expected, counts = plainly(events, min_count, duplicates == "drop")
    assume(expected)
    folder = tmp_path_factory.mktemp("exposed")
    options = {"click_column": "click", "min_count": min_count, "duplicates": duplicates}
    manifest = make(write_log(folder / "log.csv", events), folder / "data", **options).manifest
    assert entries_of(folder / "data") == expected
    logs = manifest.preparation["exposed"]
    assert {name: logs[name] for name in counts} == counts
    assert logs["rows"] == logs["duplicates_dropped"] + logs["unknown"] + logs["outside"] + logs["left"]
    assert manifest.interactions + logs["left"] == manifest.entries == sum(map(len, expected.values()))


def test_everything_but_the_shown_entries_is_as_without_them(tmp_path: Path) -> None:
    """Ids, counts, training counts, lengths and the interacted entries, to the byte."""
    events = [Event(*row, click=place % 3 > 0) for place, row in enumerate(random_log(900, users=40, items=50))]
    events += [Event("only shown to", "i1", 5, False), Event("u1", "only shown", 6, False)]
    options: dict[str, Any] = {"min_count": 9, "seed": 4}
    log = write_log(tmp_path / "log.csv", events)
    shown = make(log, tmp_path / "shown", click_column="click", **options).manifest
    clicked = write_csv(tmp_path / "clicked.csv", [event[:3] for event in events if event.click])
    without = make(clicked, tmp_path / "without", **options).manifest
    assert (shown.item_parts, shown.user_parts) == (without.item_parts, without.user_parts)
    assert (shown.vocabulary, shown.interactions) == (without.vocabulary, without.interactions)
    for name in ("rounds", "lengths"):
        assert shown.preparation[name] == without.preparation[name]
    assert len(shown.preparation["rounds"]) > 0 and shown.preparation["exposed"]["left"] > 100
    for name in ("item_ids", "timestamps"):
        with_shown, segments = (read_sequences(tmp_path / "shown", column) for column in (name, "segment_ids"))
        assert {
            user: [value for value, segment in zip(values, segments[user], strict=True) if segment == 0]
            for user, values in with_shown.items()
        } == read_sequences(tmp_path / "without", name)


def test_columns_are_those_that_generate_prompts_writes(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", events_of("u a 1 1, u b 2 0, u b 3 1"))
    make(log, tmp_path / "data", click_column="click", rating_column="click")
    schema = pq.read_table(tmp_path / "data" / "sequences").schema
    assert schema.names == ["user_id", "item_ids", "timestamps", "ratings", "segment_ids"]
    assert schema.field("segment_ids").type == pa.list_(pa.int8())
    assert read_sequences(tmp_path / "data", "ratings") == {"u": [1, 0, 1]}


def test_without_the_option_no_row_is_shown_only(tmp_path: Path) -> None:
    manifest = make(write_log(tmp_path / "log.csv", events_of("u a 1 1, u b 2 0")), tmp_path / "data").manifest
    assert pq.read_table(tmp_path / "data" / "sequences").schema.names == ["user_id", "item_ids", "timestamps"]
    assert manifest.interactions == 2 and "exposed" not in manifest.preparation


@pytest.mark.parametrize(
    ("log", "expected", "lost"),
    [
        # a user and an item that were only ever shown; v's item is known, but v is not
        ("u a 1 1, u x 2 0, u b 3 1, v a 1 0, v b 2 0", {"u": [("a", 0), ("b", 0)]}, {"unknown": 3}),
        # all of it before the first: it follows no interaction
        ("u b 1 0, u a 1 0, u a 2 1, u b 3 1", {"u": [("a", 0), ("b", 0)]}, {"outside": 2}),
        # after the last one, it is known at the next request
        ("u a 2 1, u b 3 1, u b 3 0, u a 4 0", {"u": [("a", 0), ("b", 0), ("b", 2), ("a", 2)]}, {"left": 2}),
        ("u a 2 1, u a 1 0, u a 3 0", {"u": [("a", 0), ("a", 2)]}, {"outside": 1, "left": 1}),
        # at the time of interactions: in the order of the log
        ("u a 1 1, u c 2 0, u b 2 1, u d 2 0, u c 2 1, u d 2 1", None, {"left": 2}),
    ],
)
def test_boundaries(tmp_path: Path, log: str, expected: Any, lost: dict[str, int]) -> None:
    logs = make(write_log(tmp_path / "log.csv", events_of(log)), tmp_path / "data", click_column="click").manifest
    in_order = {"u": [("a", 0), ("c", 2), ("b", 0), ("d", 2), ("c", 0), ("d", 0)]}
    assert entries_of(tmp_path / "data") == (expected or in_order)
    made_of = logs.preparation["exposed"]
    assert {name: made_of[name] for name in lost} == lost


def test_an_interaction_outlives_the_same_row_that_was_shown(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", events_of("u a 1 1, u b 2 0, u b 2 1, u b 2 1, u a 3 0, u a 3 0, u a 4 1"))
    manifest = make(log, tmp_path / "data", click_column="click", duplicates="drop").manifest
    assert entries_of(tmp_path / "data") == {"u": [("a", 0), ("b", 0), ("a", 2), ("a", 0)]}
    assert manifest.preparation["duplicates_dropped"] == 1
    assert manifest.preparation["exposed"]["duplicates_dropped"] == 2


def test_without_times_rows_keep_the_order_of_the_log(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", events_of("u a 9 1, u b 1 0, u c 5 0, u c 0 1, u b 9 1"))
    make(log, tmp_path / "data", click_column="click", time_column=None)
    assert entries_of(tmp_path / "data") == {"u": [("a", 0), ("b", 2), ("c", 2), ("c", 0), ("b", 0)]}


@pytest.mark.parametrize(
    "values",
    [["1", "0"], ["true", "FALSE"], ["1.0", "0.5"], [" 1 ", "-3"], ["2e0", "nil"]],
)
def test_what_is_a_click_in_text(tmp_path: Path, values: list[str]) -> None:
    yes, no = values
    log = [Event("u", "a", 1, yes), Event("u", "b", 2, no), Event("u", "b", 3, yes), Event("u", "a", 4, "0")]
    log += [Event("u", "b", 5, yes)]
    manifest = make(write_log(tmp_path / "log.csv", log), tmp_path / "data", click_column="click").manifest
    unreadable = no == "nil"
    assert manifest.preparation["rejected"] == ({"unreadable click value": 1} if unreadable else {})
    middle = [("b", 0)] if unreadable else [("b", 2), ("b", 0)]
    assert entries_of(tmp_path / "data") == {"u": [("a", 0), *middle, ("a", 2), ("b", 0)]}


@pytest.mark.parametrize(
    "clicks",
    [
        pa.array([True, False, True, None, True]),
        pa.array([1, 0, 7, None, 1], pa.int8()),
        pa.array([1.0, 0.0, 2.0, float("nan"), 1.0]),
        pa.array(["true", "0", "1", "maybe", "1"]).dictionary_encode(),
        pa.array([5, 0, 5, None, 5], pa.int32()).cast(pa.decimal128(12, 2)),
    ],
)
def test_what_is_a_click_in_parquet(tmp_path: Path, clicks: pa.Array) -> None:
    columns = {"user_id": ["u"] * 5, "item_id": list("abbab"), "timestamp": range(5), "click": clicks}
    pq.write_table(pa.table(columns), tmp_path / "log.parquet")
    result = make(tmp_path / "log.parquet", tmp_path / "data", click_column="click")
    assert entries_of(tmp_path / "data") == {"u": [("a", 0), ("b", 2), ("b", 0), ("b", 0)]}
    assert sum(result.manifest.preparation["rejected"].values()) == 1


def test_keys_that_are_not_numbers_in_a_column_of_floats(tmp_path: Path) -> None:
    """As pandas writes a column with gaps; the file's statistics know nothing of them."""
    columns = {"user_id": [1.0, float("nan"), 1.0], "item_id": ["a", "b", "c"], "timestamp": [1, 2, 3]}
    pq.write_table(pa.table(columns), tmp_path / "log.parquet")
    assert make(tmp_path / "log.parquet", tmp_path / "data").manifest.preparation["rejected"] == {"no user": 1}
    assert read_sequences(tmp_path / "data") == {"1": ["a", "c"]}


def test_json_lines_with_true_and_false(tmp_path: Path) -> None:
    rows = [("a", "true"), ("b", "false"), ("b", "1"), ("a", "null"), ("a", '"true"')]
    lines = [f'{{"user_id": 1, "item_id": "{i}", "timestamp": {n}, "click": {c}}}' for n, (i, c) in enumerate(rows)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    result = make(tmp_path / "log.jsonl", tmp_path / "data", click_column="click")
    assert entries_of(tmp_path / "data") == {"1": [("a", 0), ("b", 2), ("b", 0), ("a", 0)]}
    assert result.manifest.preparation["rejected"] == {"no click value": 1}


RATED = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"


def test_ratings_below_a_number_in_a_recbole_file(tmp_path: Path) -> None:
    lines = ["1\ta\t3\t1", "1\tb\t2.5\t2", "1\tb\t5\t3"]
    (tmp_path / "log.inter").write_text(RATED + "\n".join(lines) + "\n")
    options: dict[str, Any] = {"click_column": "rating", "click_from": 3, "rating_column": "rating"}
    result = make(tmp_path / "log.inter", tmp_path / "data", **options)
    assert entries_of(tmp_path / "data") == {"1": [("a", 0), ("b", 2), ("b", 0)]}
    config = Prepare(input=["log.inter"], output="data", **options)
    assert "shown       1 rows were not clicked; 1 kept after an interaction" in summary(config, result)


def test_what_cannot_be_used_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", events_of("u a 1 1, u b 2 1"))
    text = message(tmp_path, log, click_column="clicked")
    assert "no column 'clicked' for the click; it has 'user_id'" in text and "--click_column" in text
    text = message(tmp_path, log, click_column="click")
    assert "no row was only shown" in text and "values in 2 usable rows are always 1" in text
    text = message(tmp_path, log, click_column="click", click_from=2)
    assert "every row was only shown" in text and "a click is at least 2" in text
    text = message(tmp_path, log, click_column="item_id")
    assert "none of the 2 rows can be used (2 unreadable click value)" in text and "u,a,1,1" in text
    (tmp_path / "log.jsonl").write_text('{"user_id": 1, "item_id": 2, "timestamp": 3}\n' * 20)
    assert "no column 'click' for the click" in message(tmp_path, tmp_path / "log.jsonl", click_column="click")
    (tmp_path / "log.txt").write_text("u a b c\n")
    text = message(tmp_path, tmp_path / "log.txt", click_column="click")
    assert "files of the format sequences have no columns" in text and "a row for each event" in text
    for wrong in ({"click_from": 3}, {"click_column": "click", "click_from": float("nan")}):
        with pytest.raises(ValueError, match="--click_from is"):
            Prepare(input=["x"], output="y", **wrong)


def test_the_command_ends_with_status_2_and_one_line(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", events_of("u a 1 1, u b 2 1"))
    command = [sys.executable, "-m", "recgpt_torchrec.prepare", "--input", str(log), "--output", str(tmp_path / "data")]
    ended = subprocess.run([*command, "--click_column", "click"], capture_output=True, text=True)
    assert (
        ended.returncode == 2
        and "does not tell shown rows from clicked ones" in ended.stderr
        and "Traceback" not in ended.stderr
    )
    assert not (tmp_path / "data").exists()


def test_a_dataset_made_before_the_option_was_there_is_the_same_dataset(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", events_of("u a 1 1, u b 2 0, u a 3 1"))
    make(log, tmp_path / "data")

    def drop_options(manifest: dict[str, Any]) -> None:
        assert (manifest["settings"].pop("click_column"), manifest["settings"].pop("click_from")) == (None, 1)

    change_json(tmp_path / "data/manifest.json", drop_options)
    assert make(log, tmp_path / "data").already_there
    with pytest.raises(InputError, match="click_column: None there, click now"):
        make(log, tmp_path / "data", click_column="click")


def test_a_log_with_shown_rows_larger_than_the_memory_limit(tmp_path: Path) -> None:
    events = [Event(*row, click=int(row[2] % 4 == 0)) for row in random_log(60_000, users=900, items=700)]
    log = write_log(tmp_path / "log.csv", events)
    make(log, tmp_path / "data", memory_limit="80MB", click_column="click", min_count=3)
    assert entries_of(tmp_path / "data") == plainly(events, 3, drop=False)[0]


# ------------------------------------------------------------------------------------------- up to the model's input


def with_prompts(folder: Path, k: int) -> Dataset:
    """The dataset as `generate_prompts --prompts.source exposed` writes it, without its files and processes."""
    table = pq.read_table(folder / "sequences").combine_chunks()
    logs = table_of(intervals_of(table, k, max_len=50, prompt_segments=(EXPOSED,))).to_pydict()
    items = Dataset.open(str(folder)).manifest.items
    return write_dataset(folder / f"prompts-{k}", logs["item_ids"], items=items, segments=logs["segment_ids"])


SPLITS: tuple[SplitName, ...] = ("training", "validation", "test")


def read(dataset: Dataset, split: SplitName) -> tuple[BatchMaker, Histories]:
    """The histories of a split with their prompts, in the order of the dataset."""
    batch, reader = Batch(tokens=4096), HistoryReader(dataset=dataset, prompts=True, split=split, max_len=50)
    maker = BatchMaker(reader=reader, batch=batch, source=candidate_source(Loss(candidates="all"), dataset, batch))
    (window,) = windows_of(row_groups(dataset), 0, 0, 100, shuffle=False)
    return maker, maker.read(window, epoch=0, shuffle=False)


def lists(histories: Histories) -> dict[int, tuple[list[int], list[int]]]:
    """User id -> items and segments of what is read."""
    assert histories.segments is not None
    parts = [np.split(values, histories.offsets[1:-1]) for values in (histories.items, histories.segments)]
    pairs = zip(*parts, strict=True)
    return {
        int(user): (items.tolist(), segments.tolist())
        for user, (items, segments) in zip(histories.users, pairs, strict=True)
    }


def conversations(seed: int, users: int = 6) -> dict[str, list[Event]]:
    """Users who click c0 to c9 and are shown s0 to s9, and one who clicks everything, so that all is in the
    vocabulary."""
    source = np.random.default_rng(seed)
    logs: dict[str, list[Event]] = {}
    for user in (f"u{number}" for number in range(users)):
        clicks = source.random(int(source.integers(8, 30))) < 0.5
        clicks[source.choice(clicks.size, 4, replace=False)] = True
        logs[user] = [
            Event(user, f"{'c' if click else 's'}{source.integers(10)}", 10 * place, int(click))
            for place, click in enumerate(clicks)
        ]
    logs["all"] = [Event("all", f"{kind}{number}", number, 1) for kind in "cs" for number in range(10)]
    return logs


def dataset_of(folder: Path, logs: dict[str, list[Event]], k: int) -> Dataset:
    folder.mkdir()
    log = write_log(folder / "log.csv", [event for events in logs.values() for event in events])
    make(log, folder / "data", click_column="click")
    return with_prompts(folder / "data", k)


@pytest.mark.parametrize("k", [1, 2, 8])
def test_no_target_is_an_item_that_was_only_shown(tmp_path: Path, k: int) -> None:
    dataset = dataset_of(tmp_path / "made", conversations(seed=k), k)
    users = read_keys(tmp_path / "made" / "data", "users", "user_id")
    items = read_keys(tmp_path / "made" / "data", "items", "item_id")
    shown = 0
    for split in SPLITS:
        maker, histories = read(dataset, split)
        if split == "training":
            batch = maker.make(histories)
            owner = batch.histories.users[batch.sequence.flatten()[batch.target_slot].numpy()]
            targets = items_of(batch)[batch.target_bag].numpy()
        else:
            assert histories.held_out is not None
            owner, targets = histories.users, histories.held_out
        kinds = [items[target][0] for user, target in zip(owner, targets, strict=True) if users[user] != "all"]
        assert len(kinds) >= 6 and set(kinds) == {"c"}
        for user, (entries, segments) in lists(histories).items():
            if users[user] != "all":
                assert [items[entry][0] for entry in entries] == ["s" if segment else "c" for segment in segments]
                assert segments[-1] == 0 == segments[0]
                shown += sum(map(bool, segments))
                assert f"{2}" * (k + 1) not in "".join(map(str, segments))
    assert shown > 20


@pytest.mark.parametrize("seed", range(4))
def test_what_comes_after_a_target_does_not_change_what_comes_before(tmp_path: Path, seed: int) -> None:
    logs = conversations(seed)
    source = np.random.default_rng(seed)
    dataset = dataset_of(tmp_path / "now", logs, 2)
    now = {split: lists(read(dataset, split)[1]) for split in SPLITS}

    def changed(from_end: int) -> dict[str, list[Event]]:
        """Other events from the target on, with as many clicks; time advances more slowly."""
        other = {"all": logs["all"]}
        for user in logs.keys() - other.keys():
            events = logs[user]
            cut = [place for place, event in enumerate(events) if event.click][-from_end]
            events, time = events[:cut], events[cut].time
            for _ in range(from_end):
                for _ in range(int(source.integers(0, 4))):
                    events.append(Event(user, f"s{source.integers(10)}", time := time + 1, 0))
                events.append(Event(user, f"c{source.integers(10)}", time := time + 1, 1))
            for _ in range(int(source.integers(0, 4))):
                events.append(Event(user, f"s{source.integers(10)}", time := time + 1, 0))
            other[user] = events
        return other

    other = dataset_of(tmp_path / "after test", changed(1), 2)
    assert {split: lists(read(other, split)[1]) for split in now} == now
    other = dataset_of(tmp_path / "after validation", changed(2), 2)
    assert {split: lists(read(other, split)[1]) for split in SPLITS[:2]} == {split: now[split] for split in SPLITS[:2]}
