"""Ragged lists against Python's own."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recgpt_torchrec.data.ragged import Ragged, join, offsets_of, ragged_arange, read_nullable

rows_of_numbers = st.lists(st.lists(st.integers(0, 2**40), max_size=7), max_size=8)


def places(lists: list[list[int]]) -> list[list[int]]:
    """Where each value of each row lies among all."""
    numbers = iter(range(sum(map(len, lists))))
    return [[next(numbers) for _ in row] for row in lists]


@given(rows_of_numbers)
def test_rows_come_back_as_they_went_in_with_their_lengths_and_owners(lists):
    ragged = Ragged.from_lists(lists)
    assert (ragged.values.dtype, ragged.offsets.dtype) == (np.int64, np.int64)
    assert ragged.to_lists() == lists
    assert ragged.rows == len(lists) and ragged.lengths.tolist() == [len(row) for row in lists]
    owners = [number for number, row in enumerate(lists) for _ in row]
    assert ragged.owners.tolist() == owners
    assert ragged.rows_of(np.arange(len(owners))).tolist() == owners
    assert Ragged.from_lengths(ragged.values, ragged.lengths).to_lists() == lists
    assert ragged.with_values(np.arange(len(owners))).to_lists() == places(lists)


@given(rows_of_numbers, st.data())
def test_a_part_is_a_slice_and_shares_the_values(lists, data):
    start = data.draw(st.integers(0, len(lists)))
    stop = data.draw(st.integers(start, len(lists)))
    ragged = Ragged.from_lists(lists)
    part = ragged.part(start, stop)
    assert part.to_lists() == lists[start:stop] and part.offsets[0] == 0
    assert np.shares_memory(part.values, ragged.values) or not part.values.size
    again = data.draw(st.integers(0, stop - start))
    assert part.part(again, stop - start).to_lists() == lists[start + again : stop]


@given(rows_of_numbers, st.data())
def test_rows_are_taken_in_any_order_and_more_than_once(lists, data):
    rows = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=9)) if lists else []
    taken = Ragged.from_lists(lists).take(np.array(rows, dtype=np.int64))
    assert taken.to_lists() == [lists[row] for row in rows]


@given(rows_of_numbers, st.data())
def test_ranges_are_cut_out_whether_they_lie_within_a_row_or_not(lists, data):
    ragged = Ragged.from_lists(lists)
    values = ragged.values.tolist()
    ranges = data.draw(st.lists(st.tuples(st.integers(0, len(values)), st.integers(0, len(values))).map(sorted)))
    start, stop = np.array(ranges, dtype=np.int64).reshape(-1, 2).T
    assert ragged.cut(start, stop).to_lists() == [values[a:b] for a, b in ranges]


@given(rows_of_numbers, st.data())
def test_entries_that_are_kept_stay_in_their_rows(lists, data):
    wanted = [data.draw(st.lists(st.booleans(), min_size=len(row), max_size=len(row))) for row in lists]
    kept = Ragged.from_lists(lists).keep(np.array([w for row in wanted for w in row], dtype=bool))
    assert kept.to_lists() == [
        [v for v, w in zip(row, which, strict=True) if w] for row, which in zip(lists, wanted, strict=True)
    ]


@given(st.lists(rows_of_numbers, min_size=1, max_size=4))
def test_lists_are_joined_one_after_the_other(several):
    joined = join([Ragged.from_lists(lists) for lists in several])
    assert joined.to_lists() == [row for lists in several for row in lists]
    assert joined.offsets.dtype == np.int64


def test_values_may_have_more_dimensions_and_any_type():
    values = np.arange(8, dtype=np.float32).reshape(4, 2)
    ragged = Ragged.from_lengths(values, np.array([1, 0, 3]))
    assert ragged.take(np.array([2, 0])).to_lists() == [[[2, 3], [4, 5], [6, 7]], [[0, 1]]]
    assert ragged.part(1, 3).to_lists() == [[], [[2, 3], [4, 5], [6, 7]]]
    assert ragged.keep(np.array([True, False, False, True])).to_lists() == [[[0, 1]], [], [[6, 7]]]
    assert join([ragged, ragged.part(0, 1)]).to_lists() == [*ragged.to_lists(), [[0, 1]]]
    for made in (ragged.take(np.array([2])), ragged.part(0, 0), ragged.cut(np.array([1]), np.array([1]))):
        assert made.values.dtype == np.float32 and made.values.shape[1:] == (2,)


@given(st.lists(st.integers(0, 6), max_size=9))
def test_offsets_are_the_running_sum_and_an_arange_counts_each_list_from_zero(lengths):
    given_lengths = np.array(lengths, dtype=np.int64)
    assert offsets_of(given_lengths).tolist() == [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    assert offsets_of(given_lengths).dtype == ragged_arange(given_lengths).dtype == np.int64
    assert ragged_arange(given_lengths).tolist() == [i for length in lengths for i in range(length)]


def test_offsets_count_flags():
    assert offsets_of(np.array([True, False, True, True])).tolist() == [0, 1, 1, 2, 3]


# ------------------------------------------------------------------------------------------------------- Arrow


@given(rows_of_numbers, st.integers(0, 4))
def test_slices_chunks_and_large_lists_of_arrow_are_read(lists, cut):
    array = pa.array(lists, pa.list_(pa.int64()))
    assert Ragged.from_arrow(array).to_lists() == lists
    for column in (array.slice(cut), pa.chunked_array([array]).slice(cut)):
        read = Ragged.from_arrow(column)
        assert read.to_lists() == lists[cut:] and read.offsets[0] == 0
    assert Ragged.from_arrow(array.slice(0, cut)).to_lists() == lists[:cut]
    assert Ragged.from_arrow(pa.chunked_array([array.slice(0, cut), array.slice(cut)])).to_lists() == lists
    assert Ragged.from_arrow(array.cast(pa.large_list(pa.int64()))).to_lists() == lists
    assert Ragged.from_arrow(array.cast(pa.large_list(pa.int64())).slice(cut)).to_lists() == lists[cut:]


def test_an_empty_column_is_read():
    assert Ragged.from_arrow(pa.chunked_array([], pa.list_(pa.int64()))).to_lists() == []
    assert Ragged.from_arrow(pa.array([], pa.list_(pa.int64()))).to_lists() == []


@pytest.mark.parametrize("kind", [pa.int8(), pa.int64(), pa.uint32(), pa.float32()])
def test_values_keep_their_type(kind):
    column = pa.array([[1, 2], [], [3]], pa.list_(kind))
    for array in (column, column.slice(1)):
        assert Ragged.from_arrow(array).values.dtype == kind.to_pandas_dtype()
    assert Ragged.from_arrow(pa.chunked_array([], pa.list_(kind))).values.dtype == kind.to_pandas_dtype()


def test_a_column_without_nulls_is_not_copied():
    column = pa.array([[1, 2], [], [3, 4, 5]], pa.list_(pa.int64()))
    whole = column.values.to_numpy()
    assert np.shares_memory(Ragged.from_arrow(column).values, whole)
    assert np.shares_memory(Ragged.from_arrow(column.slice(2)).values, whole)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ([[1], None], "1 of 2 lists are null; a user without items has an empty list"),
        ([[1, None]], "1 values are null"),
        ([None, [None, 2], None], "2 of 3 lists are null"),
    ],
)
@pytest.mark.parametrize("chunked", [False, True])
def test_nulls_are_refused(lists, message, chunked):
    column = pa.array(lists, pa.list_(pa.int64()))
    with pytest.raises(ValueError, match=message):
        Ragged.from_arrow(pa.chunked_array([column]) if chunked else column)


def test_nulls_outside_a_slice_do_no_harm():
    column = pa.array([[1, None], [2, 3], None], pa.list_(pa.int64()))
    assert Ragged.from_arrow(column.slice(1, 1)).to_lists() == [[2, 3]]


@given(
    st.lists(st.none() | st.lists(st.none() | st.integers(0, 2**40), max_size=5), max_size=8),
    st.integers(0, 3),
    st.booleans(),
)
def test_nulls_are_found_where_they_are(lists, cut, large):
    array = pa.array(lists, (pa.large_list if large else pa.list_)(pa.int64()))
    there = lists[cut:]
    filled = [[] if row is None else [0 if v is None else v for v in row] for row in there]
    values = [v for row in there if row is not None for v in row]
    for column in (array.slice(cut), pa.chunked_array([array.slice(cut, 2), array.slice(cut + 2)])):
        rows, null_rows, null_values = read_nullable(column)
        assert rows.to_lists() == filled and rows.values.dtype == np.int64
        assert null_rows.tolist() == [n for n, row in enumerate(there) if row is None]
        assert null_values.tolist() == [n for n, v in enumerate(values) if v is None]


def test_values_below_a_null_list_are_ignored():
    mask = pa.array([False, True, False])
    column = pa.ListArray.from_arrays(pa.array([0, 1, 3, 5], pa.int32()), pa.array([1, 2, None, 4, 5]), mask=mask)
    for start in (0, 1):
        rows, null_rows, null_values = read_nullable(column.slice(start))
        assert rows.to_lists() == [[1], [], [4, 5]][start:]
        assert null_rows.tolist() == [1 - start] and not null_values.size
