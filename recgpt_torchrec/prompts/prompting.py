"""Algorithm 1 of the paper: inserts prompts, generated or shown items, between the items of a history.

    interacted items     a        b        c        (position 0, 1, 2)
    with k = 2 prompts   a a1 a2  b b1 b2  c        (position 0 1 2  1 2 3  2; never beyond max_len - 1)

a1 is the model's best item after `a`, a2 after `a a1`, b1 after `a a1 a2 b`, and so on, from all entries before it; or
an item drawn among the best (`sampling.py`). In a history longer than `max_len` only the newest `max_len` items have
prompts between them. Where the dataset stores the starts of a user's validation and test part, that holds for the
histories before each of them too: the prompts of a history that a split reads come from this history alone, however
much comes after it. Knows nothing of files.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recgpt_torchrec.catalogue.catalogue import Catalogue
from recgpt_torchrec.config import Prompts
from recgpt_torchrec.data.histories import Histories
from recgpt_torchrec.data.inputs.features import UNKNOWN, compute_features
from recgpt_torchrec.data.ragged import Int64
from recgpt_torchrec.data.segments import GENERATED, INTERACTED
from recgpt_torchrec.model.dense import Dense
from recgpt_torchrec.prompts.boosting import BatchBoost, NeighbourBoost
from recgpt_torchrec.prompts.decoding import Decoding
from recgpt_torchrec.prompts.intervals import Intervals
from recgpt_torchrec.prompts.sampling import draw_items


class Prompter:
    """Fills the intervals of histories with items that the model generates (Algorithm 1).

    Args:
        dense: decoder and user module, in evaluation mode.
        catalogue: vectors of all items.
        prompts: number of prompts per interval, and which items may be generated.
        max_len: number of the newest items that have prompts between them; the decoder's number of positions.
        batch_users: number of users decoded together.
        boost: raises the scores of neighbours in answers, never in prompts; None: answers are the model's alone.
    """

    def __init__(
        self,
        dense: Dense,
        catalogue: Catalogue,
        prompts: Prompts,
        max_len: int,
        batch_users: int,
        boost: NeighbourBoost | None = None,
    ) -> None:
        self.dense, self.catalogue, self.prompts = dense, catalogue, prompts
        self.max_len, self.batch_users, self.boost = max_len, batch_users, boost

    def fill(
        self,
        histories: Intervals,
        user_vectors: Tensor,
        known: Int64 | None = None,
        progress: Callable[[int], object] = lambda users: None,
    ) -> None:
        """Fill each interval of `histories` up to k prompts, in place.

        Args:
            histories: with the shown items that stay as prompts.
            user_vectors: [users, dim] float32.
            known: [users] int64: number of complete intervals, from the oldest one with prompts on; None: none.
            progress: called with the number of users done since the last call.
        """
        training = histories.lengths if self.boost is None else self.boost.count_training(histories)
        if histories.starts is None:
            return self._fill_newest(histories, user_vectors, known, progress, training)
        # One history after the other: what a split reads must not depend on what comes after it.
        complete = np.zeros(histories.users.size, np.int64)
        stops = (histories.starts.validation, histories.starts.test, histories.lengths)
        for number, stop in enumerate(stops, 1):
            part, places = histories.beginning(stop)
            skipped = part.newest_start(self.max_len) - part.offsets[:-1]
            report = progress if number == len(stops) else lambda users: None
            self._fill_newest(part, user_vectors, np.maximum(complete - skipped, 0), report, training)
            histories.put(part, places)
            complete = np.maximum(stop - 1, 0)

    def _fill_newest(
        self,
        histories: Intervals,
        user_vectors: Tensor,
        known: Int64 | None,
        progress: Callable[[int], object],
        training: Int64,
    ) -> None:
        """Fill the intervals between the newest `max_len` items of each user; see `fill`."""
        first = histories.newest_start(self.max_len)
        known = np.zeros(histories.users.size, np.int64) if known is None else known
        todo = np.maximum(histories.offsets[1:] - first - 1, 0) - known
        # Users with equal numbers of intervals to fill and of filled ones are decoded together: few steps run for a few
        # users, and there is little padding.
        order = np.lexsort((-known, -todo))
        for begin in range(0, order.size, self.batch_users):
            rows = order[begin : begin + self.batch_users]
            rows = rows[todo[rows] > 0]
            if rows.size:
                self._fill_batch(histories, rows, first[rows], known[rows], todo[rows], user_vectors, training[rows])
            progress(min(self.batch_users, order.size - begin))

    def decoding(self, users: int, capacity: int) -> Decoding:
        """An empty state for a batch of users."""
        return Decoding(self.dense.decoder, users, capacity)

    def _fill_batch(
        self,
        histories: Intervals,
        rows: Int64,
        first: Int64,
        known: Int64,
        todo: Int64,
        user_vectors: Tensor,
        training: Int64,
    ) -> None:
        """Fill the intervals of one batch of `rows`, sorted by descending `todo`."""
        device, k = self.catalogue.device, self.prompts.k
        intervals = int((known + todo).max())
        places = np.minimum(first[:, None] + np.arange(intervals), histories.offsets[rows + 1][:, None] - 1)
        grid = _Grid(
            items=torch.from_numpy(histories.items[places]).to(device),
            prompts=torch.from_numpy(histories.prompts[places]).to(device),
            segments=torch.from_numpy(histories.segments[places]).long().to(device),
            answers=torch.from_numpy(histories.answers[places]).to(device),
            answer_scores=torch.from_numpy(histories.answer_scores[places]).to(device),
            older=torch.from_numpy(older_items(histories, rows, first)).to(device),
            ids=histories.users[rows],
            skipped=first - histories.offsets[rows],
            users=self.dense.user_vectors(user_vectors[torch.from_numpy(rows).to(user_vectors.device)].to(device)),
            features=self._compute_features(histories, rows, first, intervals),
            boost=None if self.boost is None else self.boost.of_batch(histories, rows, training, places),
        )
        state = self.decoding(rows.size, capacity=intervals * (1 + k))
        at = torch.from_numpy(known).to(device)
        if known.any():
            self._prefill_known(state, grid, at)
        remaining = todo.copy()
        while remaining.size:
            self._fill_interval(state, grid, at, unfinished=int((remaining > 1).sum()))
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

    def _fill_interval(self, state: Decoding, grid: "_Grid", at: Tensor, unfinished: int) -> None:
        """Feed each user's item number `at` [users], and fill the interval after it; `unfinished` users have more."""
        users = torch.arange(at.numel(), device=at.device)
        out = self._feed_entries(state, grid, grid.items[users, at], at, INTERACTED, at, 0)
        seen = torch.arange(int(at.max()) + 1, device=at.device) <= at[:, None]
        excluded = torch.where(seen, grid.items[users, : seen.shape[1]], grid.items[users, :1])
        excluded = torch.cat([excluded, grid.older[users]], dim=1)
        if self.prompts.answers:
            if grid.boost is None:
                forbidden = excluded if self.prompts.exclude_seen else None
                best = self.catalogue.top_k(out, self.prompts.answers, forbidden=forbidden)
            else:
                own = grid.boost.own.part(0, users.numel())
                raised, values = grid.boost.after(users.numel(), at.cpu().numpy())
                best = self.catalogue.top_k(out, self.prompts.answers, own, excluded, raised, values)
            grid.answers[users, at], grid.answer_scores[users, at] = best.items, best.scores.nan_to_num(neginf=0.0)
        for slot in range(self.prompts.k):
            wanted = (grid.prompts[users, at, slot] < 0).nonzero()[:, 0]
            if wanted.numel():
                forbidden = None
                if self.prompts.exclude_seen:
                    interval = grid.prompts[wanted, at[wanted]]
                    first = grid.items[wanted, :1]  # a filler that is forbidden anyway
                    forbidden = torch.cat([excluded[wanted], torch.where(interval < 0, first, interval)], dim=1)
                if self.prompts.temperature:
                    best = self.catalogue.top_k(out[wanted], self.prompts.top_k, forbidden=forbidden)
                    row = wanted.cpu().numpy()
                    places = grid.skipped[row] + at[wanted].cpu().numpy()
                    generated = draw_items(best.items, best.scores, self.prompts, grid.ids[row], places, slot)
                elif slot == 0 and self.prompts.answers and self.boost is None and self.prompts.source == "generated":
                    generated = grid.answers[wanted, at[wanted], 0]  # the same items were forbidden
                else:
                    generated = self.catalogue.top_k(out[wanted], 1, forbidden=forbidden).items[:, 0]
                grid.prompts[wanted, at[wanted], slot] = generated
                grid.segments[wanted, at[wanted], slot] = torch.where(generated < 0, INTERACTED, GENERATED)
            if slot == self.prompts.k - 1:  # the last prompt of a finished user need not be fed
                users, at = users[:unfinished], at[:unfinished]
                state.keep(unfinished)
            if at.numel():
                segments = grid.segments[users, at, slot]
                positions = (at + slot + 1).clamp(max=self.max_len - 1)
                out = self._feed_entries(state, grid, grid.prompts[users, at, slot], positions, segments, at, slot + 1)
        if not self.prompts.k:
            state.keep(unfinished)

    def _compute_features(self, histories: Intervals, rows: Int64, first: Int64, intervals: int) -> Tensor | None:
        """The features of all entries of a batch, [features, users, intervals, 1 + k] int64; None: none are read.

        They are those of the packed histories, whatever prompts will be generated: a feature looks at an entry and at
        interactions around it.
        """
        inputs, k = self.dense.inputs, self.prompts.k
        if not inputs.features:
            return None
        columns = histories.columns()
        if "events" in columns:  # types that were added to the dataset after the model was trained are unknown to it
            events = columns["events"]
            columns["events"] = np.where(events <= len(inputs.events), events, np.int16(UNKNOWN))
        # After each user's last interval comes the next item; users with fewer intervals repeat their last item.
        places = np.minimum(first[:, None] + np.arange(intervals + 1), histories.offsets[rows + 1][:, None] - 1)
        segments = np.full((*places.shape, 1 + k), GENERATED, np.int8)
        segments[:, :, 0] = INTERACTED
        segments[:, :, 1:] = np.where(histories.prompts[places] < 0, GENERATED, histories.segments[places])
        size = places.shape[1] * (1 + k)
        packed = Histories(
            users=histories.users[rows],
            items=np.full(segments.size, -1, np.int64),  # which no feature looks at
            offsets=np.arange(rows.size + 1) * size,
            segments=segments.ravel(),
            **{name: values[places].ravel() for name, values in columns.items()},
        )
        tokens = np.arange(segments.size).reshape(rows.size, -1)[:, : intervals * (1 + k)]
        features = compute_features(inputs, packed, tokens.ravel())
        assert features is not None
        return torch.from_numpy(features.reshape(-1, rows.size, intervals, 1 + k)).to(self.catalogue.device)

    def _feed_entries(
        self,
        state: Decoding,
        grid: "_Grid",
        items: Tensor,
        positions: Tensor,
        segments: Tensor | int,
        at: Tensor,
        slot: int,
    ) -> Tensor:
        """Feed one entry of each user, `items` [users] (-1: none), that of `slot` in the interval number `at`."""
        active = items >= 0
        if isinstance(segments, int):
            segments = torch.full_like(items, segments)
        vectors = self.catalogue.vectors_of(items.clamp(min=0))
        users = torch.arange(state.users, device=items.device)
        features = None if grid.features is None else grid.features[:, users, at, slot]
        return state.step(
            vectors, grid.users[: state.users], positions, segments, None if active.all() else active, features
        )

    def _prefill_known(self, state: Decoding, grid: "_Grid", known: Tensor) -> None:
        """Feed all entries of the first `known` [users] intervals in one pass."""
        users, intervals, k = grid.prompts.shape
        place = torch.arange(intervals, device=known.device)
        items = torch.cat([grid.items[:, :, None], grid.prompts], dim=2).flatten(1)
        segments = torch.cat([torch.zeros_like(grid.items)[:, :, None], grid.segments], dim=2).flatten(1)
        positions = (place[:, None] + torch.arange(k + 1, device=known.device)).clamp(max=self.max_len - 1).flatten()
        is_entry = (items >= 0) & (place.repeat_interleave(k + 1) < known[:, None])
        lengths = is_entry.sum(1)
        # Left-align the entries, in order.
        order = torch.argsort((~is_entry).to(torch.int8), dim=1, stable=True)[:, : int(lengths.max())]
        fed = items.gather(1, order).clamp(min=0)
        positions = positions.expand(users, -1).gather(1, order)
        features = None
        if grid.features is not None:
            features = grid.features.flatten(2).gather(2, order.expand(len(grid.features), -1, -1))
        vectors = self.catalogue.vectors_of(fed)
        state.prefill(vectors, grid.users, positions, segments.gather(1, order), lengths, features)


@dataclass
class _Grid:
    """One batch on the device, [users, intervals]."""

    items: Tensor
    """[users, intervals] int64 item before each interval."""
    prompts: Tensor
    """[users, intervals, k] int64; -1: none (yet)."""
    segments: Tensor
    """[users, intervals, k] int64."""
    answers: Tensor
    """[users, intervals, answers] int64."""
    answer_scores: Tensor
    """[users, intervals, answers] float32."""
    older: Tensor
    """[users, any] int64 items before those with prompts; shorter rows repeat an item of the user."""
    ids: Int64
    """[users] int64 user ids."""
    skipped: Int64
    """[users] int64 number of items before those with prompts."""
    users: Tensor
    """[users, dim] user vectors."""
    features: Tensor | None
    """[features, users, intervals, 1 + k] int64 of the item and of each prompt; None: the model reads none."""
    boost: BatchBoost | None
    """What is raised in answers; None: nothing."""


def older_items(histories: Intervals, rows: Int64, first: Int64) -> Int64:
    """[rows, longest] int64 items before `first` of each row; shorter rows repeat the item at `first`."""
    count = first - histories.offsets[rows]
    place = np.arange(int(count.max()))
    where = np.where(place < count[:, None], histories.offsets[rows][:, None] + place, first[:, None])
    return histories.items[where]
