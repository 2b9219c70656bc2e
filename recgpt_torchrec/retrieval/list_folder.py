"""The folder of retrieved lists: one row a user in Parquet, committed whole, and reading it back.

    manifest.json      counts, settings, fingerprints, what was measured, and per file: rows, items, bytes, checksum
    lists/*.parquet    user_id int64, key string (the user's), item_ids list<int64> best first, item_keys list<string>,
                       scores list<float32>, interests list<int8> (which interest found the item, from 0)

Users are in no particular order. The manifest is written last. Only a row group of lists is held while writing.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from recgpt_torchrec.distributed import shared_folder
from recgpt_torchrec.distributed.processes import gather, rank, together
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.retrieval.merging import Merged
from recgpt_torchrec.storage import filesystem, folders
from recgpt_torchrec.storage.folders import MANIFEST
from recgpt_torchrec.storage.parts import Part, regroup, write_parts

LISTS_VERSION = 1
GROUP_ITEMS = 2**20
"""Items of all lists in a row group."""
GROUPS_PER_PART = 16


class ListBatch(NamedTuple):
    """Lists of some users."""

    users: np.ndarray
    """[users] int64."""
    keys: pa.Array
    """[users] string."""
    lists: Merged


@dataclass(kw_only=True)
class ListManifest:
    """What `manifest.json` holds."""

    lists_version: int = LISTS_VERSION
    users: int = 0
    k: int = 0
    """Items of each list."""
    export: str = ""
    """Folder of the export the lists were made from."""
    export_fingerprint: str = ""
    vocabulary: str = ""
    """Fingerprint of the ids."""
    dataset_fingerprint: str = ""
    """Of the histories that were left out; empty where none were."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The options of the stage that wrote the lists."""
    measured: dict[str, Any] = field(default_factory=dict)
    """What the stage found on the way: speed, hits, recall."""
    parts: list[Part] = field(default_factory=list)

    def to_json(self) -> str:
        """As text."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "ListManifest":
        """The inverse of `to_json`."""
        values = json.loads(text)
        values["parts"] = [Part(**part) for part in values["parts"]]
        return cls(**values)


def check_free(path: str) -> None:
    """Raise `InputError` unless lists can be written to `path`."""
    folders.check_free(path, "finished set of lists")


def write_lists(
    path: str,
    manifest: ListManifest,
    batches: Iterable[ListBatch],
    item_keys: pa.Array,
    measured: Callable[[], dict[str, Any]],
) -> ListManifest:
    """Write lists and commit them whole (collective: every process of the group calls it with its share of users).

    Args:
        path: folder or URI; must not exist or be empty.
        manifest: everything but `users`, `measured` and `parts`.
        batches: this process's share.
        item_keys: [items] string keys by item id.
        measured: called when all batches are drawn; goes into the manifest.

    Returns:
        The manifest, on every process.

    Raises:
        InputError: `path` holds something. Nothing is left behind after an error.
    """
    together(lambda: check_free(path))
    with shared_folder.staged(path) as (fs, folder):
        groups = regroup(
            (record_batch(batch, item_keys) for batch in batches if batch.users.size),
            max(1, GROUP_ITEMS // manifest.k),
        )
        parts = write_parts(fs, folder, "lists", groups, GROUPS_PER_PART, prefix=f"part-{rank():04d}")
        manifest.parts = [part for share in gather(parts) for part in share]
        manifest.users = sum(part.rows for part in manifest.parts)
        manifest.measured = measured()
        if rank() == 0:
            folders.write_manifest(fs, folder, manifest.to_json())
    return manifest


def record_batch(batch: ListBatch, item_keys: pa.Array) -> pa.RecordBatch:
    """Lists as a row a user; the -1 that fill up short lists are dropped."""
    items = batch.lists.items.numpy()
    there = items >= 0
    offsets = pa.array(np.concatenate([[0], np.cumsum(there.sum(axis=1))]).astype(np.int32))
    ids = pa.array(items[there], pa.int64())
    columns = {
        "user_id": pa.array(batch.users, pa.int64()),
        "key": batch.keys,
        "item_ids": pa.ListArray.from_arrays(offsets, ids),
        "item_keys": pa.ListArray.from_arrays(offsets, item_keys.take(ids)),
        "scores": pa.ListArray.from_arrays(offsets, pa.array(batch.lists.scores.numpy()[there], pa.float32())),
        "interests": pa.ListArray.from_arrays(offsets, pa.array(batch.lists.interests.numpy()[there], pa.int8())),
    }
    return pa.record_batch(list(columns.values()), names=list(columns))


@dataclass(kw_only=True)
class RetrievedLists:
    """An opened folder of lists.

    Example: `pa.Table.from_batches(open_lists("lists/mine").rows())`
    """

    path: str
    manifest: ListManifest

    def rows(self, columns: list[str] | None = None, rows: int = 65536) -> Iterator[pa.RecordBatch]:
        """All lists, at most `rows` at a time."""
        fs, root = filesystem(self.path)
        for part in self.manifest.parts:
            with pq.ParquetFile(fs.open_input_file(f"{root}/{part.path}")) as file:
                yield from file.iter_batches(batch_size=rows, columns=columns)


def open_lists(path: str) -> RetrievedLists | None:
    """Open a folder of lists; None where there is no manifest at all.

    Raises:
        InputError: the manifest is that of something else.
    """
    fs, root = filesystem(path)
    if fs.get_file_info(f"{root}/{MANIFEST}").type != pyarrow.fs.FileType.File:
        return None
    with fs.open_input_stream(f"{root}/{MANIFEST}") as stream:
        text = stream.read().decode()
    try:
        version = json.loads(text)["lists_version"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"--output {path} holds something else than lists; choose another --output") from None
    if version != LISTS_VERSION:
        raise InputError(f"{path} has lists of version {version}, this program writes version {LISTS_VERSION}")
    return RetrievedLists(path=path, manifest=ListManifest.from_json(text))
