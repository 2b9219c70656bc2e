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
