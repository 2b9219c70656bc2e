"""Reads histories from a dataset, cut for a split."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recgpt_torchrec.data import ragged
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.histories import Histories
from recgpt_torchrec.data.inputs.features import UNKNOWN
from recgpt_torchrec.data.inputs.request import Request
from recgpt_torchrec.data.inputs.spec import EVENTS, PLACES, TIMES, Inputs
from recgpt_torchrec.data.ragged import Float64, Int64, Ragged
from recgpt_torchrec.data.reading.damage import SetAside
from recgpt_torchrec.data.reading.feedback import extend_by_feedback, find_known
from recgpt_torchrec.data.reading.reader import Reader, stored_starts
from recgpt_torchrec.data.reading.sample import UserSample
from recgpt_torchrec.data.segments import INTERACTED, Interacted
from recgpt_torchrec.data.split import SplitName, cut
from recgpt_torchrec.data.windows import RowGroup


@dataclass(frozen=True, kw_only=True)
class HistoryReader:
    """Reads the histories of row groups, cut for a split and to the newest `max_len` entries.

    Example: `HistoryReader(dataset=dataset, split="test", max_len=50).read(row_groups(dataset)[:4])`
    """

    dataset: Dataset
    split: SplitName
    max_len: int
    """Maximum number of entries before a target."""
    long_histories: Literal["newest", "windows"] = "newest"
    """How a longer history is trained on: its newest part, or all of it, cut into overlapping pieces."""
    prompts: bool = False
    """Whether prompts (generated, or shown but not clicked) are read; they are left out otherwise."""
    feedback: bool = False
    """Whether prompts predict, so that feedback which was known at a request is read to answer it: that after the
    newest interaction too, where the dataset holds it (`Manifest.feedback`)."""
    answers: int = 0
    """Number of answers of the pre-trained model to read per interacted item."""
    new_targets: bool = False
    """Whether entries that the dataset's column `trained` marks are no targets; a history without other targets is
    empty."""
    set_aside: SetAside | None = None
    """Where damaged rows are listed; None: the first one is an error."""
    time_order: bool = False
    """Whether a history with timestamps out of order is damaged."""
    sample: UserSample | None = None
    """Users to read; None: all."""
    inputs: Inputs = field(default_factory=Inputs)
    """What the model reads beside ids, whose columns are read."""
    request: Request = Request()
    """What is asked after each history, where it is encoded."""
    event_weights: npt.NDArray[np.float32] | None = None
    """[event types + 1] float32, by event id: the weight of a target of each type, 0 where it is none; None: all have
    1. A history without a target is empty."""

    @property
    def training(self) -> bool:
        """Whether histories hold targets to train on."""
        return self.split == "training"

    @property
    def reads_feedback(self) -> bool:
        """Whether feedback is read by what was known at each request."""
        return self.prompts and self.feedback and bool(self.dataset.manifest.feedback)

    @property
    def reads_events(self) -> bool:
        """Whether event types are read."""
        return self.inputs.reads_events or self.event_weights is not None or self.request.held_out_event > 0

    def read(
        self,
        groups: Sequence[RowGroup],
        order: Callable[[int], Int64] | None = None,
        shift: Callable[[Int64], Float64] | None = None,
    ) -> Histories:
        """The histories of some row groups.

        Args:
            groups: row groups, read together.
            order: returns the order of n sequences, a permutation [n] int64; None: the order of the dataset.
            shift: of users [n], returns [n] from 0 to less than 1 the share of a window that the newest one of each is
                shorter; None: it is as long as the others.

        Raises:
            InputError: a row is damaged, and not set aside; names its place.
        """
        reader = Reader(
            self.dataset,
            self.answers,
            self.time_order or self.inputs.reads(*TIMES) or self.reads_feedback,
            self.set_aside,
            self.new_targets,
            events=self.reads_events,
            places=self.inputs.reads(*PLACES),
        )
        tables = [reader.read(group) for group in groups]
        lengths = np.concatenate([each.lengths for each in tables])
        return self.histories_of(pa.concat_tables([each.table for each in tables]), lengths, order, shift)

    def histories_of(
        self,
        table: pa.Table,
        read: Float64 | None = None,
        order: Callable[[int], Int64] | None = None,
        shift: Callable[[Int64], Float64] | None = None,
    ) -> Histories:
        """The histories of rows with the columns of a dataset's sequences, whose values were checked.

        Args:
            table: user_id, item_ids and what else `inputs` and prompts need.
            read: [rows] float64 number of entries that each row accounts for, in training.
            order, shift: see `read`.
        """
        timed, evented, placed = (self.inputs.reads(*names) for names in (TIMES, EVENTS, PLACES))
        users, items = ragged.to_numpy(table["user_id"]), Ragged.from_arrow(table["item_ids"])
        segments = Ragged.from_arrow(table["segment_ids"]).values if "segment_ids" in table.schema.names else None
        trained = Ragged.from_arrow(table["trained"]).values != 0 if self.new_targets else None
        read_columns = {
            "times": ("timestamps", timed),
            "events": ("event_ids", self.reads_events),
            "places": ("places", placed),
        }
        columns = {
            name: Ragged.from_arrow(table[column]).values for name, (column, wanted) in read_columns.items() if wanted
        }
        if segments is not None and not self.prompts:
            is_interacted = segments == INTERACTED
            items, segments = items.keep(is_interacted), None
            trained = None if trained is None else trained[is_interacted]
            columns = {name: values[is_interacted] for name, values in columns.items()}
        interacted = Interacted.among(items.offsets, segments)

        hold_out = self.dataset.manifest.hold_out
        parts = cut(interacted.offsets, self.split, hold_out, stored_starts(table))
        if self.sample is not None:
            parts = parts.keep(self.sample.contains(users[parts.row]))
        if self.request.held_out_event and parts.target is not None:
            held_out = columns["events"][interacted.places[parts.target]]
            parts = parts.keep(held_out == self.request.held_out_event)
        row, begin, end, target = parts
        first = items.offsets[:-1][row]
        last = np.where(end > begin, interacted.entries(np.maximum(end, 1)) if interacted.places.size else first, first)
        known = None
        if self.reads_feedback and segments is not None:
            times = Ragged.from_arrow(table["timestamps"]).values if "timestamps" in table.schema.names else None
            known = find_known(segments, times, interacted, items.offsets)
            if not self.training:
                last = extend_by_feedback(last, items.offsets[1:][row], segments, known)
        answers, answer_scores = self._read_answers(table, items.values.size, interacted)
        weights = None if self.event_weights is None else self.event_weights[columns["events"]]
        kept = self._find_kept(columns.get("events"), segments)
        if evented:  # types that were added to the dataset after the model was trained are unknown to it
            is_known = columns["events"] <= len(self.inputs.events)
            columns["events"] = np.where(is_known, columns["events"], np.int16(UNKNOWN))
        if kept is not None:  # from here on, entries are those that histories hold
            before = ragged.offsets_of(kept)
            first, last = before[first], before[last]
        if kept is not None and not self.training:
            filled = last > first
            first, last, (row, begin, end, target) = first[filled], last[filled], parts.keep(filled)
        users = users[row]

        def select(values: npt.NDArray[Any] | None) -> Any:
            return values if values is None or kept is None else values[kept]

        if self.training and self.long_histories == "windows":
            shifts = None if shift is None else (shift(users) * self.max_len).astype(np.int64)
            owner, start, stop = cut_pieces(first, last, self.max_len, shifts)
            assert read is not None
            users, read = users[owner], (read / np.bincount(owner, minlength=users.size))[owner]
        else:
            start, stop = np.maximum(first, last - self.max_len - self.training), last
        if trained is not None or weights is not None:
            is_target = np.ones(items.values.size, dtype=bool) if trained is None else ~trained
            is_target &= True if segments is None else segments == INTERACTED
            is_target &= True if weights is None else weights > 0
            start, stop = _empty_without_target(start, stop, select(is_target))

        rows = np.arange(users.size) if order is None else order(users.size)
        start, stop = start[rows], stop[rows]
        inputs = items.with_values(select(items.values)).cut(start, stop)

        def entries(values: npt.NDArray[Any] | None) -> Any:
            return None if values is None else items.with_values(select(values)).cut(start, stop).values

        return Histories(
            users=users[rows].astype(np.int64, copy=False),
            items=inputs.values,
            offsets=inputs.offsets,
            segments=entries(segments),
            answers=entries(answers),
            answer_scores=entries(answer_scores),
            trained=entries(trained),
            known=entries(known) if self.training else None,
            weights=entries(weights),
            **{name: entries(values) for name, values in columns.items() if name != "events" or evented},
            **self._requests(columns, interacted, target, rows),
            read=read[rows] if self.training and read is not None else None,
            held_out=None if target is None else items.values[interacted.places[target]][rows],
            seen=None
            if self.training
            else Ragged(items.values[interacted.places], interacted.offsets).cut(begin[rows], end[rows]),
        )

    def _find_kept(
        self, events: npt.NDArray[np.int16] | None, segments: npt.NDArray[np.int8] | None
    ) -> npt.NDArray[np.bool_] | None:
        """[entries] bool: those that histories hold, by their event type or because they are prompts; None: all."""
        if not self.inputs.history_events:
            return None
        assert events is not None
        kept = np.isin(events, [self.inputs.id_of_event(word) for word in self.inputs.history_events])
        return kept if segments is None else kept | (segments != INTERACTED)

    def _requests(
        self,
        columns: dict[str, npt.NDArray[Any]],
        interacted: Interacted,
        target: Int64 | None,
        rows: npt.NDArray[np.integer],
    ) -> dict[str, npt.NDArray[Any]]:
        """Per sequence, the time of the request after the newest entry and the event type asked for, in encoding."""
        if self.training:
            return {}
        requests: dict[str, npt.NDArray[Any]] = {}
        if "times" in columns and self.request.time is not None:
            requests["request_times"] = np.full(rows.size, self.request.time, dtype=np.int64)
        elif "times" in columns and target is not None:
            requests["request_times"] = columns["times"][interacted.places[target]][rows]
        if self.inputs.reads(*EVENTS):
            requests["asked_events"] = np.full(rows.size, self.request.event, dtype=np.int16)
        return requests

    def _read_answers(
        self, table: pa.Table, entries: int, interacted: Interacted
    ) -> tuple[Int64, npt.NDArray[np.float32]] | tuple[None, None]:
        """Answers and scores per entry; the dataset stores them per interacted item."""
        if not self.answers:
            return None, None
        ids = np.full((entries, self.answers), -1, dtype=np.int64)
        scores = np.zeros((entries, self.answers), dtype=np.float32)
        ids[interacted.places] = Ragged.from_arrow(table["answer_ids"]).values.reshape(-1, self.answers)
        scores[interacted.places] = Ragged.from_arrow(table["answer_scores"]).values.reshape(-1, self.answers)
        return ids, scores


def _empty_without_target(start: Int64, stop: Int64, new: npt.NDArray[np.bool_]) -> tuple[Int64, Int64]:
    """Empty each range `start:stop` in which no entry after the first is a `new` [entries] target."""
    count = ragged.offsets_of(new)
    return start, np.where(count[stop] > count[np.minimum(start + 1, stop)], stop, start)


def cut_pieces(start: Int64, stop: Int64, max_len: int, shift: Int64 | None = None) -> tuple[Int64, Int64, Int64]:
    """Cut each range into pieces of `max_len` tokens and one more target, starting from the newest.

    Every entry but the first of a range is a target in exactly one piece. Pieces overlap by one entry: the last target
    of the earlier and the first token of the later. Where that is a prompt, the item after it is predicted from the
    prompt alone, so not at all where prompts do not predict.

    Args:
        start, stop: [ranges] int64, the ranges `start:stop`.
        max_len: maximum number of tokens of a piece.
        shift: [ranges] int64 from 0 to `max_len` - 1, by how many tokens the newest piece of a range is shorter, where
            the range is cut at all; None: by none.

    Returns:
        owner, start, stop: [pieces] int64, the index of the range that a piece is cut from, and the piece `start:stop`.
    """
    targets = stop - start - 1
    beyond = np.where(targets > max_len, 0 if shift is None else shift, 0)  # as if so many more came after the newest
    pieces = np.maximum(-(-(targets + beyond) // max_len), 1)
    back = ragged.ragged_arange(pieces)
    owner = np.repeat(np.arange(start.size), pieces)
    ends = stop[owner] + beyond[owner] - back * max_len
    return owner, np.maximum(start[owner], ends - max_len - 1), np.minimum(ends, stop[owner])
