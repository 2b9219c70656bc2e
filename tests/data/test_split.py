"""Splits against a plain loop over Python lists."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recgpt_torchrec.data import split
from recgpt_torchrec.data.ragged import Ragged

lists_of_items = st.lists(st.lists(st.integers(0, 2**40), max_size=7), max_size=8)


def parts(items: Ragged, name: split.SplitName) -> tuple[list[int], list[list[int]], list[int] | None]:
    """Users, their histories, and the held-out items of a split."""
    cut = split.cut(items.offsets, name)
    held_out = None if cut.target is None else items.values[cut.target].tolist()
    return cut.row.tolist(), items.cut(cut.start, cut.stop).to_lists(), held_out


@given(lists_of_items)
def test_training_part_is_all_but_the_last_two_and_whole_for_users_with_fewer_than_three_items(lists):
    rows, histories, held_out = parts(Ragged.from_lists(lists), "training")
    assert histories == [s[:-2] if len(s) >= 3 else s for s in lists]
    assert rows == list(range(len(lists))) and held_out is None


@given(lists_of_items, st.sampled_from([("validation", 2), ("test", 1)]))
def test_held_out_target_follows_its_history_and_short_users_have_none(lists, case):
    name, from_end = case
    rows, histories, held_out = parts(Ragged.from_lists(lists), name)
    kept = [i for i, s in enumerate(lists) if len(s) >= 3]
    assert rows == kept
    assert histories == [lists[i][:-from_end] for i in kept]
    assert held_out == [lists[i][-from_end] for i in kept]


@given(lists_of_items)
def test_all_is_the_whole_history_of_everyone_who_has_one(lists):
    kept = [i for i, s in enumerate(lists) if s]
    assert parts(Ragged.from_lists(lists), "all") == (kept, [lists[i] for i in kept], None)


def test_test_history_holds_the_validation_item_and_training_holds_neither_target():
    items = Ragged.from_lists([[5, 6, 7, 8]])
    _, (history,), _ = parts(items, "test")
    _, _, validation = parts(items, "validation")
    assert validation is not None and validation[0] in history
    assert parts(items, "training")[1] == [[5, 6]]


@given(lists_of_items)
def test_what_is_trained_on_is_counted_from_the_end_as_it_is_cut(lists):
    """`is_held_out`, which queries use, says of each interaction whether it is after the training part."""
    items = Ragged.from_lists(lists)
    length = items.lengths[items.owners]
    from_end = np.array([len(s) - 1 - place for s in lists for place in range(len(s))], dtype=np.int64)
    assert items.keep(~split.is_held_out(from_end, length, "validation")).to_lists() == parts(items, "training")[1]


@pytest.mark.parametrize("name", ["train", "", None])
def test_unknown_split_is_refused(name):
    with pytest.raises(ValueError, match=f"{name!r}; it must be one of training, validation, test, all"):
        split.cut(np.array([0, 3]), name)


@pytest.mark.parametrize("offsets", [[], [[0, 3]]])
def test_offsets_of_another_shape_are_refused(offsets):
    with pytest.raises(ValueError, match="offsets must be"):
        split.cut(offsets, "training")


@st.composite
def divided(draw: st.DrawFn) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Lists of items, and where the validation and the test part of each starts."""
    lists = draw(lists_of_items)
    starts = [sorted((draw(st.integers(0, len(s))), draw(st.integers(0, len(s))))) for s in lists]
    return lists, [(v, t) for v, t in starts]


@given(divided(), st.sampled_from(["time", "given"]))
def test_stored_starts_cut_each_user_at_the_beginning_of_the_parts(case, hold_out):
    lists, starts = case
    stored = split.Starts(*(np.array([pair[i] for pair in starts], dtype=np.int64) for i in (0, 1)))
    items = Ragged.from_lists(lists)

    def cut(name: split.SplitName) -> list[tuple[int, list[int], int | None]]:
        made = split.cut(items.offsets, name, hold_out, stored)
        targets = [None] * len(made.row) if made.target is None else items.values[made.target].tolist()
        return list(zip(made.row.tolist(), items.cut(made.start, made.stop).to_lists(), targets, strict=True))

    assert cut("training") == [(u, s[:v], None) for u, (s, (v, _)) in enumerate(zip(lists, starts, strict=True))]
    assert cut("all") == [(u, s, None) for u, s in enumerate(lists) if s]
    validation, test = [], []
    for user, (history, (v, t)) in enumerate(zip(lists, starts, strict=True)):
        if history[:v] and history[v:t]:
            validation.append((user, history[:v], history[v:t][0]))
        if history[:t] and history[t:]:
            test.append((user, history[:t], history[t:][0]))
    assert cut("validation") == validation
    assert cut("test") == test


@given(lists_of_items)
def test_with_none_everything_is_trained_on_and_nothing_is_held_out(lists):
    items = Ragged.from_lists(lists)
    training = split.cut(items.offsets, "training", "none")
    assert items.cut(training.start, training.stop).to_lists() == lists
    for name in split.EVALUATION:
        assert split.cut(items.offsets, name, "none").row.size == 0


@pytest.mark.parametrize("hold_out", ["time", "given", "first"])
def test_starts_that_nothing_gives_are_refused(hold_out):
    with pytest.raises(ValueError, match=f"hold_out is {hold_out!r}"):
        split.cut(np.array([0, 3]), "training", hold_out)
