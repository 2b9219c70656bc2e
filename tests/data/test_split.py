"""The leave-one-out split against a plain loop over Python lists."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recgpt_torchrec.data import split

lists_of_items = st.lists(st.lists(st.integers(0, 2**40), max_size=7), max_size=8)


def jagged(lists: list[list[int]]) -> split.ItemLists:
    return split.item_lists(pa.array(lists, pa.list_(pa.int64())))


def as_lists(lists: split.ItemLists) -> list[list[int]]:
    return [lists.values[a:b].tolist() for a, b in zip(lists.offsets[:-1], lists.offsets[1:], strict=True)]


@given(lists_of_items)
def test_training_part_is_all_but_the_last_two_and_whole_for_users_with_fewer_than_three_items(lists):
    values, offsets = jagged(lists)
    assert as_lists(split.take(values, *split.training(offsets))) == [s[:-2] if len(s) >= 3 else s for s in lists]


@given(lists_of_items, st.sampled_from([("validation", 2), ("test", 1)]))
def test_held_out_target_follows_its_history_and_short_users_have_none(lists, case):
    name, from_end = case
    values, offsets = jagged(lists)
    held = split.held_out(offsets, name)
    kept = [i for i, s in enumerate(lists) if len(s) >= 3]
    assert held.row.tolist() == kept
    assert as_lists(split.take(values, held.start, held.stop)) == [lists[i][:-from_end] for i in kept]
    assert values[held.target].tolist() == [lists[i][-from_end] for i in kept]


def test_test_history_holds_the_validation_item_and_training_holds_neither_target():
    values, offsets = jagged([[5, 6, 7, 8]])
    test, validation = split.test(offsets), split.validation(offsets)
    assert values[validation.target].item() in values[test.start[0] : test.stop[0]]
    start, stop = split.training(offsets)
    assert values[start[0] : stop[0]].tolist() == [5, 6]


@given(lists_of_items, st.integers(0, 4))
def test_item_lists_reads_slices_chunks_and_large_lists(lists, cut):
    array = pa.array(lists, pa.list_(pa.int64()))
    assert as_lists(split.item_lists(array.slice(cut))) == lists[cut:]
    assert as_lists(split.item_lists(pa.chunked_array([array.slice(0, cut), array.slice(cut)]))) == lists
    assert as_lists(split.item_lists(array.cast(pa.large_list(pa.int64())))) == lists


def test_item_lists_of_an_empty_column():
    assert as_lists(split.item_lists(pa.chunked_array([], pa.list_(pa.int64())))) == []


@pytest.mark.parametrize("lists", [[[1], None], [[1, None]]])
def test_item_lists_refuses_nulls(lists):
    with pytest.raises(ValueError, match="null"):
        split.item_lists(pa.array(lists, pa.list_(pa.int64())))


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'validation' or 'test'"):
        split.held_out(np.array([0, 3]), "train")  # type: ignore[arg-type]
