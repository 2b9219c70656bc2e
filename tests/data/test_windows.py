"""Windows are the same for every number of ranks, and dealing them loses no row, however far they were read."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recgpt_torchrec.data.windows import (
    Cursor,
    Piece,
    Position,
    Queue,
    RowGroup,
    Window,
    deal_windows,
    row_groups,
    windows_of,
)
from recgpt_torchrec.errors import InputError
from tests.support import promise_of, walks, write_dataset

groups_lists = st.lists(st.integers(0, 90), max_size=25).map(
    lambda items: [RowGroup(n // 3, n % 3, 10, size) for n, size in enumerate(items)]
)


@given(groups_lists, st.integers(0, 3), st.integers(0, 3), st.integers(1, 5))
def test_the_windows_of_an_epoch_hold_every_row_group_once(groups, seed, epoch, size):
    windows = windows_of(groups, seed, epoch, size)
    inside = [group for window in windows for group in window.groups]
    assert sorted(inside, key=lambda g: (g.part, g.group)) == groups
    assert [window.index for window in windows] == list(range(len(windows)))
    assert all(len(window.groups) == size for window in windows[:-1])


def test_windows_are_reproducible_and_differ_between_epochs_and_seeds():
    groups = [RowGroup(0, n, 10, 10) for n in range(30)]
    assert windows_of(groups, 1, 0, 2) == windows_of(groups, 1, 0, 2)
    assert len({tuple(windows_of(groups, *at, 2)) for at in [(1, 0), (1, 1), (2, 0)]}) == 3
    unshuffled = windows_of(groups, 1, 0, 4, shuffle=False)
    assert [group.group for window in unshuffled for group in window.groups] == list(range(30))


def rows_left(windows: list[Window], queues: list[Queue], sizes: dict[int, int]) -> list[tuple[int, int]]:
    """(window, row) of every row that the queues have left, by a plain loop over windows of `sizes` rows."""
    pieces = [piece for queue in queues for piece in queue.windows]
    return [(p.window, row) for p in pieces for row in range(*p.rows(sizes[p.window]))]


def sizes_of(windows: list[Window], factor: int = 1) -> dict[int, int]:
    """Rows by window; histories cut into pieces are more rows than the footers count."""
    return {window.index: factor * window.rows for window in windows}


@given(groups_lists, st.integers(1, 4), st.integers(1, 7), st.integers(1, 3))
def test_every_row_is_dealt_to_one_queue(groups, size, queues, factor):
    windows = windows_of(groups, 0, 0, size)
    dealt = deal_windows(windows, queues)
    assert len(dealt) == queues
    sizes = sizes_of(windows, factor)
    expected = [(window, row) for window, rows in sizes.items() for row in range(rows)]
    assert sorted(rows_left(windows, dealt, sizes)) == expected
    assert all(piece.done == 0 for queue in dealt for piece in queue.windows)
    assert deal_windows(windows, queues) == dealt


@pytest.mark.parametrize("queues", [1, 2, 3, 7, 16, 64])
@pytest.mark.parametrize("count", [1, 5, 16, 200])
def test_queues_are_equally_long_though_windows_may_be_few_or_unequal(count, queues):
    items = np.random.default_rng(count).integers(50_000, 150_000, count).tolist()
    windows = windows_of([RowGroup(0, n, 10_000, size) for n, size in enumerate(items)], 0, 0, 1)
    dealt = deal_windows(windows, queues)
    of_rows = {window.index: window.items / window.rows for window in windows}
    loads = np.zeros(queues)
    for number, queue in enumerate(dealt):
        loads[number] = sum(of_rows[p.window] * len(range(*p.rows(10_000))) for p in queue.windows)
    assert loads.max() <= 1.011 * loads.mean()
    assert sum(len(queue.windows) for queue in dealt) < count + queues  # as few cuts as queues


def test_whole_windows_are_dealt_where_that_is_equal_enough():
    windows = windows_of([RowGroup(0, n, 10, 100) for n in range(12)], 0, 0, 1)
    for queues in (1, 2, 3, 4, 6, 12):
        dealt = deal_windows(windows, queues)
        assert [len(queue.windows) for queue in dealt] == [12 // queues] * queues
        assert all(piece == Piece(piece.window) for queue in dealt for piece in queue.windows)


@st.composite
def partly_read_queues(draw) -> tuple[list[Window], Position, int]:
    windows = windows_of(draw(groups_lists), 0, 3, draw(st.integers(1, 3)))
    queues_left = []
    for queue in deal_windows(windows, draw(st.integers(1, 4))):
        finished = draw(st.integers(0, len(queue.windows)))
        batches, offset = draw(st.integers(0, 9)), 0
        if finished < len(queue.windows):
            offset = draw(st.integers(0, windows[queue.windows[finished][0]].rows - 1))
        queues_left.append(queue.after(Cursor(0, finished, offset, batches)))
    return windows, Position(3, queues_left), draw(st.integers(1, 6))


@given(partly_read_queues())
def test_the_same_number_of_queues_resumes_with_the_same_queues(case):
    windows, position, _ = case
    assert position.queues is not None
    assert deal_windows(windows, len(position.queues), position) == position.queues


@given(partly_read_queues())
def test_another_number_of_queues_gets_exactly_what_was_left(case):
    windows, position, queues = case
    assert position.queues is not None
    dealt = deal_windows(windows, queues, position)
    assert len(dealt) == queues
    for factor in (1, 2):
        sizes = sizes_of(windows, factor)
        left = sorted(rows_left(windows, position.queues, sizes))
        assert sorted(rows_left(windows, dealt, sizes)) == left


def test_negatives_already_drawn_are_not_drawn_again_after_dealing_anew():
    windows = windows_of([RowGroup(0, n, 10, 10) for n in range(4)], 0, 0, 1)
    position = Position(0, [Queue((Piece(1, 5),), 7), Queue((Piece(2), Piece(3)), 2)])
    assert {queue.batches for queue in deal_windows(windows, 3, position)} == {7}


def test_a_queue_after_a_cursor_holds_what_was_not_read():
    queue = Queue((Piece(4, 3), Piece(5), Piece(6, 0, 7, 9)), 2, 9)
    assert queue.after(Cursor(0, 0, 7, 3)) == Queue((Piece(4, 7), Piece(5), Piece(6, 0, 7, 9)), 3, 9)
    assert queue.after(Cursor(0, 1, 0, 3)) == Queue((Piece(5), Piece(6, 0, 7, 9)), 3, 9)
    assert queue.after(Cursor(0, 1, 2, 4)) == Queue((Piece(5, 2), Piece(6, 0, 7, 9)), 4, 9)
    assert queue.after(Cursor(0, 2, 8, 4)) == Queue((Piece(6, 8, 7, 9),), 4, 9)
    assert queue.after(Cursor(0, 3, 0, 5)) == Queue((), 5, 9)


def test_a_position_of_whole_windows_is_stored_as_pairs_and_one_of_parts_with_its_parts():
    state = Position(1, [Queue((Piece(4, 3), Piece(6, 0, 7, 9)), 2, 9)]).state_dict()
    assert state == {"epoch": 1, "queues": [{"windows": [[4, 3], [6, 0, 7, 9]], "batches": 2, "groups": 9}]}


@given(partly_read_queues())
def test_a_position_survives_json(case):
    _, position, _ = case
    for value in (position, Position(2)):
        assert Position.from_state_dict(json.loads(json.dumps(value.state_dict()))) == value


def test_row_groups_come_from_the_footers_of_all_parts(tmp_path):
    histories = walks(21, 9)
    dataset = write_dataset(tmp_path / "data", histories, rows_per_group=4, groups_per_part=2)
    found = row_groups(dataset)
    assert [(g.part, g.group, g.rows) for g in found] == [
        (0, 0, 4), (0, 1, 4), (1, 0, 4), (1, 1, 4), (2, 0, 4), (2, 1, 1),
    ]  # fmt: skip
    assert [g.items for g in found] == [sum(map(len, histories[at : at + 4])) for at in range(0, 21, 4)]


def test_a_part_with_other_rows_or_columns_than_promised_is_named(tmp_path):
    dataset = write_dataset(tmp_path / "data", walks(8, 9), rows_per_group=4, groups_per_part=1)
    part = dataset.manifest.sequences[1]
    path = tmp_path / "data" / part.path
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 3), path)
    vars(part).update(promise_of(path))
    with pytest.raises(InputError, match="part-00001.parquet has 3 rows, the manifest promises 4"):
        row_groups(dataset)
    pq.write_table(table.drop_columns("item_ids"), path)
    vars(part).update(promise_of(path))
    with pytest.raises(InputError, match="part-00001.parquet has no column item_ids"):
        row_groups(dataset)


def test_windows_count_their_interactions_and_users():
    window = Window(0, (RowGroup(0, 0, 3, 20), RowGroup(1, 4, 5, 30)))
    assert (window.items, window.rows) == (50, 8)


def test_a_window_without_rows_is_dealt_like_any_other():
    windows = [Window(0, (RowGroup(0, 0, 0, 0),)), Window(1, (RowGroup(1, 0, 3, 9),))]
    assert sorted(p.window for queue in deal_windows(windows, 1) for p in queue.windows) == [0, 1]
    assert sorted(rows_left(windows, deal_windows(windows, 2), {0: 0, 1: 3})) == [(1, 0), (1, 1), (1, 2)]


@pytest.mark.parametrize("left", [(Piece(2),), (Piece(0, 13),)])
def test_a_position_that_no_window_has_is_refused(left):
    windows = [Window(0, (RowGroup(0, 0, 3, 9),)), Window(1, (RowGroup(1, 0, 3, 9),))]
    with pytest.raises(InputError, match="of an epoch, and the dataset has no such row"):
        deal_windows(windows, 1, Position(0, [Queue(left)]))
    queues = [Queue((Piece(0, 12), Piece(1)))]
    assert deal_windows(windows, 1, Position(0, queues)) == queues


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": -1}, "position.epoch is -1"),
        ({"epoch": True}, "position.epoch is True"),
        ({"queues": [{"windows": [[0]]}]}, "a window in position.queues is no pair"),
        ({"queues": [{"windows": [[0, 0, 1]]}]}, "a window in position.queues is no pair, and no part of a window"),
        ({"queues": []}, "position.queues is empty; an epoch that has begun has at least one queue"),
        ({"queues": [{"windows": [[0, 0, 5, 4]]}]}, "a window in position.queues has parts out of order"),
        ({"queues": [{"windows": [[0, 0, 0, 2**21]]}]}, "a window in position.queues has parts out of order"),
        ({"queues": [{"windows": [[0, -1]]}]}, "number 1 of position.queues is -1"),
        ({"queues": [{"windows": [[0, 0.5]]}]}, r"windows\[0\]\[1\] is 0.5, it must be a whole number"),
        ({"queues": {}}, "position.queues is {}, it must be a list"),
        ({"queues": [{"windows": [], "batches": -2}]}, "batches of a queue is -2"),
        ({"other": 1}, "position has an unknown field 'other'"),
    ],
)
def test_what_is_no_position_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Position.from_state_dict({"epoch": 0, "queues": None, **change})
