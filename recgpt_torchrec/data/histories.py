"""Histories of users as batches hold them. Needs numpy alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from recgpt_torchrec.data import ragged
from recgpt_torchrec.data.inputs.spec import EVENTS, PLACES, TIMES, Inputs
from recgpt_torchrec.data.ragged import Int64, Ragged


def _per_sequence() -> Any:
    return field(default=None, metadata={"per": "sequence"})


def _per_entry() -> Any:
    return field(default=None, metadata={"per": "entry"})


@dataclass(frozen=True)
class Histories:
    """A ragged list of histories as numpy arrays; sequence s holds the entries `offsets[s]:offsets[s + 1]`.

    The metadata of a field says whether it holds a value per entry or per sequence. Slicing and joining follow it, so a
    new column needs no more than a new field.
    """

    users: Int64 = field(metadata={"per": "sequence"})
    """[sequences] int64 dense user ids; the same user may occur twice."""
    items: Int64 = field(metadata={"per": "entry"})
    """[entries] int64 dense item ids."""
    offsets: Int64
    """[sequences + 1] int64."""
    segments: npt.NDArray[np.int8] | None = _per_entry()
    """[entries] int8, see `data.segments`; None: all interacted."""
    answers: Int64 | None = _per_entry()
    """[entries, answers] int64: items that the pre-trained model ranks high after each entry, best first; -1: none."""
    answer_scores: npt.NDArray[np.float32] | None = _per_entry()
    """[entries, answers] float32 scores (logits) of the answers."""
    neighbours: Int64 | None = _per_entry()
    """[entries, neighbours] int64: items that follow those of the history in the histories of others, best first; -1:
    none. See `data.neighbours.answering`."""
    neighbour_scores: npt.NDArray[np.float32] | None = _per_entry()
    """[entries, neighbours] float32 scores of the neighbours, in proportion to which they share; 0: none."""
    trained: npt.NDArray[np.bool_] | None = _per_entry()
    """[entries] bool: whether an entry was trained on before and so is no target; None: none was."""
    times: Int64 | None = _per_entry()
    """[entries] int64 timestamps, in the dataset's unit; None: they are not read."""
    events: npt.NDArray[np.int16] | None = _per_entry()
    """[entries] int16 event types, from 1 on; 0: unknown. None: they are not read."""
    known: npt.NDArray[np.bool_] | None = _per_entry()
    """[entries] bool: in training, whether an entry was known at the request of the next interaction, which it may then
    predict; None: all were."""
    weights: npt.NDArray[np.float32] | None = _per_entry()
    """[entries] float32: each one's weight as a target, 0 where it is none; None: all have 1."""
    places: npt.NDArray[np.int16] | None = _per_entry()
    """[entries] int16 places in the list that entries were shown in, from 1 on; 0: unknown. None: they are not read."""
    request_times: Int64 | None = _per_sequence()
    """[sequences] int64: in encoding, the time of the request after the newest entry, with `times`."""
    asked_events: npt.NDArray[np.int16] | None = _per_sequence()
    """[sequences] int16: in encoding, the event type that is asked for (0: any), with `events`."""
    read: npt.NDArray[np.float64] | None = _per_sequence()
    """[sequences] float64: number of entries of the dataset that each accounts for, the unit of progress."""
    held_out: Int64 | None = _per_sequence()
    """[sequences] int64: the item to rank in evaluation."""
    seen: Ragged | None = _per_sequence()
    """In evaluation: the items of the whole history, where `items` may hold the newest only."""

    @property
    def lengths(self) -> Int64:
        """[sequences] int64 number of entries."""
        return np.diff(self.offsets)

    def part(self, start: int, stop: int) -> "Histories":
        """The sequences `start:stop`, without a copy."""
        first, last = self.offsets[start], self.offsets[stop]
        return self._map_columns(
            lambda values: values[first:last],
            lambda values: values.part(start, stop) if isinstance(values, Ragged) else values[start:stop],
            self.offsets[start : stop + 1] - first,
        )

    def reorder(self, rows: npt.NDArray[np.integer]) -> "Histories":
        """The sequences with these numbers, in this order; one may occur twice."""
        start, stop = self.offsets[:-1][rows], self.offsets[1:][rows]
        return self._map_columns(
            lambda values: Ragged(values, self.offsets).cut(start, stop).values,
            lambda values: values.take(rows) if isinstance(values, Ragged) else values[rows],
            ragged.offsets_of(stop - start),
        )

    def keep(self, mask: npt.NDArray[np.bool_]) -> "Histories":
        """The entries where `mask` [entries] is true, in the same sequences."""
        offsets = ragged.offsets_of(mask)[self.offsets]
        return self._map_columns(lambda values: values[mask], lambda values: values, offsets)

    def _map_columns(
        self, of_entries: Callable[[Any], Any], of_sequences: Callable[[Any], Any], offsets: Int64
    ) -> "Histories":
        functions = {"entry": of_entries, "sequence": of_sequences}
        columns = {f.name: (getattr(self, f.name), f.metadata["per"]) for f in fields(self) if "per" in f.metadata}
        changed: dict[str, Any] = {
            name: None if values is None else functions[per](values) for name, (values, per) in columns.items()
        }
        return Histories(offsets=offsets, **changed)


def no_histories(inputs: Inputs | None = None) -> Histories:
    """A list without sequences, for a rank that has no batches left, with the columns that a model reads."""
    none = np.zeros(0, dtype=np.int64)
    offsets = np.zeros(1, dtype=np.int64)
    small = np.zeros(0, dtype=np.int16)
    inputs = Inputs() if inputs is None else inputs
    return Histories(
        users=none,
        items=none,
        offsets=offsets,
        times=none if inputs.reads(*TIMES) else None,
        events=small if inputs.reads(*EVENTS) else None,
        places=small if inputs.reads(*PLACES) else None,
        held_out=none,
        seen=Ragged(none, offsets),
    )


def join(lists: Sequence[Histories]) -> Histories:
    """Concatenate lists of histories with the same columns."""
    if not lists:
        return no_histories()
    if len(lists) == 1:
        return lists[0]

    def joined(values: list[Any]) -> Any:
        assert len({each is None for each in values}) == 1, "lists of histories with different columns"
        if values[0] is None:
            return None
        return ragged.join(values) if isinstance(values[0], Ragged) else np.concatenate(values)

    columns = {f.name: joined([getattr(each, f.name) for each in lists]) for f in fields(Histories) if f.metadata}
    return Histories(offsets=ragged.offsets_of(np.concatenate([each.lengths for each in lists])), **columns)
