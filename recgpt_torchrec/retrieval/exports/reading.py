"""Reads an export folder, in batches, and checks what it reads against the manifest."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recgpt_torchrec.data.ragged import Float32, Int64
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.retrieval.exports.manifest import ExportManifest
from recgpt_torchrec.storage import filesystem
from recgpt_torchrec.storage.parts import Part, open_parquet
from recgpt_torchrec.storage.typed import COUNT


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
        """Fingerprint of the export's contents, 32 hex digits; moving the folder or an index in it do not change it."""
        values = asdict(self.manifest)
        del values["index"]  # may be added and replaced
        return hashlib.sha256(json.dumps(values, indent=1).encode()).hexdigest()[:32]

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
