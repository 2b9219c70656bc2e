"""Reads row groups with every value checked; what is damaged ends the run, or is set aside, listed and counted.

A row that is set aside keeps its place as a user without history, and a row group or a part that cannot be read as
that many such rows. So the windows, and with them the position in the data, are those of the whole dataset: whoever
reads it, on however many ranks and however often it was resumed, passes the same rows over.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recgpt_torchrec import storage
from recgpt_torchrec.data.damage import Damage, SetAside
from recgpt_torchrec.data.dataset import ANSWERS, COLUMNS, Dataset, Manifest
from recgpt_torchrec.data.ragged import read_nullable
from recgpt_torchrec.data.segments import INTERACTED, SEGMENTS
from recgpt_torchrec.data.windows import RowGroup, row_groups
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.storage.folders import MANIFEST


@dataclass(frozen=True)
class Reader:
    """Reads row groups of a dataset's sequences.

    Example: `Reader(dataset).read(group).table["item_ids"]`
    """

    dataset: Dataset
    answers: int = 0
    """Answers of the pre-trained model to read for each interacted item; 0: leave them."""
    times: bool = False
    """Whether timestamps are read, where there are any, and have to be in order."""
    set_aside: SetAside | None = None
    """Where damaged rows go; None: the first one is an error."""
    trained: bool = False
    """Whether the column `trained` is read, where there is one."""

    def read(self, group: RowGroup) -> "Rows":
        """Read and check one row group.

        Raises:
            InputError: names the part, the row group and the row of what cannot be used, unless it is set aside.
        """
        part = self.dataset.manifest.sequences[group.part]
        if part.path in self.dataset.lost_parts:
            return self._without(group, Damage(part.path, None, None, group.rows, self.dataset.lost_parts[part.path]))
        try:
            with self.dataset.open_part(part) as file:
                table = file.read_row_group(group.group, columns=self.columns).select(self.columns)
            table = table.cast(pa.schema([(name, COLUMNS[name]) for name in self.columns]))
        except (InputError, OSError, KeyError, pa.ArrowException) as error:
            self._reach()
            if isinstance(error, InputError) and self.set_aside is None:
                raise
            reason = f"cannot be read ({' '.join(str(error).split())})"
            return self._without(group, Damage(part.path, group.group, None, group.rows, reason))
        if table.num_rows != group.rows:  # a position in the data is one among the rows that there were
            reason = f"has {table.num_rows} rows, it had {group.rows} when its file was opened first"
            return self._without(group, Damage(part.path, group.group, None, group.rows, reason))
        lengths = pc.fill_null(pc.list_value_length(table["item_ids"]), 0).to_numpy().astype(np.float64)
        wrong = find_faults(table, self.dataset.manifest, self.answers)
        if wrong:
            self._report([Damage(part.path, group.group, row, 1, wrong[row]) for row in sorted(wrong)])
            table = empty_rows(table, wrong)
        return Rows(table, lengths)

    def _reach(self) -> None:
        """Raise an `InputError` if the dataset's store does not answer: then nothing is known to be damaged."""
        try:
            storage.exists(f"{self.dataset.path}/{MANIFEST}")
        except OSError as error:
            raise InputError(f"{self.dataset.path} cannot be reached: {error}") from None

    @property
    def columns(self) -> list[str]:
        """What is read."""
        if not self.dataset.columns:
            row_groups(self.dataset)  # looks into the footers
        unread = {*ANSWERS} if not self.answers else set()
        unread |= set() if self.times else {"timestamps"}
        unread |= set() if self.trained else {"trained"}
        return [name for name in COLUMNS if name in self.dataset.columns - unread]

    def _without(self, group: RowGroup, damage: Damage) -> "Rows":
        self._report([damage])
        table = pa.table({name: pa.nulls(group.rows, COLUMNS[name]) for name in self.columns})
        return Rows(empty_rows(table, range(group.rows)), np.full(group.rows, group.items / max(group.rows, 1)))

    def _report(self, damages: list[Damage]) -> None:
        if self.set_aside is not None:
            self.set_aside.add(damages)
            return
        more = f" (and {len(damages) - 1:,} more rows of this row group)" if len(damages) > 1 else ""
        raise InputError(f"{self.dataset.path}: {damages[0]}{more}; {self.dataset.remedy}")


class Rows(NamedTuple):
    """A row group as it was read."""

    table: pa.Table
    """user_id, item_ids and what else was asked for, of the types of `dataset.COLUMNS`; rows that are set aside have
    empty lists."""
    lengths: npt.NDArray[np.float64]
    """[rows] entries in the file; the mean of the row group where they are not known."""


def find_faults(table: pa.Table, manifest: Manifest, answers: int) -> dict[int, str]:
    """What is wrong with which row of a row group; the first thing that was found of each.

    Whole columns are looked at, at once; what costs more is done only where something is wrong.
    """
    found: dict[int, str] = {}

    def note(rows: npt.NDArray[np.integer], reason: str, *values: npt.NDArray[Any]) -> None:
        """`reason` of each of `rows`, with its places filled from `values` [rows]."""
        for number, row in enumerate(rows.tolist()):
            if row not in found:
                found[row] = reason.format(*(value[number] for value in values))

    users = table["user_id"].combine_chunks()
    if users.null_count:
        note(np.flatnonzero(users.is_null()), "the user id is null")
        users = users.fill_null(0)
    users = users.to_numpy()
    wrong = find_outside(users, 0, manifest.users)
    note(wrong, f"user id {{}} is outside 0 to {manifest.users - 1}", users[wrong])

    columns = {}
    for name in table.schema.names[1:]:
        columns[name], null_rows, null_values = read_nullable(table[name])
        note(null_rows, f"the list of {name} is null; a user without items has an empty one")
        note(columns[name].rows_of(null_values), f"a value in {name} is null")
    items, segments = columns["item_ids"], columns.get("segment_ids")
    vocabulary = f"is outside the vocabulary (0 to {manifest.items - 1})"
    wrong = find_outside(items.values, 0, manifest.items)
    note(items.rows_of(wrong), f"item id {{}} {vocabulary}", items.values[wrong])

    interacted = entries = np.diff(items.offsets)
    if segments is not None:
        wrong = find_outside(segments.values, 0, SEGMENTS)
        meanings = "0 (interacted), 1 (generated) and 2 (shown and not clicked)"
        note(segments.rows_of(wrong), f"segment id {{}} is none of {meanings}", segments.values[wrong])
        interacted = np.diff(np.concatenate([[0], np.cumsum(segments.values == INTERACTED)])[segments.offsets])
    for name, column in columns.items():
        wanted, there = interacted * answers if name in ANSWERS else entries, np.diff(column.offsets)
        wrong = np.flatnonzero(there != wanted)
        promise = f"the list of {name} has {{}} values, beside the item_ids there must be {{}}"
        note(wrong, promise, there[wrong], wanted[wrong])

    if (times := columns.get("timestamps")) is not None:
        wrong = np.flatnonzero(np.diff(times.values) < 0) + 1
        wrong = wrong[~np.isin(wrong, times.offsets)] if wrong.size else wrong
        later = times.values[wrong - 1]
        note(times.rows_of(wrong), "its times are not in order: {} comes after {}", times.values[wrong], later)
    if (ids := columns.get("answer_ids")) is not None:
        wrong = find_outside(ids.values, -1, manifest.items)
        note(ids.rows_of(wrong), f"answer id {{}} {vocabulary}", ids.values[wrong])
    if (scores := columns.get("answer_scores")) is not None:
        wrong = np.flatnonzero(~np.isfinite(scores.values))
        note(scores.rows_of(wrong), "answer score {} is not a number", scores.values[wrong])
    return found


def find_outside(values: npt.NDArray[Any], low: int, high: int) -> npt.NDArray[np.intp]:
    """Where `values` are not in `low` to `high` - 1."""
    if not values.size or (values.min() >= low and values.max() < high):
        return np.zeros(0, dtype=np.intp)
    return np.flatnonzero((values < low) | (values >= high))


def empty_rows(table: pa.Table, rows: Iterable[int]) -> pa.Table:
    """A table whose `rows` have no user (0) and empty lists."""
    kept = np.ones(table.num_rows, dtype=bool)
    kept[np.fromiter(rows, dtype=np.int64)] = False
    mask = pa.array(kept)
    columns = {}
    for name in table.schema.names:
        kind = table.schema.field(name).type
        columns[name] = pc.if_else(mask, table[name], pa.scalar([] if pa.types.is_list(kind) else 0, kind))
    return pa.table(columns)


def read_group(dataset: Dataset, group: RowGroup, answers: int = 0, times: bool = False) -> pa.Table:
    """The rows of one row group, every value checked (see `Reader`): what is damaged is an error.

    Raises:
        InputError: names the part, the row group and the row of what cannot be used.
    """
    return Reader(dataset, answers, times).read(group).table
