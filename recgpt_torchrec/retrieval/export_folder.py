"""The export folder: vectors of items and users in Parquet, for an ANN index or a serving system, and reading it back.

    manifest.json      counts, dimensions, fingerprints, and per file: rows, bytes, checksum
    items/*.parquet    item_id int64, key string, vector fixed_size_list<float32>[dim]
    users/*.parquet    user_id int64, key string, vector fixed_size_list<float32>[dim]; with several interests
                       vectors fixed_size_list<fixed_size_list<float32>[dim]>[interests] instead

A score is the inner product of a user's vector and an item's. Every item appears once, and every user whose history is
encoded; rows are in no particular order (each process writes its share). Of several interests the first is the ordinary
vector, the next is what the model expects once it has heard the best new item of the one before, and so on:

    vectors = pq.read_table("users")["vectors"].combine_chunks()
    vectors.flatten().flatten().to_numpy().reshape(len(vectors), interests, dim)

The manifest is written last: a folder without one is not an export. Knows nothing of models: vectors come in as numpy
arrays, batch by batch, and only a row group of them is held.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from recgpt_torchrec.data.dataset import Dataset, histories_fingerprint
from recgpt_torchrec.distributed import shared_folder
from recgpt_torchrec.distributed.processes import gather_objects, rank
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.storage import filesystem, folders
from recgpt_torchrec.storage.manifests import FolderManifest, Kind
from recgpt_torchrec.storage.parts import Part, regroup, write_parts

GROUP_BYTES = 2**24
"""Bytes of vectors in a row group."""
GROUPS_PER_PART = 16

VectorBatch: TypeAlias = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]
"""(ids [n] int64, vectors [n, dim] or [n, interests, dim] float32)."""


@dataclass(kw_only=True)
class ExportManifest(FolderManifest):
    """What `manifest.json` holds."""

    KIND = Kind(
        name="export", stage="export", version_field="export_version", version=1, parts=("item_parts", "user_parts")
    )
    export_version: int = KIND.version
    items: int = 0
    users: int = 0
    dim: int = 0
    interests: int = 1
    """Vectors a user has."""
    dataset: str = ""
    """Folder of the dataset."""
    vocabulary: str = ""
    """Fingerprint of the dataset's ids; exports are comparable when these are equal."""
    dataset_fingerprint: str = ""
    """Of the dataset's histories, which may grow while the ids stay."""
    checkpoint: str = ""
    """Folder of the checkpoint."""
    checkpoint_fingerprint: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    """The options of the stage that wrote the export."""
    item_parts: list[Part] = field(default_factory=list)
    user_parts: list[Part] = field(default_factory=list)


class Keys:
    """The raw keys of dense ids, read from a dataset's `items/` or `users/` parts where they are wanted.

    Ids there are dense and in order, so an id's row is the id itself; the last few row groups read are kept.

    Example: `Keys(dataset, "items").of(np.array([3, 1]))` is the Arrow string array of two keys.
    """

    KEPT = 4

    def __init__(self, dataset: Dataset, kind: str) -> None:
        if kind not in ("items", "users"):
            raise ValueError(f"kind is {kind!r}; it must be 'items' or 'users'")
        self.dataset, self.kind = dataset, kind
        self.parts = dataset.manifest.item_parts if kind == "items" else dataset.manifest.user_parts
        self.groups: list[tuple[Part, int]] = []
        rows = [0]
        for part in self.parts:
            with dataset.open_part(part) as file:
                for group in range(file.num_row_groups):
                    self.groups.append((part, group))
                    rows.append(rows[-1] + file.metadata.row_group(group).num_rows)
        self.first = np.array(rows)
        """[row groups + 1] int64: id in the first row of each row group."""
        self._read: dict[int, pa.ChunkedArray] = {}

    def of(self, ids: npt.NDArray[np.int64]) -> pa.Array:
        """[n] string keys of `ids` [n] int64.

        Raises:
            InputError: the dataset has no such id.
        """
        if len(ids) and (ids.min() < 0 or ids.max() >= self.first[-1]):
            raise InputError(
                f"{self.dataset.path} has {self.first[-1]} {self.kind}, there is none with the ids from {ids.min()} to "
                f"{ids.max()}; give the dataset that the checkpoint was trained on"
            )
        group = np.searchsorted(self.first, ids, side="right") - 1
        found, order = [], []
        for index in np.unique(group).tolist():
            (where,) = np.nonzero(group == index)
            found.append(self._group(index).take(pa.array(ids[where] - self.first[index])).cast(pa.string()))
            order.append(where)
        if not found:
            return pa.array([], pa.string())
        keys = pa.chunked_array([chunk for array in found for chunk in array.chunks], pa.string())
        return keys.take(pa.array(np.argsort(np.concatenate(order)))).combine_chunks()

    def _group(self, index: int) -> pa.ChunkedArray:
        if index not in self._read:
            part, group = self.groups[index]
            with self.dataset.open_part(part) as file:
                table = file.read_row_group(group, columns=[f"{self.kind[:-1]}_id", "key"])
            expected = np.arange(self.first[index], self.first[index + 1])
            if not np.array_equal(table.column(0).to_numpy(), expected):
                raise InputError(
                    f"{self.dataset.path}: {part.path}, row group {group}: ids are not the dense ids from "
                    f"{expected[0]} to {expected[-1]} in order; restore the file or run prepare again"
                )
            self._read[index] = table.column(1)
            while len(self._read) > self.KEPT:
                del self._read[next(iter(self._read))]
        return self._read[index]


def write_export(
    path: str,
    dataset: Dataset,
    *,
    items: Iterable[VectorBatch],
    users: Iterable[VectorBatch],
    dim: int,
    interests: int = 1,
    everyone: bool = True,
    checkpoint: str = "",
    checkpoint_fingerprint: str = "",
    settings: dict[str, Any] | None = None,
) -> ExportManifest:
    """Write an export and commit it whole (collective: every process of the group calls it with its share).

    Args:
        path: folder or URI of the export; must not exist or be empty.
        dataset: whose keys go with the ids.
        items: this process's share of the item vectors, [n, dim]; run to the end before `users` begins.
        users: this process's share of the user vectors: [n, dim], or [n, interests, dim] where `interests` > 1.
        dim: length of a vector.
        interests: vectors a user has.
        everyone: whether every user of the dataset must come; False: some may be missing, but not all.
        checkpoint: folder the vectors come from, and its fingerprint, for the manifest.
        checkpoint_fingerprint: as above.
        settings: the stage's options, for the manifest.

    Returns:
        The manifest, on every process.

    Raises:
        InputError: `path` holds something, or a vector is not finite (on every process). Nothing is left behind then.
        ValueError: shapes are not as promised, or the shares together are not every id once.
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
            settings=settings or {},
            item_parts=[part for (of_items, _), _, _ in gathered for part in of_items],
            user_parts=[part for (_, of_users), _, _ in gathered for part in of_users],
        )
        _check_whole([share for _, share, _ in gathered], dataset.manifest.items)
        _check_whole([share for _, _, share in gathered], dataset.manifest.users, everyone)
        if rank() == 0:
            folders.write_manifest(fs, folder, manifest.to_json())
    return manifest


class _Share:
    """What one process writes of items or users."""

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
        self.keys = None  # the share travels to the other processes
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
            # After a bad vector nothing more is written, but the batches are still drawn: making them may be work that
            # all processes do together, and stopping here alone would leave the others waiting.
            if self.not_finite is None and len(ids):
                column: pa.Array = pa.array(np.ascontiguousarray(vectors).reshape(-1))
                for length in reversed(self.shape):
                    column = pa.FixedSizeListArray.from_arrays(column, length)
                yield pa.record_batch([pa.array(ids, pa.int64()), self.keys.of(ids), column], names=names)


def _check_whole(shares: list[_Share], expected: int, everyone: bool = True) -> None:
    """All processes' shares together must be every id once (of some users at least one), with a finite vector."""
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
            raise InputError(f"no {kind[:-1]} has a held-out item: that takes three items; export --history all")
        if rows <= expected:
            return
    if rows != expected or total != expected * (expected - 1) // 2:
        raise ValueError(f"{rows} vectors of {kind} were given; each of the dataset's {expected} {kind} must come once")


@dataclass(kw_only=True)
class Export:
    """An opened export folder.

    Example: `ids, vectors = open_export("runs/demo/export").item_vectors()`.
    """

    path: str
    manifest: ExportManifest

    def item_vectors(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Ids [items] int64 and vectors [items, dim] float32 of the whole catalogue, row i that of item i."""
        vectors = np.empty((self.manifest.items, self.manifest.dim), np.float32)
        ids = np.arange(self.manifest.items)
        for batch in self.items(("item_id", "vector")):
            vectors[batch["item_id"].to_numpy()] = to_numpy(batch["vector"])
        return ids, vectors

    def items(
        self, columns: Iterable[str] = ("item_id", "key", "vector"), rows: int = 65536
    ) -> Iterator[pa.RecordBatch]:
        """Rows of `items/`, at most `rows` at a time."""
        return self._batches(self.manifest.item_parts, list(columns), rows)

    def users(
        self, columns: Iterable[str] | None = None, rows: int = 65536, rank: int = 0, world_size: int = 1
    ) -> Iterator[pa.RecordBatch]:
        """Rows of `users/`, at most `rows` at a time; of several processes, every `world_size`-th row group."""
        names = list(columns) if columns is not None else ["user_id", "key", self.user_column]
        return self._batches(self.manifest.user_parts, names, rows, rank, world_size)

    @property
    def fingerprint(self) -> str:
        """32 hex digits of the whole export, wherever it lies."""
        return hashlib.sha256(self.manifest.to_json().encode()).hexdigest()[:32]

    def item_keys(self) -> pa.Array:
        """[items] string keys of the whole catalogue, row i that of item i."""
        batches = list(self.items(("item_id", "key")))
        order = np.argsort(np.concatenate([batch["item_id"].to_numpy() for batch in batches]))
        return pa.concat_arrays([batch["key"] for batch in batches]).take(pa.array(order))

    @property
    def user_column(self) -> str:
        """`vector`, or `vectors` where a user has several."""
        return "vector" if self.manifest.interests == 1 else "vectors"

    def verify(self) -> None:
        """Read every part and compare its checksum with the manifest's.

        Raises:
            InputError: names the part that is damaged.
        """
        self.manifest.check_parts(self.path, checksums=True)

    def _batches(
        self, parts: list[Part], columns: list[str], rows: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[pa.RecordBatch]:
        fs, root = filesystem(self.path)
        before = 0
        for part in parts:
            try:
                with pq.ParquetFile(fs.open_input_file(f"{root}/{part.path}")) as file:
                    groups = range((rank - before) % world_size, file.num_row_groups, world_size)
                    before += file.num_row_groups
                    if groups:
                        yield from file.iter_batches(batch_size=rows, row_groups=list(groups), columns=columns)
            except (OSError, pa.ArrowException) as error:
                raise InputError(
                    f"{self.path}: the part {part.path} cannot be read as Parquet ({error}); "
                    f"{self.manifest.KIND.repair}"
                ) from None


def to_numpy(vectors: pa.FixedSizeListArray) -> npt.NDArray[np.float32]:
    """A column of vectors as [rows, dim], or [rows, interests, dim], float32."""
    shape = [len(vectors)]
    while pa.types.is_fixed_size_list(vectors.type):
        shape.append(vectors.type.list_size)
        vectors = vectors.flatten()
    return vectors.to_numpy().reshape(shape)


def open_export(path: str) -> Export:
    """Open and check an export: manifest, version, every part there with the promised size.

    Raises:
        InputError: names what is missing or differs, and how to repair it.
    """
    manifest = ExportManifest.read(path)
    manifest.check_parts(path)
    return Export(path=path, manifest=manifest)
