"""Reads folders of exports and deltas, in batches, and checks what it reads against the manifest."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from recgpt_torchrec.data.ragged import Float32, Int64
from recgpt_torchrec.data.reading.footers import column_bounds
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.retrieval.exports.manifest import LATER, DeltaManifest, ExportManifest
from recgpt_torchrec.retrieval.exports.vectors import vector_columns, vectors_of
from recgpt_torchrec.storage import filesystem, raise_storage_failure
from recgpt_torchrec.storage.parts import Part, open_part, without_footers
from recgpt_torchrec.storage.typed import COUNT

Bool = npt.NDArray[np.bool_]
ROWS = 65536
"""Maximum number of rows per batch."""


@dataclass(kw_only=True)
class _VectorFolder:
    """What an opened export and an opened delta have in common."""

    path: str
    manifest: ExportManifest | DeltaManifest

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the contents, 32 hex digits; moving the folder does not change it, nor an index."""
        values = asdict(self.manifest, dict_factory=without_footers)
        for each in fields(self.manifest):
            if LATER in each.metadata and values[each.name] == each.default:
                del values[each.name]
        for name in ("index", "encoder"):  # of an export: may be added and replaced
            values.pop(name, None)
        return hashlib.sha256(json.dumps(values, indent=1).encode()).hexdigest()[:32]

    def users(self, rows: int = ROWS, rank: int = 0, world_size: int = 1) -> Iterator[pa.RecordBatch]:
        """Yield the rows of `users/`, at most `rows` per batch; a rank reads every `world_size`-th row group."""
        columns = ["user_id", "key", *self.columns_of("users")]
        return self.batches(self.manifest.user_parts, columns, rows, rank, world_size)

    def columns_of(self, kind: str) -> list[str]:
        """Names of the columns that hold the vectors of `items` or `users`."""
        return list(self._vector_columns(kind))

    def batches(
        self,
        parts: list[Part],
        columns: list[str],
        rows: int = ROWS,
        rank: int = 0,
        world_size: int = 1,
        items: tuple[int, int] | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Yield columns of some parts, at most `rows` rows per batch; a rank reads every `world_size`-th row group.

        With `items` (first and end of their ids) row groups without any of these are not read, where statistics tell.

        Raises:
            InputError: a file cannot be read, or is not as the manifest promises.
        """
        groups_before = 0
        for part in parts:
            with self.open_part(part, columns) as file:
                groups = range((rank - groups_before) % world_size, file.num_row_groups, world_size)
                groups_before += file.num_row_groups
                wanted = [group for group in groups if items is None or _may_hold(file.metadata, group, items)]
                if wanted:
                    yield from self.read_groups(part, file, wanted, columns, rows)

    def open_part(self, part: Part, columns: list[str]) -> pq.ParquetFile:
        """Open a part and check its footer against the manifest, before memory is allocated by what it says.

        Raises:
            InputError: it cannot be read, or has other rows or columns.
        """
        fs, root = filesystem(self.path)
        try:
            file = open_part(fs, root, part)
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(part, error) from None
        schema = file.schema_arrow
        groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
        rows = [group.num_rows for group in groups]
        if file.metadata.num_rows != part.rows or sum(rows) != part.rows or min(rows, default=0) < 0:
            raise self.error(part.path, f"has {sum(rows):,} rows, the manifest promises {part.rows:,}")
        kind = "users" if "user_id" in columns else "items"
        expected = {"item_id": pa.int64(), "user_id": pa.int64(), "key": pa.string(), **self._vector_columns(kind)}
        for name in columns:
            if schema.names.count(name) != 1 or not _is_like(schema.field(name).type, expected[name]):
                found = [str(schema.field(place).type) for place in schema.get_all_field_indices(name)]
                raise self.error(part.path, f"has a column {name} of type {found}, it must be {expected[name]}")
        return file

    def read_groups(
        self, part: Part, file: pq.ParquetFile, groups: list[int], columns: list[str], rows: int = ROWS
    ) -> Iterator[pa.RecordBatch]:
        """Yield columns of some row groups of an opened part, at most `rows` rows per batch.

        Raises:
            InputError: the file cannot be read, or a value is null, an impossible id or not finite.
        """
        try:
            for batch in file.iter_batches(batch_size=rows, row_groups=groups, columns=columns):
                self._check_batch(part, batch)
                yield batch
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(part, error) from None

    def error(self, part: str, reason: str) -> InputError:
        """An error about a part of this folder."""
        return InputError(f"{self.path}: the part {part} {reason}; {self.manifest.KIND.repair}")

    def _vector_columns(self, kind: str) -> dict[str, pa.DataType]:
        manifest = self.manifest
        return vector_columns(manifest.dtype, manifest.dim, manifest.interests if kind == "users" else 1)

    def _check_batch(self, part: Part, batch: pa.RecordBatch) -> None:
        """Check the values of some rows."""
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if column.null_count:
                raise self.error(part.path, f"has a null in {name}")
            if name.endswith("_id"):
                ids = column.to_numpy()
                # What a delta removes may have ids from where its items end.
                limit = self.manifest.items if name == "item_id" and isinstance(self, Export) else COUNT
                if ids.size and (ids.min() < 0 or ids.max() >= limit):
                    raise self.error(part.path, f"has a {name} outside 0 to {limit - 1}")
            elif name.startswith("vector") and not np.isfinite(vectors_of(batch)).all():
                raise self.error(part.path, "has a vector that is not finite")

    def _unreadable(self, part: Part, error: Exception) -> InputError:
        raise_storage_failure(error, f"{self.path}/{part.path}")
        return self.error(part.path, f"cannot be read as Parquet ({' '.join(str(error).split())})")


@dataclass(kw_only=True)
class Export(_VectorFolder):
    """An opened export folder.

    Example: `ids, vectors = open_export("runs/demo/export").item_vectors()`.
    """

    manifest: ExportManifest

    @property
    def state(self) -> str:
        """The state of a vector store that holds this export: what the first delta after it has as its base."""
        return self.manifest.state or self.fingerprint

    def items(
        self, columns: Iterable[str] = ("item_id", "key", "vector"), rows: int = ROWS
    ) -> Iterator[pa.RecordBatch]:
        """Yield the rows of `items/`, at most `rows` per batch; with `vector` comes all that `vectors_of` needs."""
        names = [each for name in columns for each in (self.columns_of("items") if name == "vector" else [name])]
        return self.batches(self.manifest.item_parts, names, rows)

    def user_ids(self) -> Iterator[Int64]:
        """Yield the ids [n] int64 of all users, in no particular order; no vector is read."""
        for batch in self.batches(self.manifest.user_parts, ["user_id"], 2**20):
            yield batch["user_id"].to_numpy()

    def item_vectors(
        self, first: int = 0, stop: int | None = None, allowed: Bool | None = None
    ) -> tuple[Int64, Float32]:
        """Ids [n] int64 and vectors [n, dim] float32 of the items `first` to `stop` - 1 (None: to the last), in order.

        Args:
            first: first id.
            stop: end of the ids.
            allowed: [items] bool by id: which of these items; None: all.

        Raises:
            InputError: a file cannot be read, an item is missing, or a vector is not finite.
        """
        stop = self.manifest.items if stop is None else stop
        ids = np.arange(first, stop) if allowed is None else first + np.flatnonzero(allowed[first:stop])
        vectors = np.empty((len(ids), self.manifest.dim), np.float32)
        is_known = np.zeros(len(ids), bool)
        columns = ["item_id", *self.columns_of("items")]
        for batch in self.batches(self.manifest.item_parts, columns, items=(first, stop)):
            found = batch["item_id"].to_numpy()
            wanted = (found >= first) & (found < stop)
            if allowed is not None:
                wanted &= allowed[found]
            if wanted.any():
                places = found[wanted] - first if allowed is None else np.searchsorted(ids, found[wanted])
                vectors[places], is_known[places] = vectors_of(batch)[wanted], True
        if not is_known.all():
            missing = ids[np.argmin(is_known)]
            raise self.error("items/", f"item {missing} is missing, and another one is there twice")
        return ids, vectors


@dataclass(kw_only=True)
class Delta(_VectorFolder):
    """An opened delta folder: what changes between two states of a vector store.

    Example: `for batch in open_delta("runs/demo/delta").items(): table.upsert(batch)`.
    """

    manifest: DeltaManifest

    @property
    def state(self) -> str:
        """The state of a vector store after this delta; the one before is `manifest.base`."""
        return self.fingerprint

    def items(self, rows: int = ROWS) -> Iterator[pa.RecordBatch]:
        """Yield item_id, key and vector of the items that are new or have moved, at most `rows` per batch."""
        return self.batches(self.manifest.item_parts, ["item_id", "key", *self.columns_of("items")], rows)

    def removed_items(self, rows: int = ROWS) -> Iterator[pa.RecordBatch]:
        """Yield item_id and key of the items to remove, at most `rows` per batch."""
        return self.batches(self.manifest.removed_item_parts, ["item_id", "key"], rows)

    def removed_users(self, rows: int = ROWS) -> Iterator[pa.RecordBatch]:
        """Yield user_id and key of the users to remove, at most `rows` per batch."""
        return self.batches(self.manifest.removed_user_parts, ["user_id", "key"], rows)


def _may_hold(meta: pq.FileMetaData, group: int, items: tuple[int, int]) -> bool:
    """Whether a row group may hold one of the items `items[0]` to `items[1]` - 1."""
    bounds = column_bounds(meta, group, "item_id")
    return bounds is None or (bounds[0] < items[1] and bounds[1] >= items[0])


def _is_like(found: pa.DataType, expected: pa.DataType) -> bool:
    """Whether types are equal; the names of fields in lists do not matter."""
    if pa.types.is_fixed_size_list(expected):
        is_list = pa.types.is_fixed_size_list(found) and found.list_size == expected.list_size
        return is_list and _is_like(found.value_type, expected.value_type)
    return found == expected


def open_export(path: str) -> Export:
    """Open an export and check its manifest, its version, and the presence and size of every part.

    Raises:
        InputError: names what is missing or differs, and how to repair it.
    """
    manifest = ExportManifest.read(path)
    manifest.check_parts(path)
    return Export(path=path, manifest=manifest)


def open_on_all_ranks(path: str) -> Export:
    """Open an export on every rank, with the index that rank 0 sees: it may be replaced meanwhile (collective).

    Raises:
        InputError: on every rank, where one cannot open it, see `open_export`.
    """
    # Whoever only reads an export, such as a vector store's script, needs no torch.
    from recgpt_torchrec.distributed.lockstep import raise_first_error
    from recgpt_torchrec.distributed.processes import run_on_first_rank

    export: Export | None = None
    failure = None
    try:
        export = open_export(path)
    except InputError as error:
        failure = error
    raise_first_error(failure)
    assert export is not None
    index = export.manifest.index
    export.manifest.index = run_on_first_rank(lambda: index)
    return export


def open_delta(path: str) -> Delta:
    """Open a delta and check its manifest, its version, and the presence and size of every part.

    Raises:
        InputError: names what is missing or differs, and how to repair it.
    """
    manifest = DeltaManifest.read(path)
    manifest.check_parts(path)
    return Delta(path=path, manifest=manifest)
