"""Damaged rows of a dataset, and the list of those that a run leaves out: `damaged.jsonl` in its folder.

A line of the list:

    {"part": "sequences/part-00003.parquet", "row_group": 2, "row": 17, "rows": 1, "reason": "..."}

`row` counts from 0 in the row group. It is null where the whole row group is damaged; `row_group` is null too where the
whole part is.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

from recgpt_torchrec import storage
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.storage.typed import check_counts, make_typed, parse_object

LIST = "damaged.jsonl"


class Damage(NamedTuple):
    """A row, row group or part of a dataset that cannot be used, and why."""

    part: str
    row_group: int | None
    row: int | None
    rows: int
    reason: str

    @property
    def place(self) -> tuple[Any, ...]:
        """(part, row_group, row), which identifies the damage."""
        return self[:3]

    def __str__(self) -> str:
        group = "" if self.row_group is None else f", row group {self.row_group}"
        return f"{self.part}{group}{'' if self.row is None else f', row {self.row}'}: {self.reason}"


@dataclass
class _Stored:
    """A line of the list, as it is read."""

    part: str
    row_group: int | None
    row: int | None
    rows: int
    reason: str


@dataclass(frozen=True)
class SetAside:
    """The list of damaged rows that are left out, up to a limit; all processes, epochs and resumed runs share it.

    Each row is listed once.

    Example: `SetAside("runs/mine/damaged.jsonl", limit=1000)`
    """

    path: str
    """JSON lines, created with the first row. On an object store, which cannot append: a folder with a file per row."""
    limit: int
    """Maximum number of rows that may be left out."""

    def listed(self) -> list[Damage]:
        """Read the list.

        Raises:
            InputError: it is damaged.
        """
        if storage.remote(self.path):
            texts = [storage.read(f"{self.path}/{name}") for name in storage.names(self.path)]
        elif os.path.exists(self.path):
            with open(self.path, "rb") as file:
                texts = file.readlines()
        else:
            return []
        damages = []
        for number, text in enumerate(texts, 1):
            try:
                stored = make_typed(_Stored, parse_object(text))
                check_counts({name: value for name, value in vars(stored).items() if isinstance(value, int)})
            except ValueError as error:
                raise storage.damaged(f"{self.path}, line {number},", error) from None
            damages.append(Damage(**vars(stored)))
        return damages

    def add(self, damages: Iterable[Damage]) -> None:
        """Add the damages that are not listed yet.

        Raises:
            InputError: the list has more rows than the limit, or cannot be written.
        """
        try:
            with nullcontext() if storage.remote(self.path) else open(self.path, "a") as file:
                if file is not None:
                    fcntl.flock(file, fcntl.LOCK_EX)  # ranks and loader workers write in turn
                listed = self.listed()
                listed_places = {damage.place for damage in listed}
                new_damages = [damage for damage in damages if damage.place not in listed_places]
                for damage in new_damages:
                    line = json.dumps(damage._asdict()) + "\n"
                    if file is not None:
                        file.write(line)
                    else:  # a name that is the same in every process
                        name = hashlib.sha256(repr(damage.place).encode()).hexdigest()[:16]
                        storage.write(f"{self.path}/{name}.json", line.encode())
        except OSError as error:
            raise InputError(f"{self.path}: damaged rows cannot be listed there ({error})") from None
        self.check(listed + new_damages, f", listed in {self.path}")

    def check(self, damages: list[Damage], where: str = "") -> None:
        """Raise an `InputError` if `damages` are more rows than the limit."""
        rows = sum(damage.rows for damage in damages)
        if rows > self.limit:
            raise InputError(
                f"{rows:,} rows are damaged{where}, more than --stream.damaged_limit {self.limit}; the last is "
                f"{damages[-1]}. Restore the files or run prepare again, or give a higher limit"
            )

    def restore(self, dataset: Dataset) -> None:
        """Mark the parts that the run left out so far as lost, even if repaired since: windows depend on it."""
        for damage in self.listed():
            if damage.row_group is None:
                dataset.lost_parts.setdefault(damage.part, damage.reason)

    def check_lost(self, dataset: Dataset) -> None:
        """Raise an `InputError` if lost parts and listed damages are more rows than the limit; writes nothing."""
        rows = {part.path: part.rows for part in dataset.manifest.sequences}
        lost = [
            Damage(path, None, None, rows[path], reason) for path, reason in dataset.lost_parts.items() if path in rows
        ]
        self.check([damage for damage in self.listed() if damage.row_group is not None] + lost)

    def summary(self) -> str:
        """One line that says how many rows were left out."""
        rows = sum(damage.rows for damage in self.listed())
        return f"Damaged: {rows:,} rows were left out, listed in {self.path}" if rows else "Damaged: no row"
