"""Packing: nothing is lost, nothing overlaps, no sequence straddles two rows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recgpt_torchrec.data.packing import pack_sequences


@st.composite
def cases(draw) -> tuple[np.ndarray, int]:
    row_length = draw(st.integers(1, 12))
    lengths = draw(st.lists(st.integers(0, row_length), max_size=30))
    return np.array(lengths, dtype=np.int64), row_length


@given(cases())
def test_every_token_has_a_slot_of_its_own_and_a_sequence_lies_in_order_in_one_row(case):
    lengths, row_length = case
    grid = pack_sequences(lengths, row_length)
    assert (grid.row_length, grid.slots.dtype, grid.slots.size) == (row_length, np.int64, lengths.sum())
    slots = grid.slots.tolist()
    assert len(set(slots)) == len(slots)
    assert all(0 <= slot < grid.rows * row_length for slot in slots)
    first = 0
    for length in lengths.tolist():
        mine = slots[first : first + length]
        assert mine == list(range(mine[0], mine[0] + length)) if mine else True
        assert len({slot // row_length for slot in mine}) <= 1
        first += length


@given(cases())
def test_two_rows_are_never_both_half_empty(case):
    lengths, row_length = case
    grid = pack_sequences(lengths, row_length)
    used = np.bincount(grid.slots // row_length, minlength=grid.rows)
    assert grid.rows == 1 or np.sort(used)[:2].sum() > row_length  # else the two would have shared a row


def best_fit_rows(lengths: list[int], row_length: int) -> int:
    """Number of rows that best fit takes, one sequence at a time, longest first."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        elif length:
            rooms.append(row_length - length)
    return max(len(rooms), 1)


@given(cases())
def test_as_many_rows_as_best_fit_one_by_one(case):
    lengths, row_length = case
    assert pack_sequences(lengths, row_length).rows == best_fit_rows(lengths.tolist(), row_length)


@pytest.mark.parametrize(("longest", "row_length"), [(50, 64), (1000, 1000), (40_000, 40_000)])
def test_as_many_rows_as_best_fit_for_lognormal_lengths(longest, row_length):
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(np.log(longest / 8), 1, 500)).astype(np.int64), 1, longest)
    grid = pack_sequences(lengths, row_length)
    assert grid.rows == best_fit_rows(lengths.tolist(), row_length)
    assert np.unique(grid.slots).size == lengths.sum()


def test_long_sequences_leave_room_that_short_ones_fill():
    grid = pack_sequences(np.array([1, 3, 2, 4, 2]), 4)
    assert grid.rows == 3
    assert np.unique(grid.slots).size == 12


@pytest.mark.parametrize(
    ("lengths", "rows", "slots"),
    [([], 1, []), ([0, 0], 1, []), ([3], 1, [0, 1, 2]), ([4], 1, [0, 1, 2, 3]), ([4, 4], 2, list(range(8)))],
    ids=["none", "only empty ones", "one", "as long as a row", "two as long as a row"],
)
def test_boundaries(lengths, rows, slots):
    grid = pack_sequences(np.array(lengths, dtype=np.int64), 4)
    assert (grid.rows, grid.slots.tolist()) == (rows, slots)


def test_a_sequence_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="5 tokens does not fit a row of 4"):
        pack_sequences(np.array([2, 5]), 4)
