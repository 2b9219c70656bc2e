"""Windows: the unit in which a dataset is shuffled, dealt to ranks and resumed.

A *window* is a few Parquet row groups chosen by a permutation of (seed, epoch); the same seed shuffles its rows.
Windows do not depend on the number of ranks. They are dealt to queues (one per loader worker per rank) by their number
of items, read from the Parquet footers, and cut between queues where whole windows would give some queues more than
others. What is left of every queue is the position in the data: a run that resumes with the same number of queues reads
the same batches, with another number it deals what is left anew. Either way every remaining row is read exactly once.
"""

import heapq
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from recgpt_torchrec.data.dataset import ANSWERS, REQUIRED, STARTS, Dataset, Manifest
from recgpt_torchrec.data.reading.footers import column_bounds, read_footers
from recgpt_torchrec.data.split import MEANINGS, STORED
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.storage.typed import check_counts, make_typed


@dataclass(frozen=True)
class RowGroup:
    """One row group of one part of a dataset."""

    part: int
    """Index into `dataset.manifest.sequences`."""
    group: int
    rows: int
    items: int
    """Total length of its `item_ids` lists."""


def row_groups(dataset: Dataset, advance: Callable[[int], None] = lambda _: None) -> list[RowGroup]:
    """All row groups of a dataset's sequences, in order, from the Parquet footers; a lost part is one row group.

    Args:
        dataset: keeps the footers, so that they are read once.
        advance: called with 1 after each part.

    Raises:
        InputError: a part cannot be read, or has other rows or columns than promised, and must not be left out.
    """
    of_part: dict[int, list[RowGroup]] = {}
    columns: dict[int, frozenset[str]] = {}
    for index, footer in list(read_footers(dataset, advance)):
        part = dataset.manifest.sequences[index]
        if isinstance(footer, Exception):
            if dataset.damaged != "skip" or not isinstance(footer, InputError):
                raise footer
            dataset.lose_part(part, "cannot be read as Parquet")
            continue
        columns[index] = footer.columns
        # An empty list counts as a value.
        rows, values = (sum(numbers) for numbers in zip((0, 0), *footer.groups, strict=True))
        low = min((min(group) for group in footer.groups), default=0)
        if footer.rows != part.rows:
            dataset.lose_part(part, f"has {footer.rows} rows, the manifest promises {part.rows}")
        elif footer.fault is not None:
            dataset.lose_part(part, footer.fault)
        elif low < 0 or rows != part.rows or values > part.items + rows:
            promised = f"{part.rows} rows and {part.items}"
            dataset.lose_part(part, f"has {rows} rows and {values} item ids, the manifest promises {promised}")
        else:
            dataset.footers[part.path] = footer
            of_part[index] = [RowGroup(index, group, *sizes) for group, sizes in enumerate(footer.groups)]
    part_columns = [columns[index] for index in of_part]
    dataset.columns = frozenset(set(REQUIRED).union(*part_columns, promised_columns(dataset.manifest)))
    for index in list(of_part):
        if missing := dataset.columns - columns[index]:
            part = dataset.manifest.sequences[index]
            dataset.lose_part(part, f"has no column {', '.join(sorted(missing))}, which the dataset has")
            del of_part[index]
    lost = {i: [RowGroup(i, 0, p.rows, p.items)] for i, p in enumerate(dataset.manifest.sequences) if i not in of_part}
    return [group for _, groups in sorted((of_part | lost).items()) for group in groups]


def promised_columns(manifest: Manifest) -> set[str]:
    """Columns that the sequences must have by the options of the stage that wrote them."""
    always = {*STARTS} if manifest.hold_out in STORED else set()
    always |= {"event_ids"} if manifest.events else set()
    prompts = manifest.settings.get("prompts")
    if not prompts:
        return always | ({"trained"} if manifest.settings.get("vocabulary") else set())
    return always | ({"segment_ids", *ANSWERS} if prompts.get("answers") else {"segment_ids"})


def user_bounds(dataset: Dataset, group: RowGroup) -> tuple[int, int]:
    """Smallest and largest user id of a row group, from the Parquet statistics; of all ids where there are none."""
    with dataset.read_part(dataset.manifest.sequences[group.part]) as file:
        return column_bounds(file.metadata, group.group, "user_id") or (0, 2**63 - 1)


def check_new_targets(dataset: Dataset) -> None:
    """Check that the dataset marks new targets, and has some.

    Raises:
        InputError: it does not mark them, or has none.
    """
    extended = dataset.manifest.preparation.get("extends")
    if extended is None or "trained" not in dataset.columns:
        raise InputError(
            f"--targets new: {dataset.path} does not mark which targets are new; prepare it with --vocabulary "
            "EARLIER_DATASET, or give --targets all"
        )
    if not extended["new_targets"] and dataset.manifest.day is None:  # a day without targets adds its users and items
        raise InputError(
            f"--targets new: the training part of {dataset.path} has no target that {extended['dataset']} did not have "
            f"({MEANINGS[dataset.manifest.hold_out]}); give --targets all, or a longer log"
        )


@dataclass(frozen=True)
class Window:
    """Row groups that are read and shuffled together."""

    index: int
    """Index in the epoch's permutation; with (seed, epoch) it identifies the window."""
    groups: tuple[RowGroup, ...]

    @property
    def items(self) -> int:
        """Number of entries in the window."""
        return sum(group.items for group in self.groups)

    @property
    def rows(self) -> int:
        """Number of users in the window."""
        return sum(group.rows for group in self.groups)


def windows_of(
    groups: list[RowGroup], seed: int, epoch: int, groups_per_window: int, shuffle: bool = True
) -> list[Window]:
    """The windows of one epoch, the same for any number of ranks."""
    order = np.arange(len(groups))
    if shuffle:
        order = np.random.default_rng((seed, epoch, 1)).permutation(len(groups))
    return [
        Window(number, tuple(groups[g] for g in order[start : start + groups_per_window]))
        for number, start in enumerate(range(0, len(groups), groups_per_window))
    ]


PARTS = 2**20
"""Windows are cut between parts of this number, since how many rows they have is known only once they are read."""
TOLERANCE = 0.01
"""Share by which the largest queue may exceed the mean before windows are cut; who reads a part reads all of it."""


class Piece(NamedTuple):
    """A window, or the parts of it that one queue reads."""

    window: int
    """Index of the window."""
    done: int = 0
    """Rows done, counted from the first of the window; 0 where it was not begun."""
    start: int = 0
    stop: int = PARTS
    """Its first part, and the one after its last."""

    def rows(self, size: int) -> tuple[int, int]:
        """The first row that is left, and the one after the last, in a window of `size` rows."""
        return max(self.done, size * self.start // PARTS), size * self.stop // PARTS

    def share_left(self, size: int) -> float:
        """Share of a window of `size` rows that is left to read, from 0 to 1."""
        return max(0.0, self.stop / PARTS - max(self.start / PARTS, self.done / max(size, 1)))

    def cut(self, share: float, size: int) -> tuple["Piece", "Piece"]:
        """Two pieces, of which the second has about `share` of the rows of a window of `size` rows; either may have
        none."""
        first, last = self.rows(size)
        row = last - math.ceil(share * size - 1e-6)
        place = self.start if row <= first else min(-(-row * PARTS // size), self.stop)
        return self._replace(stop=place), self._replace(start=place)


@dataclass(frozen=True)
class Queue:
    """The windows that one loader worker has left to read."""

    windows: tuple[Piece, ...]
    """In reading order; only one that was begun has rows done."""
    batches: int = 0
    """Number of batches made from this queue in the epoch; part of the seed of the negatives."""
    groups: int = 0
    """Number of row groups of the dataset it was dealt from, on which windows depend; 0: unknown."""

    def after(self, cursor: "Cursor") -> "Queue":
        """What is left once the batch with this cursor is trained."""
        left = list(self.windows[cursor.windows_done :])
        if cursor.offset:
            left[0] = left[0]._replace(done=cursor.offset)
        return Queue(tuple(left), cursor.batches, self.groups)


@dataclass(frozen=True)
class Cursor:
    """How far a queue is read once a batch is trained; it travels with the batch."""

    worker: int = 0
    windows_done: int = 0
    """Number of windows done, of the queue as it was when reading began."""
    offset: int = 0
    """Number of rows done of the next window, in shuffled order; 0: none since reading began."""
    batches: int = 0


@dataclass
class Position:
    """A run's position in the data: the epoch, and what is left of the queue of each worker of each rank."""

    epoch: int = 0
    queues: list[Queue] | None = None
    """Rank-major: the queues of rank 0's workers, then rank 1's, ...; None: the epoch has not begun."""

    def state_dict(self) -> dict:
        """The position as plain lists and numbers, for a checkpoint."""
        queues = None
        if self.queues is not None:
            # A whole window is stored as versions that never cut one stored it.
            windows = [[list(w[:2] if w[2:] == (0, PARTS) else w) for w in q.windows] for q in self.queues]
            queues = [{**asdict(q), "windows": w} for q, w in zip(self.queues, windows, strict=True)]
        return {"epoch": self.epoch, "queues": queues}

    @classmethod
    def from_state_dict(cls, state: Any) -> "Position":
        """The inverse of `state_dict`.

        Raises:
            ValueError: it is no position.
        """
        stored = make_typed(_StoredPosition, state, "position.")
        queues = []
        if stored.queues == []:
            raise ValueError("position.queues is empty; an epoch that has begun has at least one queue")
        for queue in stored.queues or []:
            numbers = [number for window in queue.windows for number in window]
            check_counts({f"number {place} of position.queues": number for place, number in enumerate(numbers)})
            check_counts({"batches of a queue": queue.batches, "groups of a queue": queue.groups})
            if any(len(window) not in (2, 4) for window in queue.windows):
                raise ValueError("a window in position.queues is no pair, and no part of a window")
            windows = tuple(Piece(*window) for window in queue.windows)
            if any(not window.start <= window.stop <= PARTS for window in windows):
                raise ValueError("a window in position.queues has parts out of order")
            queues.append(Queue(windows, queue.batches, queue.groups))
        check_counts({"position.epoch": stored.epoch})
        return cls(stored.epoch, None if stored.queues is None else queues)


@dataclass
class _StoredQueue:
    windows: list[list[int]]
    batches: int = 0
    groups: int = 0


@dataclass
class _StoredPosition:
    epoch: int
    queues: list[_StoredQueue] | None


def deal_windows(windows: list[Window], queues: int, position: Position | None = None) -> list[Queue]:
    """Deal an epoch's windows to `queues` queues: longest first, each to the queue with the fewest items so far.

    Then the longest queues give what they have above the mean to the shortest ones, for which windows are cut.
    With a position inside the epoch only what is left is dealt: as it was if the number of queues is the same (the run
    resumes with the same batches), anew otherwise.

    Raises:
        InputError: the position belongs to a dataset with other row groups.
    """
    groups = sum(len(window.groups) for window in windows)
    left = [Piece(window.index) for window in windows]
    batches = 0
    if position is not None and position.queues is not None:
        before = max((queue.groups for queue in position.queues), default=0)
        if before not in (0, groups):
            raise InputError(
                f"the run stopped within an epoch over {before} row groups, now the dataset has {groups}, so "
                "what is left of the epoch is unknown. Restore the dataset, or start a new run with another --output"
            )
        for index, done, *_ in (piece for queue in position.queues for piece in queue.windows):
            if index >= len(windows) or done > windows[index].rows + windows[index].items:  # pieces
                raise InputError(
                    f"the run stopped at row {done} of window {index} of an epoch, and the dataset has no such row. "
                    "Restore the dataset and the run, or start a new run with another --output"
                )
        if len(position.queues) == queues:
            return position.queues
        left = [piece for queue in position.queues for piece in queue.windows]
        batches = max(queue.batches for queue in position.queues)

    def size_of(piece: Piece) -> float:
        return windows[piece.window].items * piece.share_left(windows[piece.window].rows)

    shares: list[tuple[float, int]] = [(0.0, q) for q in range(queues)]
    dealt: list[list[Piece]] = [[] for _ in range(queues)]
    for piece in sorted(left, key=lambda piece: (-size_of(piece), piece)):
        items, queue = heapq.heappop(shares)
        dealt[queue].append(piece)
        heapq.heappush(shares, (items + size_of(piece), queue))
    _level(dealt, windows, size_of)
    return [Queue(tuple(sorted(pieces)), batches, groups) for pieces in dealt]


def _level(dealt: list[list[Piece]], windows: list[Window], size_of: Callable[[Piece], float]) -> None:
    """Move pieces, and parts of them, from the longest queues to the shortest, until the longest is near the mean."""
    sizes = [sum(map(size_of, pieces)) for pieces in dealt]
    mean = sum(sizes) / len(sizes)
    for _ in range(2 * len(dealt)):  # each cut leaves one of two queues at the mean
        longest = max(range(len(dealt)), key=lambda q: (sizes[q], -q))
        shortest = min(range(len(dealt)), key=lambda q: (sizes[q], q))
        excess = min(sizes[longest] - mean, mean - sizes[shortest])
        if sizes[longest] <= (1 + TOLERANCE) * mean or excess <= 0:
            return
        for piece in sorted(dealt[longest], key=lambda piece: (size_of(piece), piece)):
            if excess <= 0:
                break
            window = windows[piece.window]
            kept, given = piece.cut(min(excess / max(window.items, 1), 1.0), window.rows)
            if not size_of(given):
                continue
            dealt[longest].remove(piece)
            dealt[longest] += [kept] if kept.start < kept.stop else []
            dealt[shortest].append(given)
            sizes[longest] -= size_of(given)
            sizes[shortest] += size_of(given)
            excess -= size_of(given)
