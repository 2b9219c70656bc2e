"""Algorithm 1 of the paper: items that the model answers, or that were shown, between the items of a history.

    interacted items     a        b        c        (position 0, 1, 2)
    with k = 2 prompts   a a1 a2  b b1 b2  c        (position 0 1 2  1 2 3  2; never beyond max_len - 1)

a1 is the best item after `a`, a2 after `a a1`, b1 after `a a1 a2 b`, and so on: everything before counts, nothing
after. Of a history longer than `max_len` the newest `max_len` items have prompts between them. Knows nothing of files.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from recgpt_torchrec.catalogue.catalogue import Catalogue
from recgpt_torchrec.config import Prompts
from recgpt_torchrec.data.ragged import Ragged, offsets_of
from recgpt_torchrec.data.segments import EXPOSED, GENERATED, INTERACTED
from recgpt_torchrec.model.dense import Dense
from recgpt_torchrec.prompts.decoding import Decoding

Int64 = npt.NDArray[np.int64]


@dataclass
class Intervals:
    """Interacted items of some users, jagged, and what stands after each of them."""

    users: Int64
    """[users] dense ids."""
    items: Int64
    """[interactions] int64; user u has `offsets[u]:offsets[u + 1]`."""
    offsets: Int64
    """[users + 1]."""
    prompts: Int64
    """[interactions, k] int64: what stands between the item and the next one, in order; -1: nothing (any more)."""
    segments: npt.NDArray[np.int8]
    """[interactions, k] int8 segment ids of the prompts."""
    answers: Int64
    """[interactions, answers] int64: what the model answers best after the item, most of all first; -1: nothing."""
    answer_scores: npt.NDArray[np.float32]
    """[interactions, answers] float32 scores of the answers (logits); 0 where there is none."""
    times: Int64 | None = None
    """[interactions] timestamps."""

    @property
    def lengths(self) -> Int64:
        """[users] interacted items of each."""
        return np.diff(self.offsets)

    def row(self, user: int) -> slice:
        """Where the user at this place has their items."""
        return slice(int(self.offsets[user]), int(self.offsets[user + 1]))

    def first_kept(self, max_len: int) -> Int64:
        """[users] where the newest `max_len` items begin."""
        return np.maximum(self.offsets[:-1], self.offsets[1:] - max_len)


def intervals_of(table: pa.Table, k: int, max_len: int, kept: tuple[int, ...], answers: int = 0) -> Intervals:
    """Take rows of a dataset apart.

    Args:
        table: user_id, item_ids and, where there are any, segment_ids, timestamps, answer_ids and answer_scores.
        k: most prompts in an interval; the newest ones stay.
        max_len: only between the newest `max_len` items prompts stay.
        kept: segment ids of the entries that stay as prompts; entries of any other but interacted ones are dropped.
        answers: places for the model's answers after each item.
    """
    items = Ragged.from_arrow(table["item_ids"])
    entries, offsets = items.values, items.offsets
    segments = np.zeros(entries.size, np.int8)
    if "segment_ids" in table.schema.names:
        segments = Ragged.from_arrow(table["segment_ids"]).values.astype(np.int8)
    times = Ragged.from_arrow(table["timestamps"]).values if "timestamps" in table.schema.names else None
    interacted = segments == INTERACTED
    before = offsets_of(interacted)  # interacted items before each entry
    shape = (int(before[-1]), answers)
    answer_ids = np.full(shape, -1, np.int64)
    answer_scores = np.zeros(shape, np.float32)
    if answers and "answer_ids" in table.schema.names:
        answer_ids = Ragged.from_arrow(table["answer_ids"]).values.reshape(shape).copy()
        answer_scores = Ragged.from_arrow(table["answer_scores"]).values.reshape(shape).copy()
    found = Intervals(
        users=table["user_id"].to_numpy().astype(np.int64, copy=False),
        items=entries[interacted],
        offsets=before[offsets],
        prompts=np.full((int(before[-1]), k), -1, np.int64),
        segments=np.zeros((int(before[-1]), k), np.int8),
        answers=answer_ids,
        answer_scores=answer_scores,
        times=None if times is None else times[interacted],
    )
    (entry,) = np.nonzero(np.isin(segments, kept) & ~interacted)
    row = items.rows_of(entry)
    owner = before[entry] - 1  # the interacted item it follows
    last = found.offsets[row + 1] - 1
    between = (owner >= found.first_kept(max_len)[row]) & (owner < last)
    entry, owner = entry[between], owner[between]
    if entry.size and k:
        number = np.arange(entry.size)
        start = np.searchsorted(owner, owner)
        from_end = np.searchsorted(owner, owner, side="right") - 1 - number
        in_interval = number - start + from_end + 1
        slot = np.minimum(in_interval, k) - 1 - from_end
        chosen = slot >= 0
        found.prompts[owner[chosen], slot[chosen]] = entries[entry[chosen]]
        found.segments[owner[chosen], slot[chosen]] = segments[entry[chosen]]
    return found


def table_of(histories: Intervals) -> pa.Table:
    """The rows of a dataset again: user_id, item_ids, segment_ids and, where there are any, timestamps and answers.

    A prompt has the time of the item it follows.
    """
    entries = np.concatenate([histories.items[:, None], histories.prompts], axis=1)
    segments = np.concatenate([np.zeros((len(entries), 1), np.int8), histories.segments], axis=1)
    there = entries >= 0
    counts = there.sum(1)
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)])[histories.offsets].astype(np.int32))

    def lists(values: np.ndarray) -> pa.ListArray:
        return pa.ListArray.from_arrays(offsets, pa.array(values))

    columns = {"user_id": pa.array(histories.users), "item_ids": lists(entries[there])}
    if histories.times is not None:
        columns["timestamps"] = lists(np.repeat(histories.times, counts))
    columns["segment_ids"] = lists(segments[there])
    if number := histories.answers.shape[1]:
        offsets = pa.array((histories.offsets * number).astype(np.int32))
        columns["answer_ids"] = lists(histories.answers.ravel())
        columns["answer_scores"] = lists(histories.answer_scores.ravel())
    return pa.table(columns)


def known_intervals(histories: Intervals, earlier: Intervals, max_len: int) -> Int64:
    """Take over the prompts of an earlier run where they are what this run would make, too.

    That is so where the earlier history is the beginning of the new one, the shown items between its items are the
    same, and the newest `max_len` items begin at the same one.

    Returns:
        [users] int64: how many intervals, from the oldest with prompts on, are filled in now.
    """
    known = np.zeros(histories.users.size, np.int64)
    place = {user: row for row, user in enumerate(earlier.users.tolist())}
    start, earlier_start = histories.first_kept(max_len), earlier.first_kept(max_len)
    for row, user in enumerate(histories.users.tolist()):
        if (old_row := place.get(user)) is None:
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
        if not np.array_equal(shown, np.where(earlier.segments[filled] == EXPOSED, shown_then, -1)):
            continue
        histories.prompts[intervals], histories.segments[intervals] = shown_then, earlier.segments[filled]
        histories.answers[intervals] = earlier.answers[filled]
        histories.answer_scores[intervals] = earlier.answer_scores[filled]
        known[row] = size - 1 - skipped
    return known


class Prompter:
    """Fills the intervals of histories with what the model answers.

    Args:
        dense: decoder and user module, in evaluation mode.
        catalogue: vectors of all items.
        prompts: how many, and what may be answered.
        max_len: newest items of a history that have prompts between them; the decoder's number of positions.
        batch_users: users decoded side by side.
    """

    def __init__(self, dense: Dense, catalogue: Catalogue, prompts: Prompts, max_len: int, batch_users: int) -> None:
        self.dense, self.catalogue, self.prompts = dense, catalogue, prompts
        self.max_len, self.batch_users = max_len, batch_users

    def fill(
        self,
        histories: Intervals,
        user_vectors: Tensor,
        known: Int64 | None = None,
        progress: Callable[[int], object] = lambda users: None,
    ) -> None:
        """Generate what is missing up to k prompts an interval, into `histories`.

        Args:
            histories: shown items that are to stay are in their places already.
            user_vectors: [users, dim].
            known: [users] int64: intervals, from the oldest with prompts on, that are complete; None: none are.
            progress: called with numbers of users done.
        """
        first = histories.first_kept(self.max_len)
        known = np.zeros(histories.users.size, np.int64) if known is None else known
        todo = np.maximum(histories.offsets[1:] - first - 1, 0) - known
        # Users with as many intervals to fill, and as many filled, go side by side: hardly a step is taken for few,
        # and little is padded.
        order = np.lexsort((-known, -todo))
        for begin in range(0, order.size, self.batch_users):
            rows = order[begin : begin + self.batch_users]
            rows = rows[todo[rows] > 0]
            if rows.size:
                self._fill(histories, rows, first[rows], known[rows], todo[rows], user_vectors)
            progress(min(self.batch_users, order.size - begin))

    def decoding(self, users: int, capacity: int) -> Decoding:
        """An empty state of a batch of users."""
        return Decoding(self.dense.decoder, users, capacity)

    def _fill(
        self, histories: Intervals, rows: Int64, first: Int64, known: Int64, todo: Int64, user_vectors: Tensor
    ) -> None:
        """One batch: `rows` with the most intervals to fill first."""
        device, k = self.catalogue.device, self.prompts.k
        intervals = int((known + todo).max())
        where = np.minimum(first[:, None] + np.arange(intervals), histories.offsets[rows + 1][:, None] - 1)
        grid = _Grid(
            items=torch.from_numpy(histories.items[where]).to(device),
            prompts=torch.from_numpy(histories.prompts[where]).to(device),
            segments=torch.from_numpy(histories.segments[where]).long().to(device),
            answers=torch.from_numpy(histories.answers[where]).to(device),
            answer_scores=torch.from_numpy(histories.answer_scores[where]).to(device),
            older=torch.from_numpy(older_items(histories, rows, first)).to(device),
            users=self.dense.user_vectors(user_vectors[torch.from_numpy(rows).to(user_vectors.device)].to(device)),
        )
        state = self.decoding(rows.size, capacity=intervals * (1 + k))
        at = torch.from_numpy(known).to(device)
        if known.any():
            self._prefill(state, grid, at)
        remaining = todo.copy()
        while remaining.size:
            self._interval(state, grid, at, going_on=int((remaining > 1).sum()))
            remaining = remaining[remaining > 1] - 1
            at = at[: remaining.size] + 1
        filled = known[:, None] + np.arange(int(todo.max()))
        row, number = np.nonzero(np.arange(int(todo.max())) < todo[:, None])
        interval = filled[row, number]
        place = first[row] + interval
        histories.prompts[place] = grid.prompts.cpu().numpy()[row, interval]
        histories.segments[place] = grid.segments.cpu().numpy()[row, interval]
        histories.answers[place] = grid.answers.cpu().numpy()[row, interval]
        histories.answer_scores[place] = grid.answer_scores.cpu().numpy()[row, interval]

    def _interval(self, state: Decoding, grid: "_Grid", at: Tensor, going_on: int) -> None:
        """Feed each user's item `at` [users], and fill the interval after it; `going_on` users have more to come."""
        users = torch.arange(at.numel(), device=at.device)
        out = self._feed(state, grid, grid.items[users, at], at, INTERACTED)
        seen = torch.arange(int(at.max()) + 1, device=at.device) <= at[:, None]
        excluded = torch.where(seen, grid.items[users, : seen.shape[1]], grid.items[users, :1])
        excluded = torch.cat([excluded, grid.older[users]], dim=1)
        if self.prompts.answers:
            forbidden = excluded if self.prompts.exclude_seen else None
            best = self.catalogue.top_k(out, self.prompts.answers, forbidden=forbidden)
            grid.answers[users, at], grid.answer_scores[users, at] = best.items, best.scores.nan_to_num(neginf=0.0)
        for slot in range(self.prompts.k):
            wanted = (grid.prompts[users, at, slot] < 0).nonzero()[:, 0]
            if wanted.numel():
                forbidden = None
                if self.prompts.exclude_seen:
                    interval = grid.prompts[wanted, at[wanted]]
                    first = grid.items[wanted, :1]  # stands for nothing: it is forbidden anyway
                    forbidden = torch.cat([excluded[wanted], torch.where(interval < 0, first, interval)], dim=1)
                if slot == 0 and self.prompts.answers and self.prompts.source == "generated":
                    answers = grid.answers[wanted, at[wanted], 0]  # what is forbidden was the same
                else:
                    answers = self.catalogue.top_k(out[wanted], 1, forbidden=forbidden).items[:, 0]
                grid.prompts[wanted, at[wanted], slot] = answers
                grid.segments[wanted, at[wanted], slot] = torch.where(answers < 0, INTERACTED, GENERATED)
            if slot == self.prompts.k - 1:  # what nothing follows need not be fed
                users, at = users[:going_on], at[:going_on]
                state.keep(going_on)
            if at.numel():
                segments = grid.segments[users, at, slot]
                positions = (at + slot + 1).clamp(max=self.max_len - 1)
                out = self._feed(state, grid, grid.prompts[users, at, slot], positions, segments)
        if not self.prompts.k:
            state.keep(going_on)

    def _feed(self, state: Decoding, grid: "_Grid", items: Tensor, positions: Tensor, segments: Tensor | int) -> Tensor:
        """One entry [users] of each user, or none where it is -1."""
        active = items >= 0
        if isinstance(segments, int):
            segments = torch.full_like(items, segments)
        vectors = self.catalogue.vectors_of(items.clamp(min=0))
        return state.step(vectors, grid.users[: state.users], positions, segments, None if active.all() else active)

    def _prefill(self, state: Decoding, grid: "_Grid", known: Tensor) -> None:
        """Feed all entries of the intervals that are known [users] already, in one pass."""
        users, intervals, k = grid.prompts.shape
        place = torch.arange(intervals, device=known.device)
        items = torch.cat([grid.items[:, :, None], grid.prompts], dim=2).flatten(1)
        segments = torch.cat([torch.zeros_like(grid.items)[:, :, None], grid.segments], dim=2).flatten(1)
        positions = (place[:, None] + torch.arange(k + 1, device=known.device)).clamp(max=self.max_len - 1).flatten()
        there = (items >= 0) & (place.repeat_interleave(k + 1) < known[:, None])
        lengths = there.sum(1)
        # What is there moves to the left, in order.
        order = torch.argsort((~there).to(torch.int8), dim=1, stable=True)[:, : int(lengths.max())]
        taken = items.gather(1, order).clamp(min=0)
        positions = positions.expand(users, -1).gather(1, order)
        state.prefill(self.catalogue.vectors_of(taken), grid.users, positions, segments.gather(1, order), lengths)


@dataclass
class _Grid:
    """One batch on the device, users x intervals."""

    items: Tensor
    """[users, intervals] the item before each interval."""
    prompts: Tensor
    """[users, intervals, k]; -1: not there (yet)."""
    segments: Tensor
    """[users, intervals, k] int64."""
    answers: Tensor
    """[users, intervals, answers] int64."""
    answer_scores: Tensor
    """[users, intervals, answers] float32."""
    older: Tensor
    """[users, any] items before the first that has prompts; what is missing repeats an item of the user."""
    users: Tensor
    """[users, dim] user vectors."""


def older_items(histories: Intervals, rows: Int64, first: Int64) -> Int64:
    """[rows, most] items before `first` of each row; shorter ones are filled up with the item at `first`."""
    count = first - histories.offsets[rows]
    place = np.arange(int(count.max()))
    where = np.where(place < count[:, None], histories.offsets[rows][:, None] + place, first[:, None])
    return histories.items[where]
