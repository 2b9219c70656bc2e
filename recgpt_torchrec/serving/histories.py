"""From requests of raw keys to the histories that a model reads: the rows that a dataset would hold of them.

The rows are cut by the reader of datasets, so every rule of it holds: length, prompts, event types, request times.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from recgpt_torchrec.checkpoints.trained import Trained
from recgpt_torchrec.data.dataset import COLUMNS, Dataset
from recgpt_torchrec.data.histories import Histories
from recgpt_torchrec.data.inputs.events import check_asked, find_event
from recgpt_torchrec.data.inputs.request import Request
from recgpt_torchrec.data.inputs.spec import EVENTS, PLACES, Inputs
from recgpt_torchrec.data.ragged import Int64, offsets_of
from recgpt_torchrec.data.reading.histories import HistoryReader
from recgpt_torchrec.data.segments import FEEDBACK, INTERACTED
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.serving.clock import Clock
from recgpt_torchrec.serving.keys import UNKNOWN, Key, KeyTable
from recgpt_torchrec.serving.prompts import RequestPrompts
from recgpt_torchrec.serving.requests import History, Shown


@dataclass(frozen=True)
class Read:
    """Requests as a model reads them."""

    histories: Histories
    """Of the requests with at least one entry that the model reads; user -1 is a stranger."""
    rows: Int64
    """[sequences] int64: the request of each."""
    unknown: list[list[Key]]
    """Per request the items of the history that the dataset does not know; they are left out."""


class RequestReader:
    """Turns requests of raw keys into histories.

    Args:
        dataset: whose keys, event types and times are meant.
        trained: the model.
        checkpoint: its folder, for messages.
        items: the keys of all items.
        prompts: how prompts are made; None: the model reads none.
    """

    def __init__(
        self, dataset: Dataset, trained: Trained, checkpoint: str, items: KeyTable, prompts: RequestPrompts | None
    ) -> None:
        self.dataset, self.items, self.prompts, self.checkpoint = dataset, items, prompts, checkpoint
        self.inputs: Inputs = trained.inputs
        self.clock = Clock(dataset, self.inputs, checkpoint)
        self.reader = HistoryReader(
            dataset=dataset,
            split="all",
            max_len=trained.config.max_len,
            prompts=trained.prompts,
            feedback=trained.feedback,
            inputs=self.inputs,
            request=Request(time=self.clock.newest),
        )

    def read(self, requests: Sequence[History], users: Int64) -> Read:
        """The histories of `requests`, of `users` [requests] int64 (-1: a stranger).

        Raises:
            InputError: a request lacks what the model reads, or asks for what it cannot answer.
        """
        entries, unknown = self._collect(requests)
        table = entries.table(np.arange(len(requests)), self._columns)
        if self.prompts is not None:
            table = self.prompts.insert(table, users)
        histories = self.reader.histories_of(table)
        rows = histories.users
        return Read(replace(histories, users=users[rows], **self._asked(requests, rows)), rows, unknown)

    def _asked(self, requests: Sequence[History], rows: Int64) -> dict[str, Any]:
        """Time and event type of each request, where the model reads them and a request gives its own."""
        asked: dict[str, Any] = {}
        times = [self.clock.time_of_request(request.time) for request in requests]
        for word in {request.event for request in requests if request.event is not None}:
            check_asked(self.inputs, self.checkpoint, "event", word)
        if self.clock.is_read:
            asked["request_times"] = np.array(times, np.int64)[rows]
        if self.inputs.reads(*EVENTS):
            events = [0 if each.event is None else self.inputs.id_of_event(each.event) for each in requests]
            asked["asked_events"] = np.array(events, np.int16)[rows]
        return asked

    @property
    def _columns(self) -> list[str]:
        """Columns of entries that are needed beside ids."""
        timed = self.clock.is_read or self.reader.reads_feedback
        wanted = {"timestamps": timed, "event_ids": self.reader.reads_events, "places": self.inputs.reads(*PLACES)}
        wanted["segment_ids"] = self.prompts is not None
        return [name for name, is_wanted in wanted.items() if is_wanted]

    def _collect(self, requests: Sequence[History]) -> "tuple[_Entries, list[list[Key]]]":
        """The entries of all requests that the dataset knows, and the unknown items of each."""
        keys: list[Key] = []
        for request in requests:
            keys += request.items
            keys += [_key_of(each) for after in request.shown or () for each in after]
        ids = iter(self.items.ids_of(keys).tolist())
        entries, unknown = _Entries(), []
        for request in requests:
            own = [next(ids) for _ in request.items]
            shown = [[(next(ids), each) for each in after] for after in request.shown or ()]
            self._check(request, any(shown))
            entries.begin()
            unknown.append([key for key, item in zip(request.items, own, strict=True) if item == UNKNOWN])
            times = self._times_of(request)
            for number, item in enumerate(own):
                if item != UNKNOWN:
                    event = None if request.events is None else request.events[number]
                    place = 0 if request.places is None else request.places[number]
                    entries.add(item, INTERACTED, times[number], self._event(event), place)
                if not shown or entries.is_empty:  # before the first item there is nothing to be shown after
                    continue
                for shown_id, each in shown[number]:
                    if shown_id != UNKNOWN:
                        of = each if isinstance(each, Shown) else Shown(item=each)
                        time = times[number] if of.time is None else self.clock.in_units(of.time)
                        entries.add(shown_id, FEEDBACK[of.kind], time, self._event(of.event), of.place)
            entries.check_order()
        return entries, unknown

    def _check(self, request: History, has_shown: bool) -> None:
        """Raise an `InputError` where a request lacks what the model reads, or has what it cannot read."""
        of = f"the model of {self.checkpoint}"
        if request.items and self.clock.is_read and request.times is None:
            raise InputError(f"{of} reads times, and a history has none; give the time of each item (times)")
        if request.items and self.reader.reads_events and request.events is None:
            types = ", ".join(self.inputs.events)
            raise InputError(f"{of} reads event types ({types}), and a history has none; give one per item (events)")
        if not has_shown:
            return
        kinds = () if self.prompts is None else self.prompts.kinds
        if not kinds:
            raise InputError(
                f"{of} reads no items that were shown and not clicked; leave shown out, or give one tuned on prompts "
                "of --prompts.source exposed or both"
            )
        for after in request.shown or ():
            for each in after:
                if isinstance(each, Shown) and each.kind not in kinds:
                    raise InputError(f"{of} reads the kinds of feedback {', '.join(kinds)}, not {each.kind}")

    def _times_of(self, request: History) -> list[int]:
        """The time of each item; 0 where there is none."""
        if request.times is None:
            return [0] * len(request.items)
        return [self.clock.in_units(time) for time in request.times]

    def _event(self, word: str | None) -> int:
        """The id of an event type in the dataset; 0: unknown, or not read."""
        if word is None or not self.reader.reads_events:
            return 0
        return find_event(self.dataset, "events", word)


class _Entries:
    """Entries of requests, collected one by one."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.values: dict[str, list[int]] = {
            name: [] for name in ("item_ids", "segment_ids", "timestamps", "event_ids", "places")
        }

    def begin(self) -> None:
        """Begin the next request."""
        self.lengths.append(0)

    @property
    def is_empty(self) -> bool:
        """Whether the current request has no entry yet."""
        return not self.lengths[-1]

    def add(self, *values: int) -> None:
        """Add an entry: item, segment, time, event id, place."""
        self.lengths[-1] += 1
        for column, value in zip(self.values.values(), values, strict=True):
            column.append(value)

    def check_order(self) -> None:
        """Raise an `InputError` where a time of the current request is before the one in front of it."""
        times = self.values["timestamps"][len(self.values["timestamps"]) - self.lengths[-1] :]
        for earlier, later in zip(times, times[1:], strict=False):
            if later < earlier:
                raise InputError(f"the times of a history fall from {earlier} to {later}; give its items oldest first")

    def table(self, users: Int64, columns: Sequence[str]) -> pa.Table:
        """Rows as in a dataset, with these columns beside user_id and item_ids."""
        offsets = pa.array(offsets_of(np.array(self.lengths, np.int64)).astype(np.int32))
        lists = {
            name: pa.ListArray.from_arrays(offsets, pa.array(self.values[name], COLUMNS[name].value_type))
            for name in ("item_ids", *columns)
        }
        return pa.table({"user_id": pa.array(users), **lists})


def _key_of(shown: Key | Shown) -> Key:
    return shown.item if isinstance(shown, Shown) else shown
