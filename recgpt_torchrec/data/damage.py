"""Damaged rows of a dataset: where they are, and the list of those that a run leaves out.

    {"part": "sequences/part-00003.parquet", "row_group": 2, "row": 17, "rows": 1, "reason": "..."}

is a line of the list, `damaged.jsonl` in the run's folder. `row` counts from 0 in the row group; it is null where the
whole row group is meant, and `row_group` too where it is the whole part.
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

LIST = "damaged.jsonl"


class Damage(NamedTuple):
    """A place in a dataset that cannot be used, and why."""

    part: str
    row_group: int | None
    row: int | None
    rows: int
    reason: str

    @property
    def place(self) -> tuple[Any, ...]:
        """What tells it from others."""
        return self[:3]

    def __str__(self) -> str:
        group = "" if self.row_group is None else f", row group {self.row_group}"
        return f"{self.part}{group}{'' if self.row is None else f', row {self.row}'}: {self.reason}"


@dataclass(frozen=True)
class SetAside:
    """Where damaged rows are listed, each once, by whichever process, epoch or resumed run meets it; up to a limit.

    Example: `SetAside("runs/mine/damaged.jsonl", limit=1000)`
    """

    path: str
    """JSON lines; made with the first row. On a store, where nothing can be appended, a folder with a file a row."""
    limit: int
    """Most rows that a run goes on without."""

    def listed(self) -> list[Damage]:
        """What is listed so far."""
        if storage.remote(self.path):
            texts = [storage.read(f"{self.path}/{name}") for name in storage.names(self.path)]
            return [Damage(**json.loads(text)) for text in texts]
        if not os.path.exists(self.path):
            return []
        with open(self.path) as file:
            return [Damage(**json.loads(line)) for line in file]

    def add(self, damages: Iterable[Damage]) -> None:
        """List those that are not listed yet.

        Raises:
            InputError: there are more rows in the list than the limit, or it cannot be written.
        """
        try:
            with nullcontext() if storage.remote(self.path) else open(self.path, "a") as file:
                if file is not None:
                    fcntl.flock(file, fcntl.LOCK_EX)  # ranks and loader workers write one after the other
                listed = self.listed()
                known = {damage.place for damage in listed}
                new = [damage for damage in damages if damage.place not in known]
                for damage in new:
                    line = json.dumps(damage._asdict()) + "\n"
                    if file is not None:
                        file.write(line)
                    else:  # by a name that every process that meets this row gives it
                        name = hashlib.sha256(repr(damage.place).encode()).hexdigest()[:16]
                        storage.write(f"{self.path}/{name}.json", line.encode())
        except OSError as error:
            raise InputError(f"{self.path}: damaged rows cannot be listed there ({error})") from None
        self.check(listed + new, f", listed in {self.path}")

    def check(self, damages: list[Damage], where: str = "") -> None:
        """Raise an `InputError` if these are more rows than the limit."""
        rows = sum(damage.rows for damage in damages)
        if rows > self.limit:
            raise InputError(
                f"{rows:,} rows are damaged{where}, more than --stream.damaged_limit {self.limit}; the last is "
                f"{damages[-1]}. Restore the files or run prepare again, or give a higher limit"
            )

    def restore(self, dataset: Dataset) -> None:
        """Lose the parts that the run has gone on without so far, mended meanwhile or not: windows depend on it."""
        for damage in self.listed():
            if damage.row_group is None:
                dataset.lost_parts.setdefault(damage.part, damage.reason)

    def check_lost(self, dataset: Dataset) -> None:
        """Raise an `InputError` if lost parts and what is listed are more rows than the limit; nothing is written."""
        rows = {part.path: part.rows for part in dataset.manifest.sequences}
        lost = [
            Damage(path, None, None, rows[path], reason) for path, reason in dataset.lost_parts.items() if path in rows
        ]
        self.check([damage for damage in self.listed() if damage.row_group is not None] + lost)

    def summary(self) -> str:
        """What was set aside, in a line."""
        rows = sum(damage.rows for damage in self.listed())
        return f"Damaged: {rows:,} rows were left out, listed in {self.path}" if rows else "Damaged: no row"
