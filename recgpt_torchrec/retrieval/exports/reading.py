"""The export folder: writes and reads vectors of items and users in Parquet, for an ANN index or a serving system.

    manifest.json      counts, dimensions, fingerprints, and per file: rows, bytes, checksum
    items/*.parquet    item_id int64, key string, vector fixed_size_list<float32>[dim]
    users/*.parquet    user_id int64, key string, vector fixed_size_list<float32>[dim]; with several interests
                       vectors fixed_size_list<fixed_size_list<float32>[dim]>[interests] instead

A score is the inner product of a user vector and an item vector. Every item appears once, and every user with an
encoded history; rows are in no particular order (each process writes its share). Of several interests the first is that
of one-step recall; each further one is the output after the best new item of the one before joins the history:

    vectors = pq.read_table("users")["vectors"].combine_chunks()
    vectors.flatten().flatten().to_numpy().reshape(len(vectors), interests, dim)

The manifest is written last: a folder without one is not an export. Knows nothing of models: vectors come as numpy
arrays, batch by batch, and one row group is held at a time.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from recgpt_torchrec.config.retrieval import INTERESTS
from recgpt_torchrec.data.dataset import Dataset, histories_fingerprint
from recgpt_torchrec.data.ragged import Float32, Int64
from recgpt_torchrec.data.split import EVALUATION
from recgpt_torchrec.distributed import shared_folder
from recgpt_torchrec.distributed.processes import gather_objects, rank
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.retrieval.keys import Keys
from recgpt_torchrec.storage import filesystem, folders
from recgpt_torchrec.storage.manifests import FolderManifest, Kind
from recgpt_torchrec.storage.parts import VALUES_PER_BYTE, Part, open_parquet, regroup, write_parts
from recgpt_torchrec.storage.typed import COUNT, SHOWN, check_counts

GROUP_BYTES = 2**24
"""Bytes of vectors per row group."""
GROUPS_PER_PART = 16
MAX_DIM = 2**16
"""Maximum length of a vector."""
HISTORIES = ("all", *EVALUATION)
"""Values of `--history`."""

VectorBatch: TypeAlias = tuple[Int64, Float32]
"""(ids [n] int64, vectors [n, dim] or [n, interests, dim] float32)."""


@dataclass(kw_only=True)
class ExportManifest(FolderManifest):
    """Contents of `manifest.json`."""

    KIND = Kind(
        name="export", stage="export", version_field="export_version", version=1, parts=("item_parts", "user_parts")
    )
    export_version: int = KIND.version
    items: int = 0
    users: int = 0
    dim: int = 0
    interests: int = 1
    """Number of vectors per user."""
    dataset: str = ""
    """Folder of the dataset."""
    vocabulary: str = ""
    """Fingerprint of the dataset's ids; exports are comparable when these are equal."""
    dataset_fingerprint: str = ""
    """Fingerprint of the dataset's histories, which may grow while its ids stay."""
    checkpoint: str = ""
    """Folder of the checkpoint."""
    checkpoint_fingerprint: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    """The options of the stage that wrote the export."""
    item_parts: list[Part] = field(default_factory=list)
    user_parts: list[Part] = field(default_factory=list)

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Self:
        """Make a manifest of the values of `manifest.json`, and check what it promises.

        Raises:
            ValueError: a field is missing, unknown or invalid.
        """
        manifest = super().from_values(values)
        check_counts({name: getattr(manifest, name) for name in ("items", "users", "dim", "interests")})
        for name, parts in (("items", manifest.item_parts), ("users", manifest.user_parts)):
            count, rows = getattr(manifest, name), sum(part.rows for part in parts)
            if not count or count != rows:
                raise ValueError(f"it promises {count:,} {name}, but {rows:,} rows in {name}/")
        if not (0 < manifest.dim <= MAX_DIM and 0 < manifest.interests <= INTERESTS):
            raise ValueError(f"it promises {manifest.interests:,} vectors of {manifest.dim:,} numbers per user")
        if manifest.items * manifest.dim > VALUES_PER_BYTE * sum(part.bytes for part in manifest.item_parts):
            raise ValueError(f"it promises {manifest.items:,} vectors of {manifest.dim:,} numbers in too few bytes")
        if (history := manifest.settings.get("history", "all")) not in HISTORIES:
            raise ValueError(f"settings.history is {str(history)[:SHOWN]!r}, it must be one of {', '.join(HISTORIES)}")
        return manifest


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


@dataclass(kw_only=True)
class Export:
    """An opened export folder.

    Example: `ids, vectors = open_export("runs/demo/export").item_vectors()`.
    """

    path: str
    manifest: ExportManifest

    def item_vectors(self, first: int = 0, stop: int | None = None) -> tuple[Int64, Float32]:
        """Ids [n] int64 and vectors [n, dim] float32 of the items `first` to `stop` - 1 (None: to the last), in order.

        Raises:
            InputError: a file cannot be read, an item is missing, or a vector is not finite.
        """
        stop = self.manifest.items if stop is None else stop
        vectors = np.empty((stop - first, self.manifest.dim), np.float32)
        is_known = np.zeros(stop - first, bool)
        for batch in self.items(("item_id", "vector")):
            ids = batch["item_id"].to_numpy()
            wanted = (ids >= first) & (ids < stop)
            if wanted.any():
                places = ids[wanted] - first
                vectors[places], is_known[places] = to_numpy(batch["vector"])[wanted], True
        if not is_known.all():
            missing = first + int(np.argmin(is_known))
            raise self._error("items/", f"item {missing} is missing, and another one is there twice")
        return np.arange(first, stop), vectors

    def items(
        self, columns: Iterable[str] = ("item_id", "key", "vector"), rows: int = 65536
    ) -> Iterator[pa.RecordBatch]:
        """Yield the rows of `items/`, at most `rows` per batch."""
        return self._batches(self.manifest.item_parts, list(columns), rows)

    def users(self, rows: int = 65536, rank: int = 0, world_size: int = 1) -> Iterator[pa.RecordBatch]:
        """Yield the rows of `users/`, at most `rows` per batch; a rank reads every `world_size`-th row group."""
        columns = ["user_id", "key", self.user_column]
        return self._batches(self.manifest.user_parts, columns, rows, rank, world_size)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the export's contents, 32 hex digits; moving the folder does not change it."""
        return hashlib.sha256(self.manifest.to_json().encode()).hexdigest()[:32]

    def item_keys(self) -> pa.Array:
        """[items] string keys of all items; row i is item i."""
        batches = list(self.items(("item_id", "key")))
        order = np.argsort(np.concatenate([batch["item_id"].to_numpy() for batch in batches]))
        return pa.concat_arrays([batch["key"] for batch in batches]).take(pa.array(order))

    @property
    def user_column(self) -> str:
        """Name of the column of user vectors: `vector`, or `vectors` with several interests."""
        return "vector" if self.manifest.interests == 1 else "vectors"

    def _batches(
        self, parts: list[Part], columns: list[str], rows: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[pa.RecordBatch]:
        fs, root = filesystem(self.path)
        groups_before = 0
        for part in parts:
            try:
                with open_parquet(fs, f"{root}/{part.path}") as file:
                    self._check_part(part, file, columns)
                    groups = range((rank - groups_before) % world_size, file.num_row_groups, world_size)
                    groups_before += file.num_row_groups
                    if groups:
                        for batch in file.iter_batches(batch_size=rows, row_groups=list(groups), columns=columns):
                            self._check_batch(part, batch)
                            yield batch
            except (OSError, pa.ArrowException) as error:
                raise self._error(part.path, f"cannot be read as Parquet ({' '.join(str(error).split())})") from None

    def _check_part(self, part: Part, file: pq.ParquetFile, columns: list[str]) -> None:
        """Check a part's footer against the manifest, before memory is allocated by what it says."""
        manifest, schema = self.manifest, file.schema_arrow
        groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
        rows = [group.num_rows for group in groups]
        if file.metadata.num_rows != part.rows or sum(rows) != part.rows or min(rows, default=0) < 0:
            raise self._error(part.path, f"has {sum(rows):,} rows, the manifest promises {part.rows:,}")
        vector = pa.list_(pa.float32(), manifest.dim)
        expected = {
            "item_id": pa.int64(),
            "user_id": pa.int64(),
            "key": pa.string(),
            "vector": vector,
            "vectors": pa.list_(vector, manifest.interests),
        }
        for name in columns:
            if schema.names.count(name) != 1 or not _is_like(schema.field(name).type, expected[name]):
                found = [str(schema.field(place).type) for place in schema.get_all_field_indices(name)]
                raise self._error(part.path, f"has a column {name} of type {found}, it must be {expected[name]}")

    def _check_batch(self, part: Part, batch: pa.RecordBatch) -> None:
        """Check the values of some rows."""
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if column.null_count:
                raise self._error(part.path, f"has a null in {name}")
            if name.endswith("_id"):
                ids = column.to_numpy()
                limit = self.manifest.items if name == "item_id" else COUNT
                if ids.size and (ids.min() < 0 or ids.max() >= limit):
                    raise self._error(part.path, f"has a {name} outside 0 to {limit - 1}")
            elif name.startswith("vector") and not np.isfinite(to_numpy(column)).all():
                raise self._error(part.path, "has a vector that is not finite")

    def _error(self, part: str, reason: str) -> InputError:
        return InputError(f"{self.path}: the part {part} {reason}; {self.manifest.KIND.repair}")


def _is_like(found: pa.DataType, expected: pa.DataType) -> bool:
    """Whether types are equal; the names of fields in lists do not matter."""
    if pa.types.is_fixed_size_list(expected):
        is_list = pa.types.is_fixed_size_list(found) and found.list_size == expected.list_size
        return is_list and _is_like(found.value_type, expected.value_type)
    return found == expected


def to_numpy(vectors: pa.FixedSizeListArray) -> Float32:
    """Convert a column of vectors to [rows, dim] or [rows, interests, dim] float32."""
    shape = [len(vectors)]
    while pa.types.is_fixed_size_list(vectors.type):
        shape.append(vectors.type.list_size)
        vectors = vectors.flatten()
    return vectors.to_numpy().reshape(shape)


def open_export(path: str) -> Export:
    """Open an export and check its manifest, its version, and the presence and size of every part.

    Raises:
        InputError: names what is missing or differs, and how to repair it.
    """
    manifest = ExportManifest.read(path)
    manifest.check_parts(path)
    return Export(path=path, manifest=manifest)
