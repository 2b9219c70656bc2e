"""Histories of users: what a batch is made of, and reading them from a dataset, cut for a split."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recgpt_torchrec.data import ragged
from recgpt_torchrec.data.damage import SetAside
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.ragged import Int64, Ragged
from recgpt_torchrec.data.reader import Reader
from recgpt_torchrec.data.segments import INTERACTED, Interacted
from recgpt_torchrec.data.split import SplitName, cut
from recgpt_torchrec.data.windows import RowGroup


def _per_sequence() -> Any:
    return field(default=None, metadata={"per": "sequence"})


def _per_entry() -> Any:
    return field(default=None, metadata={"per": "entry"})


@dataclass(frozen=True)
class Histories:
    """A ragged list of histories as numpy arrays; sequence s holds the entries `offsets[s]:offsets[s + 1]`.

    The metadata of a field says whether it holds a value per entry or per sequence; what takes histories apart and puts
    them together goes by that, so a new column is a new field and nothing else.
    """

    users: Int64 = field(metadata={"per": "sequence"})
    """[sequences] int64 dense user ids; the same user may come twice."""
    items: Int64 = field(metadata={"per": "entry"})
    """[entries] int64 dense item ids."""
    offsets: Int64
    """[sequences + 1] int64."""
    segments: npt.NDArray[np.int8] | None = _per_entry()
    """[entries] int8: 0 interacted, 1 generated, 2 shown but not clicked; None: all interacted."""
    answers: Int64 | None = _per_entry()
    """[entries, answers] int64 items that the pre-trained model answers after each entry, best first; -1: none."""
    answer_scores: npt.NDArray[np.float32] | None = _per_entry()
    """[entries, answers] float32 scores (logits) of the answers."""
    trained: npt.NDArray[np.bool_] | None = _per_entry()
    """[entries] bool: which were trained on before, so that they are no targets; None: none."""
    read: npt.NDArray[np.float64] | None = _per_sequence()
    """[sequences] float64: how many of the dataset's entries each accounts for; progress is measured in these."""
    held_out: Int64 | None = _per_sequence()
    """[sequences] int64: the item to be ranked in evaluation."""
    seen: Ragged | None = _per_sequence()
    """In evaluation: the items of the whole history, of which `items` may hold only the newest part."""

    @property
    def lengths(self) -> Int64:
        """[sequences] int64 number of entries."""
        return np.diff(self.offsets)

    def part(self, start: int, stop: int) -> "Histories":
        """The sequences `start:stop`; nothing is copied."""
        first, last = self.offsets[start], self.offsets[stop]
        return self._each(
            lambda values: values[first:last],
            lambda values: values.part(start, stop) if isinstance(values, Ragged) else values[start:stop],
            self.offsets[start : stop + 1] - first,
        )

    def reorder(self, rows: npt.NDArray[np.integer]) -> "Histories":
        """The sequences with these numbers, in this order; one may come twice."""
        start, stop = self.offsets[:-1][rows], self.offsets[1:][rows]
        return self._each(
            lambda values: Ragged(values, self.offsets).cut(start, stop).values,
            lambda values: values.take(rows) if isinstance(values, Ragged) else values[rows],
            ragged.offsets_of(stop - start),
        )

    def _each(
        self, of_entries: Callable[[Any], Any], of_sequences: Callable[[Any], Any], offsets: Int64
    ) -> "Histories":
        how = {"entry": of_entries, "sequence": of_sequences}
        columns = {f.name: (getattr(self, f.name), f.metadata["per"]) for f in fields(self) if "per" in f.metadata}
        changed: dict[str, Any] = {
            name: None if values is None else how[per](values) for name, (values, per) in columns.items()
        }
        return Histories(offsets=offsets, **changed)


def no_histories() -> Histories:
    """A list without any sequence: what a rank that has run out of batches goes on with."""
    none = np.zeros(0, dtype=np.int64)
    return Histories(users=none, items=none, offsets=np.zeros(1, dtype=np.int64))


def join(lists: Sequence[Histories]) -> Histories:
    """The sequences of several lists, one list after the other; they have the same columns."""
    if not lists:
        return no_histories()
    if len(lists) == 1:
        return lists[0]

    def joined(values: list[Any]) -> Any:
        assert len({each is None for each in values}) == 1, "lists of histories with other columns"
        if values[0] is None:
            return None
        return ragged.join(values) if isinstance(values[0], Ragged) else np.concatenate(values)

    columns = {f.name: joined([getattr(each, f.name) for each in lists]) for f in fields(Histories) if f.metadata}
    return Histories(offsets=ragged.offsets_of(np.concatenate([each.lengths for each in lists])), **columns)


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
    """What is trained on of a longer history: its newest part, or all of it, cut into overlapping pieces."""
    prompts: bool = False
    """Whether entries that were not interacted with (generated, or shown but not clicked) are read; else left out."""
    answers: int = 0
    """Answers of the pre-trained model to read for each interacted item."""
    new_targets: bool = False
    """Whether histories keep only targets that the dataset's column `trained` does not mark, each with the history
    before it; a history without such targets is empty."""
    set_aside: SetAside | None = None
    """Where damaged rows go; None: the first one is an error."""
    time_order: bool = False
    """Whether a history whose times are not in order is damaged."""

    @property
    def training(self) -> bool:
        """Whether histories hold targets to learn from."""
        return self.split == "training"

    def read(self, groups: Sequence[RowGroup], order: Callable[[int], Int64] | None = None) -> Histories:
        """The histories of some row groups.

        Args:
            groups: read together.
            order: from the number of sequences to the order in which they come; None: that of the dataset.

        Raises:
            InputError: names the place that is damaged, unless it is set aside.
        """
        reader = Reader(self.dataset, self.answers, self.time_order, self.set_aside, self.new_targets)
        tables = [reader.read(group) for group in groups]
        table, read = pa.concat_tables([r.table for r in tables]), np.concatenate([r.lengths for r in tables])
        users, items = table["user_id"].to_numpy(), Ragged.from_arrow(table["item_ids"])
        segments = Ragged.from_arrow(table["segment_ids"]).values if "segment_ids" in table.schema.names else None
        trained = Ragged.from_arrow(table["trained"]).values != 0 if self.new_targets else None
        if segments is not None and not self.prompts:
            kept = segments == INTERACTED
            items, segments = items.keep(kept), None
            trained = None if trained is None else trained[kept]
        real = Interacted.among(items.offsets, segments)

        row, begin, end, target = cut(real.offsets, self.split)
        users, first = users[row], items.offsets[:-1][row]
        last = np.where(end > begin, real.entries(np.maximum(end, 1)) if real.places.size else first, first)
        if self.training and self.long_histories == "windows":
            owner, start, stop = overlapping(first, last, self.max_len)
            users, read = users[owner], (read / np.bincount(owner, minlength=users.size))[owner]
        else:
            start, stop = np.maximum(first, last - self.max_len - self.training), last
        if trained is not None:
            new = ~trained if segments is None else ~trained & (segments == INTERACTED)
            start, stop = _to_newest_target(start, stop, new)

        rows = np.arange(users.size) if order is None else order(users.size)
        start, stop = start[rows], stop[rows]
        inputs = items.cut(start, stop)

        def entries(values: npt.NDArray[Any] | None) -> Any:
            return None if values is None else items.with_values(values).cut(start, stop).values

        answers, answer_scores = self._answers(table, items.values.size, real)
        return Histories(
            users=users[rows].astype(np.int64, copy=False),
            items=inputs.values,
            offsets=inputs.offsets,
            segments=entries(segments),
            answers=entries(answers),
            answer_scores=entries(answer_scores),
            trained=entries(trained),
            read=read[rows] if self.training else None,
            held_out=None if target is None else items.values[real.places[target]][rows],
            seen=None if self.training else Ragged(items.values[real.places], real.offsets).cut(begin[rows], end[rows]),
        )

    def _answers(
        self, table: pa.Table, entries: int, real: Interacted
    ) -> tuple[Int64, npt.NDArray[np.float32]] | tuple[None, None]:
        """Answers and scores by entry; the dataset has them by interacted item."""
        if not self.answers:
            return None, None
        ids = np.full((entries, self.answers), -1, dtype=np.int64)
        scores = np.zeros((entries, self.answers), dtype=np.float32)
        ids[real.places] = Ragged.from_arrow(table["answer_ids"]).values.reshape(-1, self.answers)
        scores[real.places] = Ragged.from_arrow(table["answer_scores"]).values.reshape(-1, self.answers)
        return ids, scores


def _to_newest_target(start: Int64, stop: Int64, new: npt.NDArray[np.bool_]) -> tuple[Int64, Int64]:
    """Empty the ranges `start:stop` in which no entry but the first is a `new` [entries] target."""
    count = ragged.offsets_of(new)
    return start, np.where(count[stop] > count[np.minimum(start + 1, stop)], stop, start)


def overlapping(start: Int64, stop: Int64, max_len: int) -> tuple[Int64, Int64, Int64]:
    """Cut each range into pieces of `max_len` inputs and one target, from the newest back.

    Every target is in exactly one piece. Pieces overlap by the one entry that is a target in the earlier and the first
    input in the later.

    Returns:
        owner, start, stop: [pieces] which range a piece is of, and where it lies.
    """
    pieces = np.maximum(-(-(stop - start - 1) // max_len), 1)
    back = ragged.ragged_arange(pieces)
    owner = np.repeat(np.arange(start.size), pieces)
    ends = stop[owner] - back * max_len
    return owner, np.maximum(start[owner], ends - max_len - 1), ends
