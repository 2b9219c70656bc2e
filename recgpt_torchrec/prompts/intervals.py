"""Histories as intervals: interacted items, each with the prompts between it and the next one. Knows nothing of models.

The interval after the newest item holds feedback alone: what was shown since.
"""

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recgpt_torchrec.data.dataset import STARTS
from recgpt_torchrec.data.inputs.spec import ENTRY_COLUMNS
from recgpt_torchrec.data.ragged import Float32, Int64, Ragged, offsets_of
from recgpt_torchrec.data.reading.reader import stored_starts
from recgpt_torchrec.data.segments import EXPOSED, INTERACTED
from recgpt_torchrec.data.split import Starts

FILLED = ("prompts", "segments", "answers", "answer_scores")
"""Arrays of `Intervals` that the model fills."""
GIVEN = ("times", "prompt_times", "places", "prompt_places", "events", "prompt_events")
"""Arrays of `Intervals` that come from the dataset, where it has them."""


@dataclass
class Intervals:
    """Interacted items of some users, jagged, and the prompts in the interval after each of them."""

    users: Int64
    """[users] dense ids."""
    items: Int64
    """[interactions] int64 item ids; user u has `offsets[u]:offsets[u + 1]`."""
    offsets: Int64
    """[users + 1] int64."""
    prompts: Int64
    """[interactions, k] int64 prompts between the item and the next one, in order; -1: none."""
    segments: npt.NDArray[np.int8]
    """[interactions, k] int8 segment ids of the prompts."""
    answers: Int64
    """[interactions, answers] int64 items that the model ranks highest after the item, best first; -1: none."""
    answer_scores: Float32
    """[interactions, answers] float32 scores of the answers (logits); 0 where there is none."""
    times: Int64 | None = None
    """[interactions] int64 timestamps."""
    prompt_times: Int64 | None = None
    """[interactions, k] int64 timestamps of the feedback among the prompts; None: those of the items before them."""
    places: npt.NDArray[np.int16] | None = None
    """[interactions] int16 places in the list that items were shown in; None: the dataset does not store them."""
    prompt_places: npt.NDArray[np.int16] | None = None
    """[interactions, k] int16, likewise of the feedback among the prompts; 0: unknown."""
    events: npt.NDArray[np.int16] | None = None
    """[interactions] int16 event types of the items; None: the dataset does not store them."""
    prompt_events: npt.NDArray[np.int16] | None = None
    """[interactions, k] int16, likewise of the feedback among the prompts; 0: unknown, and of generated prompts."""
    starts: Starts | None = None
    """Where the parts of each user's items start; None: the dataset does not store it."""

    @property
    def lengths(self) -> Int64:
        """[users] number of interacted items."""
        return np.diff(self.offsets)

    def row(self, user: int) -> slice:
        """Range of the items of the `user`-th user."""
        return slice(int(self.offsets[user]), int(self.offsets[user + 1]))

    def newest_start(self, max_len: int) -> Int64:
        """[users] index in `items` at which the newest `max_len` items of each user begin."""
        return np.maximum(self.offsets[:-1], self.offsets[1:] - max_len)

    def oldest_start(self, max_len: int) -> Int64:
        """[users] index in `items` of the first item that has prompts after it."""
        if self.starts is None:
            return self.newest_start(max_len)
        return np.maximum(self.offsets[:-1], self.offsets[:-1] + self.starts.validation - max_len)

    def beginning(self, stop: Int64) -> tuple["Intervals", Int64]:
        """The first `stop` [users] items of each user, and their indices in `items`."""
        places = Ragged(np.arange(self.items.size), self.offsets).cut(self.offsets[:-1], self.offsets[:-1] + stop)
        names = ["items", *FILLED, *(name for name in GIVEN if getattr(self, name) is not None)]
        arrays = {name: getattr(self, name)[places.values] for name in names}
        return Intervals(users=self.users, offsets=places.offsets, **arrays), places.values

    def put(self, part: "Intervals", places: Int64) -> None:
        """Copy what was filled in `part`, the items at `places`, into these."""
        for name in FILLED:
            getattr(self, name)[places] = getattr(part, name)

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """What entries have beside ids, [interactions, 1 + k] of each item and the prompts after it, by the name of the
        column in `Histories`.

        Feedback has its own time, where it is known; another prompt has that of the entry before it. Generated prompts
        have neither event type nor place (0).
        """
        columns: dict[str, npt.NDArray[Any]] = {} if self.times is None else {"times": entry_times(self)}
        for name, of_items, of_prompts in (
            ("events", self.events, self.prompt_events),
            ("places", self.places, self.prompt_places),
        ):
            if of_items is not None and of_prompts is not None:
                columns[name] = np.concatenate([of_items[:, None], of_prompts], axis=1)
        return columns


def intervals_of(
    table: pa.Table, k: int, max_len: int, prompt_segments: tuple[int, ...], answers: int = 0, trailing: bool = False
) -> Intervals:
    """Convert rows of a dataset to `Intervals`.

    Args:
        table: user_id, item_ids and, where there are any, segment_ids, timestamps, places, answer_ids and
            answer_scores.
        k: maximum number of prompts in an interval; the newest ones stay.
        max_len: prompts stay only between the newest `max_len` items.
        prompt_segments: segment ids of the prompts that stay; other prompts are dropped.
        answers: number of the model's answers after each item.
        trailing: whether prompts have times of their own, and stay after the newest item too.
    """
    items = Ragged.from_arrow(table["item_ids"])
    entries, offsets = items.values, items.offsets
    segments = np.zeros(entries.size, np.int8)
    if "segment_ids" in table.schema.names:
        segments = Ragged.from_arrow(table["segment_ids"]).values.astype(np.int8)
    times = Ragged.from_arrow(table["timestamps"]).values if "timestamps" in table.schema.names else None
    places, events = (
        Ragged.from_arrow(table[name]).values.astype(np.int16) if name in table.schema.names else None
        for name in ("places", "event_ids")
    )
    interacted = segments == INTERACTED
    before = offsets_of(interacted)  # interacted items before each entry
    shape = (int(before[-1]), answers)
    answer_ids = np.full(shape, -1, np.int64)
    answer_scores = np.zeros(shape, np.float32)
    if answers and "answer_ids" in table.schema.names:
        answer_ids = Ragged.from_arrow(table["answer_ids"]).values.reshape(shape).copy()
        answer_scores = Ragged.from_arrow(table["answer_scores"]).values.reshape(shape).copy()
    filled = (int(before[-1]), k)
    histories = Intervals(
        users=table["user_id"].to_numpy().astype(np.int64, copy=False),
        items=entries[interacted],
        offsets=before[offsets],
        prompts=np.full(filled, -1, np.int64),
        segments=np.zeros(filled, np.int8),
        answers=answer_ids,
        answer_scores=answer_scores,
        times=None if times is None else times[interacted],
        prompt_times=np.zeros(filled, np.int64) if trailing and times is not None else None,
        places=None if places is None else places[interacted],
        prompt_places=None if places is None else np.zeros(filled, np.int16),
        events=None if events is None else events[interacted],
        prompt_events=None if events is None else np.zeros(filled, np.int16),
        starts=stored_starts(table),
    )
    (entry,) = np.nonzero(np.isin(segments, prompt_segments) & ~interacted)
    row = items.rows_of(entry)
    owner = before[entry] - 1  # the interacted item it follows
    last = histories.offsets[row + 1] - 1
    between = (owner >= histories.oldest_start(max_len)[row]) & ((owner < last) | trailing)
    entry, owner = entry[between], owner[between]
    if entry.size and k:
        number = np.arange(entry.size)
        start = np.searchsorted(owner, owner)
        from_end = np.searchsorted(owner, owner, side="right") - 1 - number
        in_interval = number - start + from_end + 1
        slot = np.minimum(in_interval, k) - 1 - from_end
        chosen = slot >= 0
        histories.prompts[owner[chosen], slot[chosen]] = entries[entry[chosen]]
        histories.segments[owner[chosen], slot[chosen]] = segments[entry[chosen]]
        if histories.prompt_times is not None and times is not None:
            histories.prompt_times[owner[chosen], slot[chosen]] = times[entry[chosen]]
        if histories.prompt_places is not None and places is not None:
            histories.prompt_places[owner[chosen], slot[chosen]] = places[entry[chosen]]
        if histories.prompt_events is not None and events is not None:
            histories.prompt_events[owner[chosen], slot[chosen]] = events[entry[chosen]]
    return histories


def table_of(histories: Intervals) -> pa.Table:
    """Convert `Intervals` to rows of a dataset: user_id, item_ids, segment_ids and, if any, timestamps, event types,
    places (see `Intervals.columns`) and answers."""
    entries = np.concatenate([histories.items[:, None], histories.prompts], axis=1)
    segments = np.concatenate([np.zeros((len(entries), 1), np.int8), histories.segments], axis=1)
    is_entry = entries >= 0
    counts = is_entry.sum(1)
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)])[histories.offsets].astype(np.int32))

    def lists(values: np.ndarray) -> pa.ListArray:
        return pa.ListArray.from_arrays(offsets, pa.array(values))

    columns = {"user_id": pa.array(histories.users), "item_ids": lists(entries[is_entry])}
    columns |= {ENTRY_COLUMNS[name]: lists(values[is_entry]) for name, values in histories.columns().items()}
    columns["segment_ids"] = lists(segments[is_entry])
    if number := histories.answers.shape[1]:
        offsets = pa.array((histories.offsets * number).astype(np.int32))
        columns["answer_ids"] = lists(histories.answers.ravel())
        columns["answer_scores"] = lists(histories.answer_scores.ravel())
    if histories.starts is not None:
        columns |= {name: pa.array(each) for name, each in zip(STARTS, astuple(histories.starts), strict=True)}
    return pa.table(columns)


def entry_times(histories: Intervals) -> Int64:
    """[interactions, 1 + k] int64 timestamps of the items and the prompts after them; see `table_of`."""
    assert histories.times is not None
    times = np.repeat(histories.times[:, None], 1 + histories.prompts.shape[1], axis=1)
    if histories.prompt_times is not None:
        times[:, 1:] = np.where(histories.segments >= EXPOSED, histories.prompt_times, times[:, 1:])
        # Never before the entry in front of it; `--hold_out given` may order files otherwise than times.
        times = np.maximum.accumulate(times, axis=1)
    return times


def known_intervals(histories: Intervals, earlier: Intervals, max_len: int, columns: Iterable[str] = ()) -> Int64:
    """Copy the prompts of an earlier run into `histories` where this run would make the same ones.

    That is so where the earlier history is the beginning of the new one, the shown items between its items are the
    same, what the model reads of both in `columns` is the same, and the newest `max_len` items begin at the same item.

    Returns:
        [users] int64: number of intervals that are filled now, from the oldest one with prompts on.
    """
    known = np.zeros(histories.users.size, np.int64)
    earlier_rows = {user: row for row, user in enumerate(earlier.users.tolist())}
    start, earlier_start = histories.newest_start(max_len), earlier.newest_start(max_len)
    now, then = (histories.columns(), earlier.columns()) if columns else ({}, {})
    for row, user in enumerate(histories.users.tolist()):
        if (old_row := earlier_rows.get(user)) is None:
            continue
        new, old = histories.row(row), earlier.row(old_row)
        size = old.stop - old.start
        skipped = int(earlier_start[old_row]) - old.start
        if size < 2 or size > new.stop - new.start or int(start[row]) - new.start != skipped:
            continue
        if not np.array_equal(histories.items[new][:size], earlier.items[old]):
            continue
        intervals, filled = slice(new.start, new.start + size - 1), slice(old.start, old.stop - 1)
        shown, shown_then = histories.prompts[intervals], earlier.prompts[filled]
        if not np.array_equal(shown, np.where(earlier.segments[filled] >= EXPOSED, shown_then, -1)):
            continue
        if not all(_is_same_column(now.get(name), then.get(name), earlier, new.start, old) for name in columns):
            continue
        histories.prompts[intervals], histories.segments[intervals] = shown_then, earlier.segments[filled]
        histories.answers[intervals] = earlier.answers[filled]
        histories.answer_scores[intervals] = earlier.answer_scores[filled]
        known[row] = size - 1 - skipped
    return known


def _is_same_column(
    now: npt.NDArray[Any] | None, then: npt.NDArray[Any] | None, earlier: Intervals, start: int, old: slice
) -> bool:
    """Whether the items from `start` on, and the feedback between them, have the values of the earlier ones at `old`.

    Args:
        now, then: [interactions, 1 + k] the column of the new and of the earlier histories; None: there is none.
    """
    if now is None or then is None:
        return False
    is_given = np.ones(then[old].shape, bool)
    is_given[:, 1:] = earlier.segments[old] >= EXPOSED
    is_given[-1, 1:] = False  # after the newest of these items
    return bool((now[start : start + len(is_given)] == then[old])[is_given].all())
