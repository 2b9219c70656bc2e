"""Writes an export folder: each process its share of the vectors, in row groups; rank 0 the manifest, last."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.fs

from recgpt_torchrec.data.dataset import Dataset, histories_fingerprint
from recgpt_torchrec.data.ragged import Float32, Int64
from recgpt_torchrec.distributed import shared_folder
from recgpt_torchrec.distributed.processes import gather_objects, rank
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.retrieval.exports.keys import Keys
from recgpt_torchrec.retrieval.exports.manifest import ExportManifest
from recgpt_torchrec.storage import folders
from recgpt_torchrec.storage.parts import Part, regroup, write_parts

GROUP_BYTES = 2**24
"""Bytes of vectors per row group."""
GROUPS_PER_PART = 16

VectorBatch: TypeAlias = tuple[Int64, Float32]
"""(ids [n] int64, vectors [n, dim] or [n, interests, dim] float32)."""


def write_export(
    path: str,
    dataset: Dataset,
    *,
    items: Iterable[VectorBatch],
    users: Iterable[VectorBatch],
    dim: int,
    interests: int,
    everyone: bool,
    checkpoint: str,
    checkpoint_fingerprint: str,
    settings: dict[str, Any],
) -> ExportManifest:
    """Write an export and commit it whole (collective: each process gives its share).

    Args:
        path: folder or URI of the export; must be empty or not exist.
        dataset: provides the keys of the ids.
        items: this process's share of the item vectors, [n, dim]; read to the end before `users` begins.
        users: this process's share of the user vectors: [n, dim], or [n, interests, dim] where `interests` > 1.
        dim: length of a vector.
        interests: number of vectors per user.
        everyone: whether every user of the dataset must have vectors; False: at least one.
        checkpoint: folder the vectors come from, for the manifest.
        checkpoint_fingerprint: its fingerprint, for the manifest.
        settings: the stage's options, for the manifest.

    Returns:
        The manifest, on every process.

    Raises:
        InputError: `path` is not empty, or a vector is not finite (on every process). Nothing is written then.
        ValueError: wrong shapes, or an id is missing or repeated.
    """
    with shared_folder.stage_shared_folder(path, ExportManifest.KIND.name) as (fs, folder):
        item_share = _Share("items", Keys(dataset, "items"), (dim,))
        user_share = _Share("users", Keys(dataset, "users"), (dim,) if interests == 1 else (interests, dim))
        parts = [share.write(batches, fs, folder) for share, batches in ((item_share, items), (user_share, users))]
        gathered = gather_objects((parts, item_share, user_share))
        manifest = ExportManifest(
            items=dataset.manifest.items,
            users=sum(share.rows for _, _, share in gathered),
            dim=dim,
            interests=interests,
            dataset=dataset.path,
            vocabulary=dataset.manifest.vocabulary,
            dataset_fingerprint=histories_fingerprint(dataset),
            checkpoint=checkpoint,
            checkpoint_fingerprint=checkpoint_fingerprint,
            settings=settings,
            item_parts=[part for (of_items, _), _, _ in gathered for part in of_items],
            user_parts=[part for (_, of_users), _, _ in gathered for part in of_users],
        )
        _check_complete([share for _, share, _ in gathered], dataset.manifest.items)
        _check_complete([share for _, _, share in gathered], dataset.manifest.users, everyone)
        if rank() == 0:
            folders.write_manifest(fs, folder, manifest.to_json())
    return manifest


class _Share:
    """Writes one process's share of the items or users, and counts it."""

    def __init__(self, kind: str, keys: Keys, shape: tuple[int, ...]) -> None:
        self.kind, self.shape = kind, shape
        self.keys: Keys | None = keys
        self.rows = self.sum_of_ids = 0
        self.not_finite: int | None = None
        """The first id whose vector has a NaN or infinity."""

    def write(self, batches: Iterable[VectorBatch], fs: pyarrow.fs.FileSystem, folder: str) -> list[Part]:
        rows_per_group = max(1, GROUP_BYTES // (4 * int(np.prod(self.shape))))
        groups = regroup(self._record_batches(batches), rows_per_group)
        parts = write_parts(fs, folder, self.kind, groups, GROUPS_PER_PART, prefix=f"part-{rank():04d}")
        self.keys = None  # the share is sent to the other processes
        return parts

    def _record_batches(self, batches: Iterable[VectorBatch]) -> Iterator[pa.RecordBatch]:
        assert self.keys is not None
        names = [f"{self.kind[:-1]}_id", "key", "vector" if len(self.shape) == 1 else "vectors"]
        for ids, vectors in batches:
            if vectors.shape != (len(ids), *self.shape) or vectors.dtype != np.float32:
                raise ValueError(
                    f"vectors of {self.kind} must be {[len(ids), *self.shape]} float32, "
                    f"not {list(vectors.shape)} {vectors.dtype}"
                )
            finite = np.isfinite(vectors).all(axis=tuple(range(1, vectors.ndim)))
            if not finite.all() and self.not_finite is None:
                self.not_finite = int(ids[~finite][0])
            self.rows += len(ids)
            self.sum_of_ids += int(ids.sum())
            # After a bad vector nothing more is written, but batches are still drawn: computing them may be collective,
            # and the other processes would wait for ever.
            if self.not_finite is None and len(ids):
                column: pa.Array = pa.array(np.ascontiguousarray(vectors).reshape(-1))
                for length in reversed(self.shape):
                    column = pa.FixedSizeListArray.from_arrays(column, length)
                yield pa.record_batch([pa.array(ids, pa.int64()), self.keys.of(ids), column], names=names)


def _check_complete(shares: list[_Share], expected: int, everyone: bool = True) -> None:
    """Check that all shares together hold every id once (unless `everyone`: at least one), with finite vectors."""
    kind = shares[0].kind
    for share in shares:
        if share.not_finite is not None:
            raise InputError(
                f"the vector of {kind[:-1]} {share.not_finite} is not finite: the checkpoint has diverged; "
                "export an earlier one, or train again with a smaller learning rate"
            )
    rows, total = sum(share.rows for share in shares), sum(share.sum_of_ids for share in shares)
    if not everyone:
        if not rows:
            raise InputError(f"no {kind[:-1]} has a held-out item of this split; use --history all")
        if rows <= expected:
            return
    if rows != expected or total != expected * (expected - 1) // 2:
        raise ValueError(f"{rows} vectors of {kind} were given; each of the dataset's {expected} {kind} must come once")
