"""Finds rows of an export or a delta by their ids, in bounded memory, by the bounds of the ids of row groups."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from recgpt_torchrec.data.ragged import Float32, Int64
from recgpt_torchrec.data.reading.footers import column_bounds
from recgpt_torchrec.retrieval.exports.reading import Delta, Export
from recgpt_torchrec.retrieval.exports.vectors import vectors_of
from recgpt_torchrec.storage.parts import Part
from recgpt_torchrec.storage.typed import COUNT

KEPT_BYTES = 2**27
"""Bytes of row groups that a chain's lookups keep together, besides the one that is looked into."""


class _Group(NamedTuple):
    """One row group, by ids in order."""

    ids: Int64
    """[rows], ascending."""
    vectors: Float32 | None
    """[rows, ...] of these ids; None: they were not asked for."""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.ids.nbytes + (0 if self.vectors is None else self.vectors.nbytes)


class Cache:
    """Row groups that were read last, of several lookups; the least recently used one goes first."""

    def __init__(self) -> None:
        self._groups: dict[tuple[Lookup, int], _Group] = {}

    def get(self, lookup: "Lookup", number: int) -> _Group:
        """A row group of a lookup, by its number."""
        group = self._groups.pop((lookup, number), None)
        if group is None:
            while self._groups and sum(each.size for each in self._groups.values()) > KEPT_BYTES:
                del self._groups[next(iter(self._groups))]
            group = lookup.read(number)
        self._groups[lookup, number] = group  # the newest is the last
        return group


class Lookup:
    """Rows of some parts of a folder, by id.

    Ids in about the order of the file, as exports write them, need each row group once.

    Example: `for places, vectors in Lookup(export, export.manifest.user_parts, "users", Cache()).find(ids): ...`
    """

    def __init__(
        self, folder: Export | Delta, parts: list[Part], kind: str, cache: Cache, vectors: bool = True
    ) -> None:
        """
        Args:
            folder: that has the parts.
            parts: of `items` or `users`, removed ones or not.
            kind: `items` or `users`.
            cache: keeps row groups, of this lookup and of others.
            vectors: whether rows have vectors that are wanted; False: only whether an id is there.
        """
        self.folder, self.cache, self.vectors = folder, cache, vectors
        self.columns = [f"{kind[:-1]}_id", *(folder.columns_of(kind) if vectors else [])]
        self.groups: list[tuple[Part, int]] = []
        bounds = []
        for part in parts:
            with folder.open_part(part, self.columns) as file:
                for group in range(file.num_row_groups):
                    bounds.append(column_bounds(file.metadata, group, self.columns[0]) or (0, COUNT))
                    self.groups.append((part, group))
        self.low, self.high = np.array(bounds, np.int64).reshape(-1, 2).T
        """[row groups] smallest and largest id of each."""

    def find(self, ids: Int64) -> Iterator[tuple[npt.NDArray[np.intp], Float32 | None]]:
        """Yield the places in `ids` [n] of those that are there, some at a time, with their vectors.

        Raises:
            InputError: a part cannot be read, or is not as the manifest promises.
        """
        order = np.argsort(ids, kind="stable")
        ascending = ids[order]
        starts = np.searchsorted(ascending, self.low)
        stops = np.searchsorted(ascending, self.high, side="right")
        for number in np.flatnonzero(stops > starts).tolist():
            group = self.cache.get(self, number)
            wanted = slice(starts[number], stops[number])
            rows = np.searchsorted(group.ids, ascending[wanted]).clip(max=max(group.ids.size - 1, 0))
            is_there = group.ids[rows] == ascending[wanted] if group.ids.size else np.zeros(rows.size, bool)
            if is_there.any():
                yield order[wanted][is_there], None if group.vectors is None else group.vectors[rows[is_there]]

    def contains(self, ids: Int64) -> npt.NDArray[np.bool_]:
        """Whether each of `ids` [n] is there."""
        is_there = np.zeros(ids.size, bool)
        for places, _ in self.find(ids):
            is_there[places] = True
        return is_there

    def read(self, number: int) -> _Group:
        """Read a row group, by its number in `groups`."""
        part, row_group = self.groups[number]
        with self.folder.open_part(part, self.columns) as file:
            batches = list(self.folder.read_groups(part, file, [row_group], self.columns))
        ids = np.concatenate([batch[self.columns[0]].to_numpy() for batch in batches] or [np.zeros(0, np.int64)])
        vectors = np.concatenate([vectors_of(batch) for batch in batches]) if self.vectors and batches else None
        if (np.diff(ids) < 0).any():
            order = np.argsort(ids, kind="stable")
            ids, vectors = ids[order], None if vectors is None else vectors[order]
        return _Group(ids, vectors)
