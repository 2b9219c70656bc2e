"""Reads row groups and checks every value; damaged rows end the run, or are set aside, listed and counted.

A row that is set aside stays in its place as a user without history; a row group or part that cannot be read becomes
that many such rows. So windows, and with them the position in the data, do not depend on the damage: the same rows are
left out on any number of ranks and after any resume.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recgpt_torchrec import storage
from recgpt_torchrec.data.dataset import ANSWERS, COLUMNS, STARTS, Dataset, Manifest
from recgpt_torchrec.data.days.records import day_of
from recgpt_torchrec.data.ragged import Ragged, offsets_of, read_nullable, to_numpy
from recgpt_torchrec.data.reading.damage import Damage, SetAside
from recgpt_torchrec.data.segments import INTERACTED, PLAIN_SEGMENTS
from recgpt_torchrec.data.split import STORED, Starts
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
    """Number of answers of the pre-trained model to read per interacted item; 0: none."""
    times: bool = False
    """Whether timestamps are read, where present, and must be in order."""
    set_aside: SetAside | None = None
    """Where damaged rows are listed; None: the first one is an error."""
    trained: bool = False
    """Whether the column `trained` is read, where present."""
    events: bool = False
    """Whether event types are read."""
    places: bool = False
    """Whether places in a list are read."""

    def read(self, group: RowGroup) -> "Rows":
        """Read and check one row group.

        Raises:
            InputError: a row is damaged, and not set aside; names the part, the row group and the row.
            StorageError: the disk, the mount or the network failed, which is no damage.
        """
        part = self.dataset.manifest.sequences[group.part]
        if part.path in self.dataset.lost_parts:
            return self._replace_group(
                group, Damage(part.path, None, None, group.rows, self.dataset.lost_parts[part.path])
            )
        try:
            with self.dataset.open_part(part) as file:
                # One thread: the others are for the model, and small row groups take half the time.
                table = file.read_row_group(group.group, columns=self.columns, use_threads=False).select(self.columns)
            table = table.cast(pa.schema([(name, COLUMNS[name]) for name in self.columns]))
        except (InputError, OSError, KeyError, pa.ArrowException) as error:
            storage.raise_storage_failure(error, f"{self.dataset.path}/{part.path}")
            self._check_reachable()
            if isinstance(error, InputError) and self.set_aside is None:
                raise
            reason = f"cannot be read ({' '.join(str(error).split())})"
            return self._replace_group(group, Damage(part.path, group.group, None, group.rows, reason))
        if table.num_rows != group.rows:  # a position in the data counts the rows of the first opening
            reason = f"has {table.num_rows} rows, it had {group.rows} when its file was first opened"
            return self._replace_group(group, Damage(part.path, group.group, None, group.rows, reason))
        lengths = read_nullable(table["item_ids"])[0].lengths.astype(np.float64)
        faults = find_faults(table, self.dataset.manifest, self.answers)
        if faults:
            self._report_damage([Damage(part.path, group.group, row, 1, faults[row]) for row in sorted(faults)])
            table = empty_rows(table, faults)
        if self.dataset.newest is not None:
            day, _ = self.dataset.newest.find(to_numpy(table["user_id"]))
            table = empty_rows(table, np.flatnonzero(day != day_of(part)))
            if (changes := self.dataset.newest.changes) is not None:
                items = Ragged.from_arrow(table["item_ids"]).values
                table = drop_entries(table, changes.find_lost(items, day_of(part)))
        return Rows(table, lengths)

    def _check_reachable(self) -> None:
        """Raise an `InputError` if the dataset's store does not answer, which is no damage."""
        try:
            storage.exists(f"{self.dataset.path}/{MANIFEST}")
        except OSError as error:
            raise InputError(f"{self.dataset.path} cannot be reached: {error}") from None

    @property
    def columns(self) -> list[str]:
        """Names of the columns to read."""
        if not self.dataset.columns:
            row_groups(self.dataset)  # reads the footers
        unread = {*ANSWERS} if not self.answers else set()
        unread |= set() if self.times else {"timestamps"}
        unread |= set() if self.trained else {"trained"}
        unread |= set() if self.events else {"event_ids"}
        unread |= set() if self.places else {"places"}
        unread |= set() if self.dataset.manifest.hold_out in STORED else {*STARTS}
        return [name for name in COLUMNS if name in self.dataset.columns - unread]

    def _replace_group(self, group: RowGroup, damage: Damage) -> "Rows":
        self._report_damage([damage])
        table = pa.table({name: pa.nulls(group.rows, COLUMNS[name]) for name in self.columns})
        return Rows(empty_rows(table, range(group.rows)), np.full(group.rows, group.items / max(group.rows, 1)))

    def _report_damage(self, damages: list[Damage]) -> None:
        if self.set_aside is not None:
            self.set_aside.add(damages)
            return
        more = f" (and {len(damages) - 1:,} more rows of this row group)" if len(damages) > 1 else ""
        raise InputError(f"{self.dataset.path}: {damages[0]}{more}; {self.dataset.remedy}")


class Rows(NamedTuple):
    """The checked rows of a row group."""

    table: pa.Table
    """user_id, item_ids and the other columns asked for, with the types of `dataset.COLUMNS`; rows that are set aside
    have empty lists."""
    lengths: npt.NDArray[np.float64]
    """[rows] number of entries in the file; the row group's mean where it is unknown."""


def find_faults(table: pa.Table, manifest: Manifest, answers: int) -> dict[int, str]:
    """The first fault of each damaged row of a row group, by the row's index.

    Whole columns are checked at once; costlier checks run only where something is wrong.
    """
    faults: dict[int, str] = {}

    def add_faults(rows: npt.NDArray[np.integer], reason: str, *values: npt.NDArray[Any]) -> None:
        """Add a fault to each of `rows`: `reason`, its placeholders filled from `values` [rows]."""
        for number, row in enumerate(rows.tolist()):
            if row not in faults:
                faults[row] = reason.format(*(value[number] for value in values))

    users = table["user_id"].combine_chunks()
    if users.null_count:
        add_faults(np.flatnonzero(users.is_null()), "the user id is null")
        users = users.fill_null(0)
    users = to_numpy(users)
    bad = find_outside(users, 0, manifest.users)
    add_faults(bad, f"user id {{}} is outside 0 to {manifest.users - 1}", users[bad])

    columns = {}
    for name in [name for name in table.schema.names[1:] if name not in STARTS]:
        columns[name], null_rows, null_values = read_nullable(table[name])
        add_faults(null_rows, f"the list of {name} is null; a user without items has an empty one")
        add_faults(columns[name].rows_of(null_values), f"a value in {name} is null")
    items, segments = columns["item_ids"], columns.get("segment_ids")
    vocabulary = f"is outside the vocabulary (0 to {manifest.items - 1})"
    bad = find_outside(items.values, 0, manifest.items)
    add_faults(items.rows_of(bad), f"item id {{}} {vocabulary}", items.values[bad])

    interacted = entries = np.diff(items.offsets)
    if segments is not None:
        bad = find_outside(segments.values, 0, manifest.segments)
        more = ", 3 (disliked) and 4 (skipped)" if manifest.segments > PLAIN_SEGMENTS else ""
        meanings = f"0 (interacted), 1 (generated){',' if more else ' and'} 2 (shown and not clicked){more}"
        add_faults(segments.rows_of(bad), f"segment id {{}} is none of {meanings}", segments.values[bad])
        interacted = np.diff(np.concatenate([[0], np.cumsum(segments.values == INTERACTED)])[segments.offsets])
    for name, column in columns.items():
        expected, actual = interacted * answers if name in ANSWERS else entries, np.diff(column.offsets)
        bad = np.flatnonzero(actual != expected)
        mismatch = f"the list of {name} has {{}} values, its item_ids require {{}}"
        add_faults(bad, mismatch, actual[bad], expected[bad])

    starts = {name: table[name].combine_chunks() for name in STARTS if name in table.schema.names}
    for name, start in starts.items():
        if start.null_count:  # asked first: what follows imports pandas (see `to_numpy`)
            add_faults(np.flatnonzero(start.is_null()), f"its {name} is null")
            starts[name] = start.fill_null(0)
    if starts:
        validation, test = map(to_numpy, starts.values())
        bad = np.flatnonzero((validation < 0) | (validation > test) | (test > interacted))
        order = "its parts start at {} and {}, which must be in order and within its {} interactions"
        add_faults(bad, order, validation[bad], test[bad], interacted[bad])
    if (times := columns.get("timestamps")) is not None:
        bad = np.flatnonzero(np.diff(times.values) < 0) + 1
        bad = bad[~np.isin(bad, times.offsets)] if bad.size else bad
        if bad.size and starts and manifest.hold_out == "given":
            # Each part has files of its own, so times may decrease where a part begins, but not within one.
            rows, entered = times.rows_of(bad), items if segments is None else segments
            is_interacted = np.ones(items.values.size, bool) if segments is None else segments.values == INTERACTED
            counts, place = offsets_of(is_interacted), entered.offsets[rows] + bad - times.offsets[rows]
            before = counts[np.minimum(place, counts.size - 1)] - counts[entered.offsets[rows]]
            bad = bad[(before != validation[rows]) & (before != test[rows])]
        later = times.values[bad - 1]
        add_faults(times.rows_of(bad), "its times are not in order: {} comes after {}", times.values[bad], later)
    if (events := columns.get("event_ids")) is not None:
        bad = find_outside(events.values, 0, len(manifest.events) + 1)
        types = f"is none of 0 (unknown) to {len(manifest.events)}"
        add_faults(events.rows_of(bad), f"event id {{}} {types}", events.values[bad])
    if (ids := columns.get("answer_ids")) is not None:
        bad = find_outside(ids.values, -1, manifest.items)
        add_faults(ids.rows_of(bad), f"answer id {{}} {vocabulary}", ids.values[bad])
    if (scores := columns.get("answer_scores")) is not None:
        bad = np.flatnonzero(~np.isfinite(scores.values))
        add_faults(scores.rows_of(bad), "answer score {} is not a number", scores.values[bad])
    return faults


def stored_starts(table: pa.Table) -> Starts | None:
    """Where the parts of each row start, if the table has the columns `STARTS`."""
    if STARTS[0] not in table.schema.names:
        return None
    return Starts(*(to_numpy(table[name]).astype(np.int64, copy=False) for name in STARTS))


def find_outside(values: npt.NDArray[Any], low: int, high: int) -> npt.NDArray[np.intp]:
    """Indices of `values` outside `low` to `high` - 1."""
    if not values.size or (values.min() >= low and values.max() < high):
        return np.zeros(0, dtype=np.intp)
    return np.flatnonzero((values < low) | (values >= high))


def empty_rows(table: pa.Table, rows: Iterable[int]) -> pa.Table:
    """The table with user 0 and empty lists in `rows`."""
    intact = np.ones(table.num_rows, dtype=bool)
    intact[np.fromiter(rows, dtype=np.int64)] = False
    mask = pa.array(intact)
    columns = {}
    for name in table.schema.names:
        kind = table.schema.field(name).type
        columns[name] = pc.if_else(mask, table[name], pa.scalar([] if pa.types.is_list(kind) else 0, kind))
    return pa.table(columns)


def drop_entries(table: pa.Table, dropped: npt.NDArray[np.bool_]) -> pa.Table:
    """The table without some entries, nor those that were shown before the first interaction that is left.

    Args:
        table: rows whose lists have a value per entry.
        dropped: [entries] whether to drop each.
    """
    if not dropped.any():
        return table
    kept = ~dropped
    if "segment_ids" in table.schema.names:
        segments = Ragged.from_arrow(table["segment_ids"])
        through = offsets_of(kept & (segments.values == INTERACTED))
        kept &= through[1:] > np.repeat(through[segments.offsets[:-1]], segments.lengths)
    columns = {}
    for field in table.schema:
        columns[field.name] = table[field.name]
        if pa.types.is_list(field.type):
            lists = Ragged.from_arrow(table[field.name]).keep(kept)
            values = pa.array(lists.values, field.type.value_type)
            columns[field.name] = pa.ListArray.from_arrays(pa.array(lists.offsets, pa.int32()), values)
    return pa.table(columns)
