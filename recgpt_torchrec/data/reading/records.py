"""What a dataset's manifest records of how it was made: `settings` and `preparation`, as they are read back."""

from dataclasses import dataclass, field
from typing import Any

from recgpt_torchrec.data.ids.records import IdsRecord
from recgpt_torchrec.storage.typed import make_typed


@dataclass(kw_only=True)
class PromptsRecord:
    """`settings.prompts`: how the prompts of a prompt dataset were made."""

    dataset: str = ""
    answers: int = 0
    k: int = 0


@dataclass(kw_only=True)
class ExtendsRecord:
    """`preparation.extends`: the dataset that this one extends, and what is new."""

    dataset: str = ""
    vocabulary: str = ""
    histories: str = ""
    users: int = 0
    items: int = 0
    absent_users: int = 0
    absent_items: int = 0
    new_targets: int = 0


@dataclass(kw_only=True)
class SplitRecord:
    """`preparation.split`: what is held out."""

    interactions: dict[str, int]
    """Number of interactions of the training, validation and test part."""
    validation_users: int
    test_users: int
    unused: int
    training_targets: int
    items_without_target: int


@dataclass(kw_only=True)
class EventsRecord:
    """`preparation.events`: the types of the log's usable rows."""

    rows: dict[str, int] = field(default_factory=dict)
    """Number of rows by event type."""
    unknown: int = 0
    """Number of rows without one."""


@dataclass(kw_only=True)
class PreparationRecord:
    """`preparation`: what `prepare` read and dropped."""

    inputs: list[dict[str, Any]] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    rows: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    duplicates_dropped: int = 0
    rounds: list[dict[str, int]] = field(default_factory=list)
    lengths: dict[str, float] = field(default_factory=dict)
    split: SplitRecord | None = None
    page: list[list[str]] = field(default_factory=list)
    filtered: int = 0
    uncomputed: int = 0
    repeats_collapsed: int = 0
    unknown_left_out: int = 0
    exposed: dict[str, int] = field(default_factory=dict)
    events: EventsRecord = field(default_factory=EventsRecord)
    extends: ExtendsRecord = field(default_factory=ExtendsRecord)
    ids: IdsRecord = field(default_factory=IdsRecord)


def check_records(settings: dict[str, Any], preparation: dict[str, Any]) -> None:
    """Check the types of what is recorded; what nothing reads may be anything.

    Raises:
        ValueError: names the first that differs.
    """
    if (prompts := settings.get("prompts")) is not None:
        make_typed(PromptsRecord, prompts, "settings.prompts.", others=True)
    make_typed(PreparationRecord, preparation, "preparation.", others=True)
    for name in ("inputs", "tables"):
        if any(type(each.get("path")) is not str for each in preparation.get(name, [])):
            raise ValueError(f"preparation.{name} has an input without a path")
