"""The dataset folder: its manifest, and opening one with its files checked against the manifest.

    manifest.json         format version, counts, settings, and per file: rows, items, bytes, checksum
    sequences/*.parquet   one row per user: user_id int64, item_ids list<int64>, timestamps list<int64>, ...;
                          where the split is stored, validation_start and test_start int64
    items/*.parquet       item_id int64 (dense, from 0), key, count, train_count
    users/*.parquet       user_id int64 (dense, from 0), key; here and in items/ attribute_NAME list<int32>, the ids
                          of an attribute's values, and text_NAME
    attributes/*/*.parquet   of each attribute of categories: value_id int64 (dense, from 0), key, count

Where ids are slots of a table of fixed size (`prepare --ids`), items/ or users/ have more columns, all int64. managed:
since (version of the vocabulary in which the slot was given to another key), seen and last_seen (what the policy
counts). hash: bucket (hash modulo the number of rows) and keys (number of keys that share the id; `key` is the most
frequent); item_keys/ or user_keys/ list all keys.

The manifest is written last: a folder without one is not a dataset.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

import pyarrow as pa
import pyarrow.parquet as pq

from recgpt_torchrec.data.days.newest import Newest
from recgpt_torchrec.data.days.records import DayRecord
from recgpt_torchrec.data.ids.records import Entity, IdTable
from recgpt_torchrec.data.inputs.records import DatasetAttribute
from recgpt_torchrec.data.inputs.spec import check_unit
from recgpt_torchrec.data.reading.records import check_records
from recgpt_torchrec.data.segments import FEEDBACK, PLAIN_SEGMENTS, SEGMENTS
from recgpt_torchrec.data.split import EVALUATION, FEWEST_ITEMS, HoldOut, SplitName
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.storage import filesystem, raise_storage_failure
from recgpt_torchrec.storage.manifests import FolderManifest, Kind
from recgpt_torchrec.storage.parts import Part, open_part, without_footers
from recgpt_torchrec.storage.typed import check_counts

if TYPE_CHECKING:
    from recgpt_torchrec.data.reading.footers import Footer

COLUMNS = {
    "user_id": pa.int64(),
    "item_ids": pa.list_(pa.int64()),
    "segment_ids": pa.list_(pa.int8()),
    "timestamps": pa.list_(pa.int64()),
    "event_ids": pa.list_(pa.int16()),
    "places": pa.list_(pa.int16()),
    "trained": pa.list_(pa.int8()),
    "answer_ids": pa.list_(pa.int64()),
    "answer_scores": pa.list_(pa.float32()),
    "validation_start": pa.int64(),
    "test_start": pa.int64(),
}
"""Columns of the sequences that can be read, and the type they are cast to."""
REQUIRED = ("user_id", "item_ids")
ANSWERS = ("answer_ids", "answer_scores")
"""List columns of a prompt dataset: the model's answers per interacted item, and their scores."""
STARTS = ("validation_start", "test_start")
"""Columns of a dataset with the hold_out `time`, `given` or `targets`: where users' parts start, see `data.split`."""


@dataclass(kw_only=True)
class Vocabulary:
    """Fingerprint and size of a vocabulary: the users and items that have ids."""

    fingerprint: str
    """Hash of the keys, in the order of the ids."""
    users: int
    items: int


@dataclass(kw_only=True)
class Manifest(FolderManifest):
    """The contents of a dataset's `manifest.json`."""

    KIND = Kind(
        name="dataset",
        stage="prepare",
        version_field="format_version",
        version=1,
        parts=("sequences", "item_parts", "user_parts"),
    )
    format_version: int = KIND.version
    users: int = 0
    items: int = 0
    interactions: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    """The options of the stage that wrote the dataset."""
    vocabulary: str = ""
    """Fingerprint of the item and user vocabularies; a checkpoint fits a dataset when these are equal."""
    lineage: list[Vocabulary] = field(default_factory=list)
    """The vocabularies that this one extends, oldest first: their users and items have the same ids here, before all
    others. So a checkpoint with one of these can be trained further on this dataset."""
    sequences: list[Part] = field(default_factory=list)
    item_parts: list[Part] = field(default_factory=list)
    user_parts: list[Part] = field(default_factory=list)
    preparation: dict[str, Any] = field(default_factory=dict)
    """What `prepare` read and dropped: inputs, rows, rejected, rejected_parts, duplicates_dropped, rounds, lengths,
    split; also exposed where shown rows were read, events where they have types, and extends where another dataset is
    extended."""
    hold_out: HoldOut = "last"
    """What is held out of training, see `data.split`; `last` is not written."""
    attributes: list[DatasetAttribute] = field(default_factory=list)
    """Attributes of users and items; not written where there are none, like the next two."""
    events: list[str] = field(default_factory=list)
    """Words of the event types in the column `event_ids`; the n-th has the id n + 1."""
    time_unit: float | None = None
    """Seconds of a unit of the timestamps; None: it is not known."""
    feedback: list[str] = field(default_factory=list)
    """Kinds of feedback (`segments.FEEDBACK`) among the entries, each with its own time, also after a user's last
    interaction. Empty in datasets whose shown entries are only those between two interactions."""
    id_tables: list[IdTable] = field(default_factory=list)
    """How ids are assigned that are slots of a table of fixed size; not written where there are none, like the next."""
    key_parts: list[Part] = field(default_factory=list)
    """Of `item_keys/` and `user_keys/`, where keys share ids: every key of the log, and its id, in order of ids."""
    day: DayRecord | None = None
    """Of a day that was appended (`prepare --append`); not written elsewhere."""

    @property
    def all_parts(self) -> list[Part]:
        """All parts that the manifest promises."""
        parts = super().all_parts + self.key_parts + [part for each in self.attributes for part in each.parts]
        return parts if self.day is None else [*parts, *self.day.tails, *self.day.newest]

    def count_targets(self, split: SplitName) -> int | None:
        """Number of users with a target in `validation` or `test`; None: it was not recorded, but there may be some."""
        if self.hold_out == "none":
            return 0
        if (recorded := self.preparation.get("split")) is not None:
            count = recorded[f"{split}_users"]
            return None if count is None else int(count)
        longest = self.preparation.get("lengths", {}).get("max", FEWEST_ITEMS)
        return 0 if self.hold_out == "last" and longest < FEWEST_ITEMS else None

    @property
    def has_validation(self) -> bool:
        """Whether the split has a validation part at all; its users may still all lack a target."""
        parts = self.preparation.get("split", {}).get("interactions", {})
        return self.hold_out in ("last", "time", "targets") or (
            self.hold_out == "given" and parts.get("validation", 1) > 0
        )

    def extends(self, vocabulary: str) -> Vocabulary | None:
        """The vocabulary with this fingerprint, if this dataset has or extends it; else None."""
        own = Vocabulary(fingerprint=self.vocabulary, users=self.users, items=self.items)
        return next((each for each in (own, *self.lineage) if each.fingerprint == vocabulary), None)

    def id_table(self, entity: Entity) -> IdTable | None:
        """How the ids of users or items are assigned; None: from a vocabulary."""
        return next((each for each in self.id_tables if each.entity == entity), None)

    def reassigned_since(self, vocabulary: str) -> dict[Entity, int]:
        """The version of a vocabulary that this one has or extends, by each entity of which a slot was given to
        another key since: those whose `since` is greater. Empty: every id of that vocabulary means the same key."""
        known = [each.fingerprint for each in self.lineage]
        version = known.index(vocabulary) if vocabulary in known else len(known)
        return {each.entity: version for each in self.id_tables if each.reassigned > version}

    @property
    def segments(self) -> int:
        """Number of segment ids that entries may have, and that a model of it tells apart."""
        return SEGMENTS if {*self.feedback} - {"shown"} else PLAIN_SEGMENTS

    @property
    def entries(self) -> int:
        """Number of entries of all histories: interactions, and prompts where there are any."""
        return sum(part.items for part in self.sequences)

    def count_training_tokens(self, max_len: int | None, prompts: bool) -> float:
        """About the number of tokens of one epoch: one per target, and one per prompt.

        Args:
            max_len: maximum number of entries of a history that are trained on; None: all of it.
            prompts: whether the prompts of the histories are read.
        """
        recorded = self.preparation.get("split", {})
        if (targets := recorded.get("training_targets")) is None:
            # As if of each history one item per split were held out, and the first one is no target.
            targets = self.interactions - (len(EVALUATION) + 1) * self.users
        entries = targets * self.entries / max(self.interactions, 1) if prompts else targets
        return max(0.0, min(entries, math.inf if max_len is None else self.users * max_len))

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        values = asdict(self)
        if not self.lineage:
            del values["lineage"]
        if self.hold_out == "last":
            del values["hold_out"]
        for name in ("attributes", "events", "time_unit", "feedback", "id_tables", "key_parts", "day"):
            if not values[name]:
                del values[name]
        return json.dumps(values, indent=1)

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Self:
        """Make a manifest of the values of `manifest.json`, and check what it promises.

        Raises:
            ValueError: a field is missing, unknown or invalid.
        """
        manifest = super().from_values(values)
        check_counts({name: getattr(manifest, name) for name in ("users", "items", "interactions")})
        for each in manifest.lineage:
            check_counts({f"{name} of the lineage": getattr(each, name) for name in ("users", "items")})
        for table in manifest.id_tables:
            table.check()
            if (count := getattr(manifest, f"{table.entity}s")) > table.rows:
                raise ValueError(f"it promises {count:,} {table.entity}s in a table of {table.rows:,} rows")
        for name, parts in (("users", manifest.user_parts), ("items", manifest.item_parts)):
            count, rows = getattr(manifest, name), sum(part.rows for part in parts)
            if count and count != rows:
                raise ValueError(f"it promises {count:,} {name}, but {rows:,} rows in {name}/")
        for attribute in manifest.attributes:
            attribute.check()
        if unknown := [kind for kind in manifest.feedback if kind not in FEEDBACK]:
            raise ValueError(f"feedback has {unknown[0]!r}, it must have {', '.join(FEEDBACK)}")
        if manifest.time_unit is not None:
            check_unit("time_unit", manifest.time_unit)
        check_records(manifest.settings, manifest.preparation)
        return manifest


@dataclass(kw_only=True)
class Dataset:
    """An opened dataset folder.

    Example: `Dataset.open("runs/beauty/data").manifest.users`.
    """

    path: str
    manifest: Manifest
    damaged: Literal["stop", "skip"] | None = None
    """What to do about damaged sequences; None: the stage has no such option."""
    lost_parts: dict[str, str] = field(default_factory=dict)
    """Parts that are left out as a whole, by path, with the reason; only with `skip`."""
    columns: frozenset[str] = frozenset()
    """Columns of `COLUMNS` that the sequences have; `windows.row_groups` fills it from their footers."""
    footers: dict[str, "Footer"] = field(default_factory=dict, repr=False, compare=False)
    """What `windows.row_groups` read of each sound part, by path."""
    files: str = ""
    """Folder that the paths of the parts are relative to, where it is not `path`: the folder of days."""
    newest: Newest | None = None
    """Of a folder of days: which day has the row of a user that counts; None: every row counts."""

    @classmethod
    def open(
        cls,
        path: str,
        *,
        damaged: Literal["stop", "skip"] | None = None,
        checksums: bool = False,
        advance: Callable[[int], None] = lambda _: None,
    ) -> "Dataset":
        """Open and check a dataset: manifest, format version, presence and size of every part.

        Args:
            path: folder of the dataset.
            damaged: with `skip`, parts of the sequences that cannot be used are noted in `lost_parts`.
            checksums: also read every part and compare its checksum.
            advance: called with 1 for each part.

        Raises:
            InputError: names what is missing or differs, and how to repair it.
        """
        from recgpt_torchrec.data.days.opening import find_manifest

        manifest, files, newest = find_manifest(path)
        if not (manifest.users and manifest.items and manifest.entries):
            raise InputError(
                f"{path} is empty: {manifest.users} users, {manifest.items} items, {manifest.entries} entries; prepare "
                "a log with interactions in it"
            )
        dataset = cls(path=path, manifest=manifest, damaged=damaged, files=files, newest=newest)
        manifest.check_parts(files, checksums=checksums, report=dataset.lose_part, advance=advance)
        return dataset

    @property
    def remedy(self) -> str:
        """What the user can do about damaged sequences."""
        more = ", or leave the damaged rows out: --stream.damaged skip" if self.damaged == "stop" else ""
        return self._repair + more

    @property
    def _repair(self) -> str:
        stage = "generate_prompts" if "prompts" in self.manifest.settings else "prepare"
        return f"restore the file or run {stage} again"

    def lose_part(self, part: Part, reason: str) -> None:
        """Note a part of the sequences as lost.

        Raises:
            InputError: `damaged` is not `skip`, or the part holds no sequences.
        """
        sequences = part in self.manifest.sequences
        if self.damaged != "skip" or not sequences:
            remedy = self.remedy if sequences else self._repair
            raise InputError(f"{self.path}: the part {part.path} {reason}; {remedy}")
        self.lost_parts[part.path] = reason

    def open_part(self, part: Part) -> pq.ParquetFile:
        """Open one part for reading row groups.

        Raises:
            InputError: the file cannot be read as Parquet.
        """
        fs, root = filesystem(self.files or self.path)
        try:
            return open_part(fs, root, part)
        except Exception as error:
            raise_storage_failure(error, f"{self.path}/{part.path}")
            raise InputError(
                f"{self.path}: the part {part.path} cannot be read as Parquet ({error}); {self.remedy}"
            ) from None

    @contextmanager
    def read_part(self, part: Part) -> Iterator[pq.ParquetFile]:
        """Open one part, and read it within the `with`.

        Raises:
            InputError: the file cannot be read, or has other rows than the manifest promises.
        """
        with self.open_part(part) as file:
            rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            if file.metadata.num_rows != part.rows or sum(rows) != part.rows or min(rows, default=0) < 0:
                raise InputError(
                    f"{self.path}: the part {part.path} has {sum(rows):,} rows, the manifest promises {part.rows:,}; "
                    + self.remedy
                )
            try:
                yield file
            except (OSError, KeyError, pa.ArrowException) as error:
                raise_storage_failure(error, f"{self.path}/{part.path}")
                reason = " ".join(str(error).split())
                raise InputError(
                    f"{self.path}: the part {part.path} cannot be read ({reason}); {self.remedy}"
                ) from None


def histories_fingerprint(dataset: Dataset) -> str:
    """32 hex digits that identify all histories of a dataset, the attributes in it and what is held out, wherever it is
    stored."""
    manifest = dataset.manifest
    with_values = [*manifest.user_parts, *manifest.item_parts] if manifest.attributes else []
    parts = json.dumps([asdict(part, dict_factory=without_footers) for part in (*manifest.sequences, *with_values)])
    if dataset.manifest.hold_out != "last":  # with `none` the same files mean other training parts
        parts += dataset.manifest.hold_out
    return hashlib.sha256(parts.encode()).hexdigest()[:32]


def find_column_fault(schema: pa.Schema, name: str) -> str | None:
    """Why a column of `COLUMNS` cannot be read from a part with this schema; None: it can."""
    if (count := schema.names.count(name)) != 1:
        return f"has no column {name}, only {schema.names}" if not count else f"has more than one column {name}"
    kind = value_kind = schema.field(name).type
    expected = COLUMNS[name]
    if pa.types.is_list(expected) and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        value_kind, expected = kind.value_type, expected.value_type
    is_alike = pa.types.is_floating if pa.types.is_floating(expected) else pa.types.is_integer
    if pa.types.is_list(expected) or not is_alike(value_kind):
        return f"has a column {name} of type {kind}, it must be {COLUMNS[name]}"
    return None
