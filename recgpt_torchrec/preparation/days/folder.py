"""The folder that `prepare --append` writes to: its options, its days, and whether an input is in it already."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from recgpt_torchrec import storage
from recgpt_torchrec.config import Prepare
from recgpt_torchrec.config.fields import changeable_names, default_values
from recgpt_torchrec.data.dataset import Dataset, Manifest
from recgpt_torchrec.data.days.newest import Newest
from recgpt_torchrec.data.days.opening import read_days
from recgpt_torchrec.data.days.records import DAYS, FOLDER, MAX_DAYS, Days, name_of, path_of
from recgpt_torchrec.data.ragged import Int64
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.attributes.tables import EntityTable
from recgpt_torchrec.preparation.days.tails import Tails
from recgpt_torchrec.preparation.reading.files import InputFile
from recgpt_torchrec.storage import filesystem
from recgpt_torchrec.storage.finished import differences
from recgpt_torchrec.storage.folders import INCOMPLETE, MANIFEST, check_free
from recgpt_torchrec.storage.parts import checksum_of

READING = {
    *("input_format", "header", "separator", "quote", "escape", "encoding", "null_words", "list_separator"),
    *("partition_columns", "time_format"),
}
"""Options that say how files are written, which days may differ in."""
ID_OPTIONS = ("ids", "user_rows", "item_rows", "eviction", "eviction_step")
"""Options that the first day fixes, and later days may leave out."""


@dataclass
class DaysFolder:
    """A folder of days. Example: `DaysFolder.find(config)`."""

    path: str
    config: Prepare
    """Of the stage, with the `ID_OPTIONS` of the first day."""
    days: Days
    manifests: list[Manifest] = field(default_factory=list)
    """Of the days, in order."""

    @classmethod
    def find(cls, config: Prepare) -> "DaysFolder":
        """The folder `config.output`, made or not; writes nothing.

        Raises:
            InputError: it is something else, was made with other options, or lacks a day.
        """
        path = config.output.rstrip("/") or "/"
        if storage.exists(f"{path}/{MANIFEST}"):
            raise InputError(
                f"--append: {path} is a dataset, not a folder of days; name another --output, and give it the log so "
                "far as its first day"
            )
        days = Days.read(path)
        if days is not None and days.days:
            config = _fill_in(config, days)
        elif config.ids != "vocabulary" and config.user_rows is None and config.item_rows is None:
            raise InputError(
                f"--ids {config.ids} needs the size of a table, which the first day fixes; give --item_rows, "
                "--user_rows or both"
            )
        settings = {name: value for name, value in asdict(config).items() if name not in changeable_names(Prepare)}
        settings["min_count"] = 1
        if days is None:
            if storage.names(path) != [f"{DAYS}.tmp"]:  # left by a kill at the very start
                check_free(path, "folder of days", in_place=True)
            return cls(path, config, Days(settings=settings))
        known = {**default_values(config), **days.settings}
        differing = differences(known, {**known, **settings}, changeable_names(Prepare) | READING)
        if differing and days.days:
            lines = "".join(f"\n  --{line}" for line in differing)
            raise InputError(
                f"{path} was made with other options:{lines}\nNothing was touched; give the same options, or another "
                "--output"
            )
        if not days.days:
            return cls(path, config, Days(settings=settings))
        if len(days.days) >= MAX_DAYS:
            raise InputError(f"{path} has {MAX_DAYS:,} days, the maximum; append to another --output")
        return cls(path, config, days, read_days(path, days))

    @cached_property
    def newest(self) -> Dataset | None:
        """The newest day; None: there is none yet."""
        return Dataset.open(path_of(self.path, len(self.manifests))) if self.manifests else None

    @property
    def newest_users(self) -> Newest:
        """The newest day of every user."""
        record = self.manifests[-1].day
        assert record is not None
        return Newest(self.path, record.newest)

    def open_tails(self, columns: dict[str, pa.DataType], since: Mapping[str, Int64]) -> Tails:
        """The tails of all users.

        Args:
            columns: of the day's entries.
            since: of `user` and `item`, [slots] int64 version in which each slot was given to its key; those without
                keep their ids.
        """
        records = [manifest.day for manifest in self.manifests]
        files = {record.number: record.tails[0] for record in records if record is not None}
        versions = np.array([0, *(len(manifest.lineage) for manifest in self.manifests)])
        return Tails(self.path, files, self.newest_users, columns, versions, since)

    def record_inputs(self, files: list[InputFile]) -> list[dict[str, Any]]:
        """The input files as the manifest records them, each with the checksum of its content."""
        return [{**asdict(file), "checksum": checksum_of(*filesystem(file.path))} for file in files]

    def record_tables(self, tables: list[EntityTable]) -> list[dict[str, Any]]:
        """The files of the tables of attributes as the manifest records them, each with the checksum of its content."""
        files = [(file, table.entity) for table in tables for file in table.files]
        checked = self.record_inputs([file for file, _ in files])
        return [{**record, "entity": entity} for record, (_, entity) in zip(checked, files, strict=True)]

    def find_appended(self, files: list[dict[str, Any]], tables: list[dict[str, Any]]) -> Manifest | None:
        """The newest day, if it is of these files and tables; None: none of the files was appended before.

        Raises:
            InputError: some were, or an earlier day is of these, or the newest one with other tables.
        """

        def content(file: dict[str, Any]) -> tuple[Any, ...]:
            return file.get("bytes"), file.get("checksum")

        for number, manifest in reversed([*enumerate(self.manifests, 1)]):
            recorded = manifest.preparation.get("inputs", [])
            if number == len(self.manifests) and [*map(content, recorded)] == [*map(content, files)]:
                known = manifest.preparation.get("tables", [])
                if all("checksum" in file for file in known) and [*map(content, known)] != [*map(content, tables)]:
                    raise InputError(
                        f"--input {files[0]['path']}: {self.path} has it already, as day {number}, with other tables "
                        "of attributes. Give them with the next day, or append the days to another --output"
                    )
                return manifest
            there = {content(file) for file in recorded if file.get("bytes")}
            if again := [file["path"] for file in files if content(file) in there]:
                raise InputError(
                    f"--input {again[0]}: {self.path} has it already, as day {number}; leave it out, or give the files "
                    "of a new day"
                )
        return None

    def begin(self) -> None:
        """Make the folder, and remove what a killed call left of the next day.

        Raises:
            InputError: it cannot be written to.
        """
        try:
            storage.make_folder(self.path)
            if not storage.exists(f"{self.path}/{DAYS}"):
                self.days.write(self.path)  # first, so that a killed call leaves a folder of days, without a day
            storage.make_folder(f"{self.path}/{FOLDER}")
            day = path_of(self.path, len(self.manifests) + 1)
            if storage.exists(f"{day}/{MANIFEST}"):  # written, and killed before the folder said so
                storage.remove(day, first=MANIFEST)
            elif storage.is_folder(day) and storage.exists(f"{day}/{INCOMPLETE}"):
                storage.remove(day)
        except OSError as error:
            raise InputError(f"cannot write to --output {self.path}: {error}") from None

    def commit(self) -> None:
        """Count the day that was written.

        Raises:
            InputError: it cannot be written.
        """
        self.days.days.append(name_of(len(self.days.days) + 1))
        try:
            self.days.write(self.path)
        except OSError as error:
            raise InputError(f"cannot write {self.path}/{DAYS}: {error}") from None


def _fill_in(config: Prepare, days: Days) -> Prepare:
    """The configuration with the first day's `ID_OPTIONS` where it leaves them out, which is to give the default."""
    defaults = default_values(config)
    given = {name for name in ID_OPTIONS if getattr(config, name) != defaults[name]}
    known = {name: days.settings[name] for name in ID_OPTIONS if name in days.settings and name not in given}
    if known.get("ids", "vocabulary") == "vocabulary" and "ids" not in given:
        return config
    try:
        return replace(config, **known)
    except ValueError as error:  # an option that does not go with those of the first day
        raise InputError(f"--append: {error}") from None
