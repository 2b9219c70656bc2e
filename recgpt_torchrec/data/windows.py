"""Windows: the unit in which a dataset is shuffled, dealt to ranks, and remembered.

A *window* is a few Parquet row groups chosen by a permutation of (seed, epoch); its rows are shuffled inside by the
same seed. Windows do not depend on the number of ranks. They are dealt to queues (one for each loader worker of each
rank) by their number of items, read from the Parquet footers. What is left of every queue is the position in the data:
a run that goes on with the same number of queues reads the very same batches, with another number it deals what is
left anew, and either way every remaining row is read exactly once.
"""

import heapq
from dataclasses import asdict, dataclass

import numpy as np

from recgpt_torchrec.data.dataset import ANSWERS, COLUMNS, REQUIRED, Dataset, Manifest, column_fault
from recgpt_torchrec.errors import InputError


@dataclass(frozen=True)
class RowGroup:
    """One row group of one part of a dataset."""

    part: int
    """Index into `dataset.manifest.sequences`."""
    group: int
    rows: int
    items: int
    """Length of all its `item_ids` lists together."""


def row_groups(dataset: Dataset) -> list[RowGroup]:
    """All row groups of a dataset's sequences, in order, from the Parquet footers; a lost part counts as one.

    Raises:
        InputError: a part is not readable, or holds other rows or columns than it should (unless it may be lost).
    """
    of_part: dict[int, list[RowGroup]] = {}
    columns: dict[int, set[str]] = {}
    for index, part in enumerate(dataset.manifest.sequences):
        if part.path in dataset.lost_parts:
            continue
        try:
            with dataset.open_part(part) as file:
                meta, schema = file.metadata, file.schema_arrow
        except InputError:
            if dataset.damaged != "skip":
                raise
            dataset.pass_over(part, "cannot be read as Parquet")
            continue
        columns[index] = {name for name in COLUMNS if name in schema.names}
        wrong = (reason for name in (*REQUIRED, *columns[index]) if (reason := column_fault(schema, name)))
        if meta.num_rows != part.rows:
            dataset.pass_over(part, f"has {meta.num_rows} rows, the manifest promises {part.rows}")
        elif reason := next(wrong, None):
            dataset.pass_over(part, reason)
        else:
            names = [meta.schema.column(c).path.split(".")[0] for c in range(meta.num_columns)]
            infos = (meta.row_group(group) for group in range(meta.num_row_groups))
            of_part[index] = [
                RowGroup(index, group, info.num_rows, info.column(names.index("item_ids")).num_values)
                for group, info in enumerate(infos)
            ]
    there = [columns[index] for index in of_part]
    dataset.columns = frozenset(set(REQUIRED).union(*there, promised_columns(dataset.manifest)))
    for index in list(of_part):
        if missing := dataset.columns - columns[index]:
            part = dataset.manifest.sequences[index]
            dataset.pass_over(part, f"has no column {', '.join(sorted(missing))}, which the dataset has")
            del of_part[index]
    lost = {i: [RowGroup(i, 0, p.rows, p.items)] for i, p in enumerate(dataset.manifest.sequences) if i not in of_part}
    return [group for _, groups in sorted((of_part | lost).items()) for group in groups]


def promised_columns(manifest: Manifest) -> set[str]:
    """Columns that the sequences have by the options of the stage that wrote them."""
    prompts = manifest.settings.get("prompts")
    if not prompts:
        return {"trained"} if manifest.settings.get("vocabulary") else set()
    return {"segment_ids", *ANSWERS} if prompts.get("answers") else {"segment_ids"}


@dataclass(frozen=True)
class Window:
    """Row groups that are read and shuffled together."""

    index: int
    """Number in the epoch's permutation; with (seed, epoch) it names the window."""
    groups: tuple[RowGroup, ...]

    @property
    def items(self) -> int:
        """Number of interactions in the window."""
        return sum(group.items for group in self.groups)

    @property
    def rows(self) -> int:
        """Number of users in the window."""
        return sum(group.rows for group in self.groups)


def windows_of(
    groups: list[RowGroup], seed: int, epoch: int, groups_per_window: int, shuffle: bool = True
) -> list[Window]:
    """The windows of one epoch: the same for every number of ranks."""
    order = np.arange(len(groups))
    if shuffle:
        order = np.random.default_rng((seed, epoch, 1)).permutation(len(groups))
    return [
        Window(number, tuple(groups[g] for g in order[start : start + groups_per_window]))
        for number, start in enumerate(range(0, len(groups), groups_per_window))
    ]


@dataclass(frozen=True)
class Queue:
    """What one loader worker has still to read."""

    windows: tuple[tuple[int, int], ...]
    """(window, rows already done), in reading order; only a window that was begun has rows done."""
    batches: int = 0
    """Batches already made from this queue in the epoch; part of the seed of the negatives."""
    groups: int = 0
    """Row groups of the dataset that it was dealt from, which windows depend on; 0: not known."""

    def after(self, cursor: "Cursor") -> "Queue":
        """What is left once the batch that `cursor` came with is done."""
        left = list(self.windows[cursor.windows_done :])
        if cursor.offset:
            left[0] = (left[0][0], cursor.offset)
        return Queue(tuple(left), cursor.batches, self.groups)


@dataclass(frozen=True)
class Cursor:
    """How far its queue is read once a batch is trained; travels with the batch."""

    worker: int = 0
    windows_done: int = 0
    """Windows of the queue, as it was when the reading began, that are done."""
    offset: int = 0
    """Rows of the next window, in its shuffled order, that are done; 0 where it was not begun since."""
    batches: int = 0


@dataclass
class Position:
    """Where a run stands in the data: the epoch, and what is left in the queue of each worker of each rank."""

    epoch: int = 0
    queues: list[Queue] | None = None
    """Rank-major: the queues of rank 0's workers, then rank 1's, ...; None: the epoch has not begun."""

    def state_dict(self) -> dict:
        """As plain lists and numbers, for a checkpoint."""
        queues = None
        if self.queues is not None:
            queues = [{**asdict(q), "windows": [list(w) for w in q.windows]} for q in self.queues]
        return {"epoch": self.epoch, "queues": queues}

    @classmethod
    def from_state_dict(cls, state: dict) -> "Position":
        """The inverse of `state_dict`."""
        queues = state["queues"]
        if queues is not None:
            queues = [Queue(**{**q, "windows": tuple((w, done) for w, done in q["windows"])}) for q in queues]
        return cls(state["epoch"], queues)


def deal_windows(windows: list[Window], queues: int, position: Position | None = None) -> list[Queue]:
    """Deal an epoch's windows to `queues` queues: longest first, each to the queue with the fewest items so far.

    With a position inside the epoch only what is left is dealt: just as it was when the number of queues is the same
    (the run goes on with the same batches), anew otherwise.

    Raises:
        InputError: the position is one in a dataset of other row groups.
    """
    groups = sum(len(window.groups) for window in windows)
    left = [(window.index, 0) for window in windows]
    batches = 0
    if position is not None and position.queues is not None:
        before = max((queue.groups for queue in position.queues), default=0)
        if before not in (0, groups):
            raise InputError(
                f"the run stopped within an epoch over {before} row groups, now the dataset has {groups}: what is left "
                "of the epoch cannot be told. Give the dataset as it was, or begin anew with another --output"
            )
        if len(position.queues) == queues:
            return position.queues
        left = [entry for queue in position.queues for entry in queue.windows]
        batches = max(queue.batches for queue in position.queues)
    size = {w: windows[w].items * (1 - done / windows[w].rows) for w, done in left}
    shares: list[tuple[float, int]] = [(0.0, q) for q in range(queues)]
    dealt: list[list[tuple[int, int]]] = [[] for _ in range(queues)]
    for entry in sorted(left, key=lambda e: (-size[e[0]], e[0])):
        items, queue = heapq.heappop(shares)
        dealt[queue].append(entry)
        heapq.heappush(shares, (items + size[entry[0]], queue))
    return [Queue(tuple(sorted(entries)), batches, groups) for entries in dealt]
