"""The dataset folder: its manifest, and opening one with every promise of the manifest checked.

    manifest.json         format version, counts, settings, and per file: rows, items, bytes, checksum
    sequences/*.parquet   one row a user: user_id int64, item_ids list<int64>, timestamps list<int64>, ...
    items/*.parquet       item_id int64 (dense, from 0), key, count
    users/*.parquet       user_id int64 (dense, from 0), key

The manifest is written last: a folder without one is not a dataset.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from recgpt_torchrec.errors import InputError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


def filesystem(path: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The pyarrow file system of a path or URI, and the path on it.

    URIs are pyarrow's own (s3://, gs://, hdfs://, file://), and beyond those any that fsspec knows.
    """
    if "://" not in path:
        return pyarrow.fs.LocalFileSystem(), os.path.abspath(path)
    try:
        return pyarrow.fs.FileSystem.from_uri(path)
    except pa.ArrowInvalid as error:
        try:
            fs, root = fsspec.core.url_to_fs(path)
        except (ValueError, ImportError):
            raise InputError(f"{path}: no file system for this URI: {error}") from None
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)), root


@dataclass(kw_only=True)
class Part:
    """One Parquet file of a dataset, as the manifest promises it."""

    path: str
    """Relative to the dataset's folder, for example `sequences/part-00000.parquet`."""
    rows: int
    items: int
    """Interactions in the file (for `items/` and `users/` parts the same as rows)."""
    bytes: int
    checksum: str
    """crc32 of the file's bytes as eight hex digits."""


@dataclass(kw_only=True)
class Manifest:
    """What `manifest.json` holds."""

    format_version: int = FORMAT_VERSION
    users: int = 0
    items: int = 0
    interactions: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    """The options of the stage that wrote the dataset."""
    vocabulary: str = ""
    """Fingerprint of the item and user vocabularies; a checkpoint fits a dataset when these are equal."""
    sequences: list[Part] = field(default_factory=list)
    item_parts: list[Part] = field(default_factory=list)
    user_parts: list[Part] = field(default_factory=list)
    preparation: dict[str, Any] = field(default_factory=dict)
    """What `prepare` read and dropped: inputs, rows, rejected, rejected_parts, duplicates_dropped, rounds, lengths."""

    @property
    def entries(self) -> int:
        """Entries of all histories: interactions, and prompts where there are any."""
        return sum(part.items for part in self.sequences)

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """The manifest that `text` holds."""
        values = json.loads(text)
        for name in ("sequences", "item_parts", "user_parts"):
            values[name] = [Part(**part) for part in values.get(name, [])]
        return cls(**values)


@dataclass(kw_only=True)
class Dataset:
    """An opened dataset folder.

    Example: `Dataset.open("runs/beauty/data").manifest.users`.
    """

    path: str
    manifest: Manifest

    @classmethod
    def open(cls, path: str) -> "Dataset":
        """Open and check a dataset: manifest, format version, every part there with the promised size.

        Raises:
            InputError: names what is missing or differs, and how to repair it.
        """
        fs, root = filesystem(path)
        info = fs.get_file_info(f"{root}/{MANIFEST}")
        if info.type == pyarrow.fs.FileType.NotFound:
            raise InputError(
                f"{path} is not a dataset: it has no {MANIFEST}. "
                f"Make one with: python -m recgpt_torchrec.prepare --output {path} ..."
            )
        with fs.open_input_stream(f"{root}/{MANIFEST}") as stream:
            text = stream.read().decode()
        try:
            version = json.loads(text).get("format_version")
        except (json.JSONDecodeError, AttributeError) as error:
            raise InputError(
                f"{path}/{MANIFEST} is not valid JSON ({error}); run prepare again into a new folder"
            ) from None
        if version != FORMAT_VERSION:
            raise InputError(
                f"{path} has dataset format version {version}, this program reads version {FORMAT_VERSION}; "
                "run prepare again with this version into a new folder"
            )
        manifest = Manifest.from_json(text)
        dataset = cls(path=path, manifest=manifest)
        parts = manifest.sequences + manifest.item_parts + manifest.user_parts
        infos = fs.get_file_info([f"{root}/{part.path}" for part in parts])
        for part, found in zip(parts, infos, strict=True):
            if found.type == pyarrow.fs.FileType.NotFound:
                raise InputError(
                    f"{path}: the part {part.path} is missing (the manifest promises {part.rows} rows in "
                    f"{part.bytes} bytes); restore it or run prepare again"
                )
            if found.size != part.bytes:
                raise InputError(
                    f"{path}: the part {part.path} is damaged: it has {found.size} bytes, the manifest promises "
                    f"{part.bytes}; restore it or run prepare again"
                )
        return dataset

    def open_part(self, part: Part) -> pq.ParquetFile:
        """Open one part for reading row groups.

        Raises:
            InputError: the file is not readable Parquet; names it.
        """
        fs, root = filesystem(self.path)
        try:
            return pq.ParquetFile(fs.open_input_file(f"{root}/{part.path}"))
        except Exception as error:
            raise InputError(
                f"{self.path}: the part {part.path} cannot be read as Parquet ({error}); "
                "restore it or run prepare again"
            ) from None
