"""What is recorded of a folder of days, and of each day in it. Imports nothing of datasets.

    days.json             the days that count, and the options that they share; written last
    days/0001/            a dataset: manifest.json, sequences/, items/, users/ (new users only), tails/, newest/

Paths in a day's manifest are relative to the folder of days, so that they can name parts of the days before.
"""

import os
from dataclasses import asdict, dataclass, field
from typing import Any

from recgpt_torchrec import storage
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.storage.parts import Part
from recgpt_torchrec.storage.typed import check_counts, make_typed

DAYS = "days.json"
FOLDER = "days"
"""Folder of the days, below the folder of days; also below the output folder of a run on one."""
MAX_DAYS = 9999
"""Maximum number of days of a folder: their names have four digits."""
VERSION = 1


@dataclass(kw_only=True)
class DayRecord:
    """What the manifest of an appended day holds beyond that of another dataset; paths as in the manifest."""

    number: int
    """From 1 on."""
    history: int
    """Minimum number of a user's newest earlier interactions in front of the day's, where there are as many."""
    new: int = 0
    """Number of interactions that the day added."""
    late: int = 0
    """Number of these that are older than one of the same user of an earlier day."""
    repeated: int = 0
    """Number of rows left out because an earlier day has them."""
    too_late: int = 0
    """Number of rows left out because they are older than the oldest kept interaction of their user."""
    total: int = 0
    """Number of interactions of all days so far."""
    held_out_users: int = 0
    """Number of users with held-out items, of all days so far; with managed ids of this day."""
    newest_time: int | None = None
    """Time of the newest interaction so far; None: the log has no times."""
    tails: list[Part] = field(default_factory=list)
    """Arrow files with the newest entries of the day's users (`preparation.days.tails`)."""
    newest: list[Part] = field(default_factory=list)
    """Parquet files with the newest day of every user (`newest.Newest`)."""


@dataclass(kw_only=True)
class Days:
    """The contents of days.json."""

    days_version: int = VERSION
    days: list[str] = field(default_factory=list)
    """Names of the folders of the days, in order."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Options of prepare that all days share."""

    @classmethod
    def read(cls, path: str) -> "Days | None":
        """Those of the folder `path`; None: it is no folder of days.

        Raises:
            InputError: days.json is damaged, or of another version.
        """
        file = f"{path}/{DAYS}"
        values = storage.read_json(file)
        if values is None:
            return None
        if (version := values.get("days_version")) != VERSION:
            raise InputError(f"{file} has version {str(version)[:20]}, this program reads version {VERSION}; update it")
        try:
            days = make_typed(cls, values, others=True)
            check_counts({"the number of days": len(days.days)})
            if days.days != [name_of(number) for number in range(1, len(days.days) + 1)]:
                raise ValueError("its days are not 0001, 0002, ...")
        except ValueError as error:
            raise storage.damaged(file, error) from None
        return days

    def write(self, path: str) -> None:
        """Write days.json in the folder `path`, in one step."""
        storage.write_json(f"{path}/{DAYS}", asdict(self))


def name_of(day: int) -> str:
    """Name of a day's folder."""
    return f"{day:04d}"


def path_of(folder: str, day: int) -> str:
    """Path of a day in a folder of days, or in the output folder of a run on one."""
    return f"{folder.rstrip('/')}/{FOLDER}/{name_of(day)}"


def folder_of(day: str) -> str:
    """The folder of days, given the path of one of its days."""
    path = day.rstrip("/") if storage.remote(day) else os.path.abspath(day)
    return path.rsplit("/", 2)[0]


def day_of(part: Part) -> int:
    """The day that a part belongs to."""
    return int(part.path.split("/")[1])
