"""Windows are the same for every number of ranks, and dealing them loses no row, however far they were read."""

import json

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recgpt_torchrec.data.windows import Cursor, Position, Queue, RowGroup, Window, deal_windows, row_groups, windows_of
from recgpt_torchrec.errors import InputError
from tests.support import walks, write_dataset

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


@given(groups_lists, st.integers(1, 4), st.integers(1, 7))
def test_every_window_is_dealt_to_one_queue_and_the_loads_differ_by_at_most_one_window(groups, size, queues):
    windows = windows_of(groups, 0, 0, size)
    dealt = deal_windows(windows, queues)
    assert len(dealt) == queues
    assert sorted(w for queue in dealt for w, _ in queue.windows) == [window.index for window in windows]
    assert all(done == 0 for queue in dealt for _, done in queue.windows)
    loads = [sum(windows[w].items for w, _ in queue.windows) for queue in dealt]
    assert max(loads) - min(loads) <= max((window.items for window in windows), default=0)
    assert deal_windows(windows, queues) == dealt


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
    left = sorted(entry for queue in position.queues for entry in queue.windows)
    assert sorted(entry for queue in dealt for entry in queue.windows) == left


def test_negatives_already_drawn_are_not_drawn_again_after_dealing_anew():
    windows = windows_of([RowGroup(0, n, 10, 10) for n in range(4)], 0, 0, 1)
    position = Position(0, [Queue(((1, 5),), 7), Queue(((2, 0), (3, 0)), 2)])
    assert {queue.batches for queue in deal_windows(windows, 3, position)} == {7}


def test_a_queue_after_a_cursor_holds_what_was_not_read():
    queue = Queue(((4, 3), (5, 0), (6, 0)), 2, 9)
    assert queue.after(Cursor(0, 0, 7, 3)) == Queue(((4, 7), (5, 0), (6, 0)), 3, 9)
    assert queue.after(Cursor(0, 1, 0, 3)) == Queue(((5, 0), (6, 0)), 3, 9)
    assert queue.after(Cursor(0, 1, 2, 4)) == Queue(((5, 2), (6, 0)), 4, 9)
    assert queue.after(Cursor(0, 3, 0, 5)) == Queue((), 5, 9)


@given(partly_read_queues())
def test_a_position_survives_json(case):
    _, position, _ = case
    for value in (position, Position(2), Position(0, [])):
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
    path = tmp_path / "data" / dataset.manifest.sequences[1].path
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 3), path)
    with pytest.raises(InputError, match="part-00001.parquet has 3 rows, the manifest promises 4"):
        row_groups(dataset)
    pq.write_table(table.drop_columns("item_ids"), path)
    with pytest.raises(InputError, match="part-00001.parquet has no column item_ids"):
        row_groups(dataset)


def test_windows_count_their_interactions_and_users():
    window = Window(0, (RowGroup(0, 0, 3, 20), RowGroup(1, 4, 5, 30)))
    assert (window.items, window.rows) == (50, 8)


def test_a_window_without_rows_is_dealt_like_any_other():
    windows = [Window(0, (RowGroup(0, 0, 0, 0),)), Window(1, (RowGroup(1, 0, 3, 9),))]
    assert sorted(window for queue in deal_windows(windows, 2) for window, _ in queue.windows) == [0, 1]


@pytest.mark.parametrize("left", [((2, 0),), ((0, 13),)])
def test_a_position_that_no_window_has_is_refused(left):
    windows = [Window(0, (RowGroup(0, 0, 3, 9),)), Window(1, (RowGroup(1, 0, 3, 9),))]
    with pytest.raises(InputError, match="of an epoch, and the dataset has no such row"):
        deal_windows(windows, 1, Position(0, [Queue(left)]))
    assert deal_windows(windows, 1, Position(0, [Queue(((0, 12), (1, 0)))])) == [Queue(((0, 12), (1, 0)))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": -1}, "position.epoch is -1"),
        ({"epoch": True}, "position.epoch is True"),
        ({"queues": [{"windows": [[0]]}]}, "a window in position.queues is no pair"),
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
