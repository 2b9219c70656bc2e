"""Histories: slicing, reordering and joining keep every column with its rows."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.histories import Histories, join, no_histories
from recgpt_torchrec.data.ragged import Ragged, offsets_of
from recgpt_torchrec.data.reading.histories import HistoryReader
from recgpt_torchrec.data.split import SPLITS
from recgpt_torchrec.data.windows import row_groups
from tests.support import walks, write_dataset

PER = {f.name: f.metadata["per"] for f in fields(Histories) if "per" in f.metadata}
"""Every column, a new one too, and whether it has a value per entry or per sequence."""
OPTIONAL = sorted(f.name for f in fields(Histories) if f.default is None)
TYPES: dict[str, Any] = {"segments": np.int8, "answer_scores": np.float32, "trained": np.bool_, "read": np.float64}
WIDE = ("answers", "answer_scores")


def numbered(lengths: list[int], first: int = 0) -> Histories:
    """Histories with every column set, its values all different (but for the types that have only a few)."""
    source, offsets = np.random.default_rng(first), offsets_of(np.array(lengths, dtype=np.int64))
    sizes = {"entry": int(offsets[-1]), "sequence": len(lengths)}
    columns: dict[str, Any] = {}
    for place, (name, per) in enumerate(PER.items()):
        shape = (sizes[per], 2) if name in WIDE else (sizes[per],)
        values = source.permutation(int(np.prod(shape))).reshape(shape) + 1000 * (place + 1) + 100_000 * first
        kind = TYPES.get(name, np.int64)
        columns[name] = values % 2 == 0 if kind is np.bool_ else values.astype(kind)
    seen = [[value, value + 1] * (n % 3) for n, value in enumerate(columns["seen"].tolist())]
    return Histories(offsets=offsets, **{**columns, "seen": Ragged.from_lists(seen)})


def list_sequences(histories: Histories) -> list[dict[str, Any]]:
    """The sequences one by one, as Python lists."""
    found = []
    for s, (start, stop) in enumerate(zip(histories.offsets[:-1], histories.offsets[1:], strict=True)):
        row: dict[str, Any] = {}
        for name, per in PER.items():
            values = getattr(histories, name)
            if isinstance(values, Ragged):
                row[name] = values.to_lists()[s]
            elif values is not None:
                row[name] = values[start:stop].tolist() if per == "entry" else values[s].item()
        found.append(row)
    return found


def assert_histories_equal(result: Histories, wanted: list[dict[str, Any]], like: Histories) -> None:
    """`result` holds these sequences, in columns of the length and type of those of `like`, and no other column."""
    assert list_sequences(result) == wanted
    assert result.offsets[0] == 0 and result.offsets.dtype == np.int64
    assert result.lengths.tolist() == [len(row["items"]) for row in wanted]
    for name, per in PER.items():
        values, other = getattr(result, name), getattr(like, name)
        assert type(values) is type(other), name
        if isinstance(values, Ragged):
            assert values.rows == len(wanted) and values.offsets[0] == 0, name
        elif values is not None:
            assert len(values) == (len(wanted) if per == "sequence" else result.offsets[-1]), name
            assert values.dtype == other.dtype and values.shape[1:] == other.shape[1:], name


lengths_of = st.lists(st.integers(0, 4), max_size=7)
absent = st.sets(st.sampled_from(OPTIONAL))
"""Columns that are not there."""


def without(histories: Histories, names: set[str]) -> Histories:
    absent_columns: dict[str, Any] = dict.fromkeys(names)
    return replace(histories, **absent_columns)


def test_every_column_says_what_its_values_are_of():
    assert {f.name for f in fields(Histories)} - PER.keys() == {"offsets"}
    assert set(PER.values()) == {"entry", "sequence"}
    assert all(getattr(numbered([1, 2]), name) is not None for name in PER)


@given(lengths_of, absent, st.data())
def test_a_part_is_the_rows_between_two_places_in_every_column(lengths, names, data):
    start = data.draw(st.integers(0, len(lengths)))
    stop = data.draw(st.integers(start, len(lengths)))
    histories = without(numbered(lengths), names)
    part = histories.part(start, stop)
    assert_histories_equal(part, list_sequences(histories)[start:stop], histories)
    for name in PER.keys() - names - {"seen"}:  # nothing is copied
        values = getattr(part, name)
        assert np.shares_memory(values, getattr(histories, name)) or not values.size


@given(lengths_of, absent, st.data())
def test_rows_are_reordered_in_every_column_and_may_come_twice(lengths, names, data):
    order = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=9)) if lengths else []
    histories = without(numbered(lengths), names)
    there = list_sequences(histories)
    assert_histories_equal(histories.reorder(np.array(order, dtype=np.int64)), [there[row] for row in order], histories)


@given(st.lists(lengths_of, min_size=1, max_size=4), absent)
def test_lists_are_joined_in_every_column(several, names):
    lists = [without(numbered(lengths, first), names) for first, lengths in enumerate(several)]
    assert_histories_equal(join(lists), [row for each in lists for row in list_sequences(each)], lists[0])


@given(lengths_of, absent, st.data())
def test_parts_joined_again_are_the_whole(lengths, names, data):
    histories = without(numbered(lengths), names)
    places = [0, *sorted(data.draw(st.lists(st.integers(0, len(lengths)), max_size=3))), len(lengths)]
    parts = [histories.part(a, b) for a, b in zip(places[:-1], places[1:], strict=True)]
    assert_histories_equal(join(parts), list_sequences(histories), histories)


def test_joining_no_histories_gives_no_sequence():
    for empty in (join([]), no_histories()):
        assert empty.users.size == empty.items.size == 0 and empty.offsets.tolist() == [0]
        assert empty.held_out is not None and empty.held_out.size == 0  # so that a rank without users ranks nothing
        assert empty.seen is not None and empty.seen.rows == 0
        assert all(getattr(empty, name) is None for name in set(OPTIONAL) - {"held_out", "seen"})
        assert (
            list_sequences(empty)
            == list_sequences(empty.part(0, 0))
            == list_sequences(empty.reorder(np.zeros(0, np.int64)))
            == []
        )


# ------------------------------------------------------------------------------------------------------ reading


def dataset_of(folder: Path) -> Dataset:
    """Histories of which an item says what its answers, scores and marks are."""
    histories, source = walks(20, 30, seed=3, shortest=1, longest=20), np.random.default_rng(0)
    segments = [[0, *(int(source.random() < 0.3) for _ in history[1:])] for history in histories]
    real = [[i for i, s in zip(h, k, strict=True) if not s] for h, k in zip(histories, segments, strict=True)]
    more = {
        "answer_ids": pa.array([[a for i in row for a in (i, (i + 7) % 30)] for row in real], pa.list_(pa.int64())),
        "answer_scores": pa.array([[float(i) for i in row for _ in "ab"] for row in real], pa.list_(pa.float32())),
        "trained": pa.array([[i % 2 for i in history] for history in histories], pa.list_(pa.int8())),
    }
    return write_dataset(folder, histories, items=30, segments=segments, more=more, rows_per_group=4)


@pytest.mark.parametrize("long_histories", ["newest", "windows"])
@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_an_order_moves_whole_sequences_and_keeps_their_entries(tmp_path, split, prompts, long_histories):
    dataset = dataset_of(tmp_path / "data")
    reader = HistoryReader(
        dataset=dataset,
        split=split,
        max_len=5,
        long_histories=long_histories,
        prompts=prompts,
        answers=2,
        new_targets=split == "training",
    )
    plain = reader.read(row_groups(dataset)[:4])
    shuffled = reader.read(row_groups(dataset)[:4], np.random.default_rng(1).permutation)
    order = np.random.default_rng(1).permutation(plain.users.size)
    assert_histories_equal(shuffled, list_sequences(plain.reorder(order)), plain)
    assert plain.users.size > 10 and list_sequences(shuffled) != list_sequences(plain)
    assert plain.lengths.max() == (6 if split == "training" else 5)
    there = {name for name in PER if getattr(plain, name) is not None}
    assert there == {"users", "items", "answers", "answer_scores"} | ({"segments"} if prompts else set()) | (
        {"trained", "read"} if split == "training" else {"seen"}
    ) | ({"held_out"} if split in ("validation", "test") else set())
    for row in list_sequences(plain):
        for place, item in enumerate(row["items"]):
            real = not prompts or not row["segments"][place]
            assert row["answers"][place] == ([item, (item + 7) % 30] if real else [-1, -1])
            assert row["answer_scores"][place] == ([item, item] if real else [0, 0])
            assert split != "training" or row["trained"][place] == bool(item % 2)
