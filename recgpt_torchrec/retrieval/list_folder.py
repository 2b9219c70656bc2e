"""The folder of retrieved lists: writes and reads Parquet with one row per user.

    manifest.json      counts, settings, fingerprints, measurements, and per file: rows, items, bytes, checksum
    lists/*.parquet    user_id int64, key string (the user's), item_ids list<int64> best first, item_keys list<string>,
                       scores list<float32>, interests list<int8> (which interest found the item, from 0; -1: popular
                       items of a user without a vector, whose scores are numbers of interactions)

Users are in no particular order. The manifest is written last. Writing holds one row group at a time.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.fs

from recgpt_torchrec.distributed import shared_folder
from recgpt_torchrec.distributed.lockstep import raise_first_error
from recgpt_torchrec.distributed.processes import gather_objects, rank
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.retrieval.exports.item_keys import ItemKeys
from recgpt_torchrec.retrieval.filters import FilterRecord
from recgpt_torchrec.retrieval.merging import Merged
from recgpt_torchrec.storage.manifests import FolderManifest, Kind
from recgpt_torchrec.storage.parts import Part, regroup, write_parts
from recgpt_torchrec.storage.typed import check_counts, make_typed

GROUP_ITEMS = 2**20
"""Items of all lists per row group."""
GROUPS_PER_PART = 16


class ListBatch(NamedTuple):
    """Lists of some users."""

    users: np.ndarray
    """[users] int64."""
    keys: pa.Array
    """[users] string."""
    lists: Merged


@dataclass(kw_only=True)
class ListManifest(FolderManifest):
    """Contents of `manifest.json`."""

    KIND = Kind(name="set of lists", stage="retrieve", version_field="lists_version", version=1, parts=("parts",))
    lists_version: int = KIND.version
    users: int = 0
    k: int = 0
    """Maximum number of items per list."""
    export: str = ""
    """Folder of the export that was searched."""
    export_fingerprint: str = ""
    vocabulary: str = ""
    """Fingerprint of the dataset's ids."""
    dataset_fingerprint: str = ""
    """Fingerprint of the histories that were left out; empty where none were."""
    filters: dict[str, FilterRecord] = field(default_factory=dict)
    """What decided which items may be in a list, by option: allow, deny, items."""
    allowed: int | None = None
    """Number of items that may be in a list; None: no filter was asked for."""
    popular: int = 0
    """Number of users without a vector, whose list holds popular items."""
    empty: int = 0
    """Number of users with an empty list: their history holds every item that may be in it."""
    example: str = ""
    """Key of one of them."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The options of the stage that wrote the lists."""
    measured: dict[str, Any] = field(default_factory=dict)
    """Measurements of the stage: speed, hits, recall."""
    parts: list[Part] = field(default_factory=list)

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Self:
        """Make a manifest of the values of `manifest.json`, and check what it promises.

        Raises:
            ValueError: a field is missing, unknown or invalid.
        """
        manifest = super().from_values(values)
        check_counts({name: getattr(manifest, name) for name in ("users", "k", "popular", "empty")})
        check_counts({} if manifest.allowed is None else {"allowed": manifest.allowed})
        if (rows := sum(part.rows for part in manifest.parts)) != manifest.users:
            raise ValueError(f"it promises {manifest.users:,} users, but {rows:,} rows in lists/")
        measured = make_typed(Measured, manifest.measured, "measured.", others=True)
        if (name := f"recall@{manifest.k}") not in (measured.recall or {name: 0, "users": 0}):
            raise ValueError(f"measured.recall has no {name!r}")
        return manifest


@dataclass
class Tally:
    """Counts the lists of this process."""

    popular: int = 0
    empty: int = 0
    example: str = ""
    """Key of a user with an empty list."""

    def count(self, batch: ListBatch) -> None:
        """Add some lists."""
        is_empty = (batch.lists.items < 0).all(dim=1)
        self.popular += int(((batch.lists.interests < 0) & (batch.lists.items >= 0)).any(dim=1).sum())
        if (number := int(is_empty.sum())) and not self.empty:
            self.example = batch.keys[int(is_empty.int().argmax())].as_py()
        self.empty += number


@dataclass(kw_only=True)
class Measured:
    """What `ListManifest.measured` holds."""

    index_seconds: float
    users_per_second: float
    recall: dict[str, float] | None = None
    """Share of the exact lists that an approximate index found; `recall@K`, and the number of `users` looked at."""
    hits: dict[str, float] | None = None


def write_lists(
    path: str,
    manifest: ListManifest,
    batches: Iterable[ListBatch],
    item_keys: ItemKeys,
    measured: Callable[[], dict[str, Any]],
    finish: Callable[[], object] = lambda: None,
) -> ListManifest:
    """Write lists and commit them whole (collective: each process gives its share of users).

    Args:
        path: folder or URI; must be empty or not exist.
        manifest: everything but `users`, `measured` and `parts`.
        batches: this process's share.
        item_keys: keys by item id.
        measured: called after the last batch; returns what the manifest records as `measured`.
        finish: called after this process's last batch, or after an error; takes part in what the others still do.

    Returns:
        The manifest, on every process.

    Raises:
        InputError: `path` is not empty, or every list is. Nothing is written after an error of any process, which all
            of them raise.
    """
    tally = Tally()

    def rows() -> Iterator[pa.RecordBatch]:
        for batch in batches:
            if batch.users.size:
                tally.count(batch)
                yield record_batch(batch, item_keys)

    with shared_folder.stage_shared_folder(path, ListManifest.KIND.name) as (fs, folder):
        groups = regroup(rows(), max(1, GROUP_ITEMS // manifest.k))
        parts, failure = [], None
        try:
            parts = write_parts(fs, folder, "lists", groups, GROUPS_PER_PART, prefix=f"part-{rank():04d}")
        except Exception as error:
            failure = error  # raised here, it would leave the other processes waiting
        try:
            finish()
        except Exception as error:
            failure = failure or error
        raise_first_error(failure)
        manifest.parts = [part for share in gather_objects(parts) for part in share]
        manifest.users = sum(part.rows for part in manifest.parts)
        tallies = gather_objects(tally)
        manifest.popular, manifest.empty = (
            sum(getattr(each, name) for each in tallies) for name in ("popular", "empty")
        )
        manifest.example = next((each.example for each in tallies if each.empty), "")
        if manifest.empty and manifest.empty == manifest.users:
            raise InputError(
                f"every list would be empty: the history of each of the {manifest.users:,} users, such as "
                f"{manifest.example!r}, holds all items that may be in a list. Allow more items"
            )
        manifest.measured = measured()
        if rank() == 0:
            shared_folder.write_shared_manifest(fs, folder, manifest)
    return manifest


def record_batch(batch: ListBatch, item_keys: ItemKeys) -> pa.RecordBatch:
    """Convert lists to one row per user, without the -1 that fill up short lists."""
    items = batch.lists.items.numpy()
    is_item = items >= 0
    offsets = pa.array(np.concatenate([[0], np.cumsum(is_item.sum(axis=1))]).astype(np.int32))
    ids = items[is_item]
    columns = {
        "user_id": pa.array(batch.users, pa.int64()),
        "key": batch.keys,
        "item_ids": pa.ListArray.from_arrays(offsets, pa.array(ids, pa.int64())),
        "item_keys": pa.ListArray.from_arrays(offsets, item_keys.of(ids)),
        "scores": pa.ListArray.from_arrays(offsets, pa.array(batch.lists.scores.numpy()[is_item], pa.float32())),
        "interests": pa.ListArray.from_arrays(offsets, pa.array(batch.lists.interests.numpy()[is_item], pa.int8())),
    }
    return pa.record_batch(list(columns.values()), names=list(columns))


def open_lists(path: str) -> ListManifest:
    """Open a folder of lists and check its manifest, its version, and the presence and size of every part.

    Raises:
        InputError: names what is missing or differs, and how to repair it.
    """
    manifest = ListManifest.read(path)
    manifest.check_parts(path)
    return manifest
