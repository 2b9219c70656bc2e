"""One process's share of the vectors of an export or a delta: draws it batch by batch, and writes it in row groups."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs

from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.ragged import Float32, Int64
from recgpt_torchrec.distributed.lockstep import raise_first_error
from recgpt_torchrec.distributed.processes import gather_objects, rank
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.retrieval.exports.keys import Keys
from recgpt_torchrec.retrieval.exports.vectors import encode_vectors, parquet_options, vectors_of
from recgpt_torchrec.storage import find_storage_failure
from recgpt_torchrec.storage.parts import Part, regroup, write_parts

GROUP_BYTES = 2**24
"""Bytes of the vectors of a row group as float32. A share holds some row groups at a time: what is drawn, what it is
encoded to, and what Parquet writes."""
CHANGED_GROUP_BYTES = 2**20
"""The same of deltas, and of exports that were made of them: ids that changed lie far apart, so a row group that holds
many of them is looked into for nearly every batch of ids, and a chain's cache holds few large ones."""
GROUPS_PER_PART = 16

VectorBatch: TypeAlias = tuple[Int64, Float32]
"""(ids [n] int64, vectors [n, dim] or [n, interests, dim] float32)."""
Select: TypeAlias = Callable[[Int64, Float32], npt.NDArray[np.bool_]]
"""Given ids [n] and their vectors as they will be read, says which rows to write [n]."""


class Share:
    """Writes one process's share of the items or users, and counts it.

    Example: `parts = Share(dataset, "items", (dim,), "int8").write(batches, fs, folder, path)`
    """

    def __init__(
        self, dataset: Dataset, kind: str, shape: tuple[int, ...], dtype: str, select: Select | None = None
    ) -> None:
        """
        Args:
            dataset: provides the keys of the ids.
            kind: `items` or `users`.
            shape: of a row's vectors, (dim,) or (interests, dim).
            dtype: of the stored numbers.
            select: says which rows to write; None: all.
        """
        self.kind, self.shape, self.dtype, self.select = kind, shape, dtype, select
        self.dataset = dataset
        self.drawn = self.sum_of_ids = 0

    def write(self, batches: Iterable[VectorBatch], fs: pyarrow.fs.FileSystem, folder: str, path: str) -> list[Part]:
        """Write a share into `folder` on `fs` (collective).

        After an error nothing more is written, but batches are drawn to the end: computing them may be collective, and
        the other processes would wait for ever.

        Args:
            batches: this process's share.
            path: of the output, for messages.

        Returns:
            The parts of all processes, in order of rank.

        Raises:
            InputError: a file cannot be written, or a vector cannot be stored; on every process.
        """
        source = _Source(batches)
        rows = rows_per_group(self.shape, GROUP_BYTES if self.select is None else CHANGED_GROUP_BYTES)
        groups = regroup(self._record_batches(_collect(self._count(source), rows)), rows)
        options = parquet_options(self.dtype, f"{self.kind[:-1]}_id", self.shape[0] if len(self.shape) > 1 else 1)
        return write_groups(groups, fs, folder, path, self.kind, options, source)

    def check_complete(self, expected: int, everyone: bool = True) -> int:
        """Check that the shares of all processes hold every id once, or at least one unless `everyone` (collective).

        Args:
            expected: number of ids.
            everyone: whether every id has to be there.

        Returns:
            The number of rows of all shares.

        Raises:
            InputError: there is none.
            ValueError: an id is missing or repeated.
        """
        rows, total = (sum(counts) for counts in zip(*gather_objects((self.drawn, self.sum_of_ids)), strict=True))
        if not everyone:
            if not rows:
                raise InputError(f"no {self.kind[:-1]} has a held-out item of this split; use --history all")
            if rows <= expected:
                return rows
        if rows != expected or total != expected * (expected - 1) // 2:
            raise ValueError(
                f"{rows} vectors of {self.kind} were given; each of the dataset's {expected} {self.kind} must come once"
            )
        return rows

    def _count(self, batches: Iterable[VectorBatch]) -> Iterator[VectorBatch]:
        """Check and count batches; those without rows are left out."""
        for ids, vectors in batches:
            if vectors.shape != (len(ids), *self.shape) or vectors.dtype != np.float32:
                raise ValueError(
                    f"vectors of {self.kind} must be {[len(ids), *self.shape]} float32, "
                    f"not {list(vectors.shape)} {vectors.dtype}"
                )
            self.drawn += len(ids)
            self.sum_of_ids += int(ids.sum())
            if len(ids):
                yield ids, vectors

    def _record_batches(self, batches: Iterable[VectorBatch]) -> Iterator[pa.RecordBatch]:
        keys = Keys(self.dataset, self.kind)  # an error of reading them is one of writing
        for ids, vectors in batches:
            columns = encode_vectors(vectors, self.dtype, self.kind[:-1], ids)
            batch = pa.record_batch([pa.array(ids, pa.int64()), *columns.values()], ["id", *columns])
            if self.select is not None:
                wanted = self.select(ids, vectors_of(batch))
                ids, batch = ids[wanted], batch.filter(pa.array(wanted))
            if len(ids):
                arrays = [batch["id"], keys.of(ids), *batch.columns[1:]]
                yield pa.record_batch(arrays, [f"{self.kind[:-1]}_id", "key", *columns])


def write_groups(
    groups: Iterable[pa.Table],
    fs: pyarrow.fs.FileSystem,
    folder: str,
    path: str,
    name: str,
    options: Mapping[str, Any],
    source: "_Source | None" = None,
) -> list[Part]:
    """Write this process's row groups into `folder`/`name`; an error of one process is one of all (collective).

    Args:
        groups: one table per row group.
        path: of the output, for messages.
        options: of `ParquetWriter`.
        source: what the groups are made of, drawn to the end after an error; None: nothing that is collective.

    Returns:
        The parts of all processes, in order of rank.
    """
    parts, failure = list[Part](), None
    try:
        parts = write_parts(fs, folder, name, groups, GROUPS_PER_PART, f"part-{rank():04d}", options=options)
    except Exception as error:
        if source is not None and source.failed:
            raise
        failure = find_storage_failure(error, path, "write") or (
            InputError(f"cannot write {path}: {error}") if isinstance(error, OSError) else error
        )
        deque(source or (), maxlen=0)
    raise_first_error(failure)
    return [part for of_rank in gather_objects(parts) for part in of_rank]


def rows_per_group(shape: tuple[int, ...], group_bytes: int = GROUP_BYTES) -> int:
    """Number of rows of a row group, by the shape of a row's vectors."""
    return max(1, group_bytes // (4 * int(np.prod(shape))))


class _Source(Iterator[VectorBatch]):
    """Batches, and whether drawing one has failed."""

    def __init__(self, batches: Iterable[VectorBatch]) -> None:
        self.batches, self.failed = iter(batches), False

    def __next__(self) -> VectorBatch:
        try:
            return next(self.batches)
        except StopIteration:
            raise
        except BaseException:
            self.failed = True
            raise


def _collect(batches: Iterable[VectorBatch], rows: int) -> Iterator[VectorBatch]:
    """Join small batches until they have `rows` rows or more; large ones pass."""
    pending: list[VectorBatch] = []
    for batch in batches:
        pending.append(batch)
        if sum(len(ids) for ids, _ in pending) >= rows:
            yield _join(pending)
            pending = []
    if pending:
        yield _join(pending)


def _join(batches: list[VectorBatch]) -> VectorBatch:
    if len(batches) == 1:
        return batches[0]
    ids, vectors = zip(*batches, strict=True)
    return np.concatenate(ids), np.concatenate(vectors)
