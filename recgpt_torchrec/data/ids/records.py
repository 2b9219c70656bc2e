"""What a dataset's manifest records of ids that are slots of a table of fixed size."""

from dataclasses import dataclass, field
from typing import Literal

from recgpt_torchrec.storage.typed import check_counts

Entity = Literal["user", "item"]
MAX_ROWS = 2**40
"""Maximum number of rows of a table that is read from a file."""


@dataclass(kw_only=True)
class IdTable:
    """How the ids of users or items are assigned; an entity without one has a vocabulary.

    Slots are handed out from 0 on, and none is taken from its key before all have one: so the used ids are 0 to N - 1.
    """

    entity: Entity
    ids: Literal["hash", "managed"]
    rows: int
    """Number of slots."""
    seed: int = 0
    """Seed of the hash of keys."""
    eviction: Literal["none", "lru", "lfu", "distance_lfu"] = "none"
    """Policy of a managed table."""
    step: int = 0
    """Length of a step of time, in the unit of the timestamps; `last_seen` in the parts counts these."""
    origin: int | None = None
    """A time in step 1; None: there are no times. Keys that were seen last before it count as seen in step 1."""
    until: int | None = None
    """Time of the newest interaction that was counted; None: none was, or there are no times."""
    now: int = 0
    """Newest step."""
    version: int = 0
    """Number of this vocabulary, which the column `since` counts: 0 for the first, and one more where an id changed."""
    reassigned: int = 0
    """The newest version in which a slot was given to another key; 0: none ever was."""

    def check(self) -> None:
        """Check what was read from a file.

        Raises:
            ValueError: a number is impossible.
        """
        name = f"id_tables: {self.entity}"
        check_counts({f"{name}: {field}": getattr(self, field) for field in ("rows", "step", "now", "version")})
        if not 0 < self.rows <= MAX_ROWS:
            raise ValueError(f"{name}: rows is {self.rows}, it must be from 1 to {MAX_ROWS:,}")
        if not 0 <= self.reassigned <= self.version:
            raise ValueError(f"{name}: reassigned is {self.reassigned}, it must be from 0 to {self.version}")


@dataclass(kw_only=True)
class CountedTable:
    """What became of keys in a table of fixed size."""

    entity: Entity
    ids: Literal["hash", "managed"]
    rows: int
    evicted: int = 0
    """Number of keys that lost their slot to others."""
    refused: int = 0
    """Number of keys of the log without a slot, beside those."""
    shared: int = 0
    """Number of slots that several keys share."""
    keys: int = 0
    """Number of keys of a hashed table."""


@dataclass(kw_only=True)
class IdsRecord:
    """`preparation.ids`: what became of the log where ids are slots of a table of fixed size."""

    left_out: int = 0
    """Number of interactions that are left out, because their user or item has no slot."""
    forgotten: int = 0
    """Of an appended day: number of its users' earlier entries that are left out, because their item lost its slot."""
    tables: list[CountedTable] = field(default_factory=list)
