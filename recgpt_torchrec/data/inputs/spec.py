"""What a model reads beside the ids of users and items. Needs neither torch nor Arrow.

Attributes belong to an entity, a user or an item: each is a table, pooled into the entity's vector. Features belong to
a token of a history: each is an embedding added to the decoder's input.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from recgpt_torchrec.config.inputs.time import MAX_OFFSET
from recgpt_torchrec.data.segments import PLAIN_SEGMENTS

Entity = Literal["user", "item"]
EVENTS = ("event", "asked_event")
"""Features that read events."""
TIMES = ("past_gap", "next_gap", "hour", "weekday")
"""Features that read timestamps."""
PLACES = ("place",)
"""Features that read places in a list."""
ENTRY_COLUMNS = {"times": "timestamps", "events": "event_ids", "places": "places"}
"""Columns of a dataset's sequences that features read, by their name in `Histories`."""
UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9, "min": 60.0, "day": 86400.0}
"""Seconds of each unit that times may have."""


def check_unit(name: str, seconds: float) -> None:
    """Raise a `ValueError` if no unit of time has so many seconds; `name` is that of the value."""
    if seconds not in UNITS.values():
        raise ValueError(f"{name} is {seconds}; it must be one of {', '.join(f'{unit:g}' for unit in UNITS.values())}")


def column_of(name: str) -> str:
    """The column of users/ or items/ with the value ids of an attribute."""
    return f"attribute_{name}"


def table_of_attribute(entity: str, name: str) -> str:
    """Name of the model's table of an attribute; no dot, which parts the names of parameters."""
    return f"{entity}-" + "".join(letter if letter.isalnum() else "_" for letter in name)


def full_name_of(entity: str, name: str) -> str:
    """How options and messages name an attribute: `item.category`."""
    return f"{entity}.{name}"


@dataclass(kw_only=True)
class Attribute:
    """An attribute that a model reads: one of its tables."""

    entity: Entity
    name: str
    values: int
    """Rows of its table."""
    fingerprint: str
    """Of the vocabulary of its values."""
    weight: float = 1.0
    """Factor of its vector in the sum with those of the id and of the other attributes."""
    pooling: Literal["mean", "sum"] = "mean"
    """How the vectors of several values become one."""

    @property
    def table(self) -> str:
        """Name of its table."""
        return table_of_attribute(self.entity, self.name)

    @property
    def column(self) -> str:
        """The column of users/ or items/ with the value ids."""
        return column_of(self.name)

    @property
    def full_name(self) -> str:
        """How options and messages name it."""
        return full_name_of(self.entity, self.name)


@dataclass(kw_only=True)
class Feature:
    """A feature of tokens that a model reads, by its name in `features.FEATURES`."""

    name: str
    values: int
    """Number of its values, from 0 on; 0 means that it is unknown."""


@dataclass(kw_only=True)
class Inputs:
    """What a model reads beside ids. A checkpoint records it."""

    attributes: list[Attribute] = field(default_factory=list)
    id_dropout: float = 0.0
    """Probability that an item's own vector is left out in a training step, so that its attributes stand alone."""
    features: list[Feature] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    """Words of the event types, where they are read; the n-th has the id n + 1."""
    history_events: list[str] = field(default_factory=list)
    """The event types that histories hold; empty: all, unknown ones too."""
    ask_dropout: float = 0.0
    """Probability that the event type asked for is hidden from a token in a training step."""
    time_unit: float = 1.0
    """Seconds of a unit of the timestamps, where features read them."""
    segments: int = PLAIN_SEGMENTS
    """Number of segment ids that it tells apart, where it reads prompts."""
    feedback: bool = False
    """Whether feedback among the prompts enters the model apart from what was chosen, see `model.decoder.Refused`."""
    utc_offset_hours: float = 0.0
    """Added to UTC for features hour and weekday."""

    def __post_init__(self) -> None:
        check_unit("inputs.time_unit", self.time_unit)
        if not abs(self.utc_offset_hours) <= MAX_OFFSET:
            raise ValueError(
                f"inputs.utc_offset_hours is {self.utc_offset_hours}; it must be -{MAX_OFFSET} to {MAX_OFFSET}"
            )

    def of_entity(self, entity: Entity) -> list[Attribute]:
        """The attributes of users or of items."""
        return [each for each in self.attributes if each.entity == entity]

    def reads(self, *names: str) -> bool:
        """Whether one of these features is read."""
        return any(each.name in names for each in self.features)

    @property
    def columns(self) -> list[str]:
        """The columns of `Histories` that features read."""
        read = {"times": TIMES, "events": EVENTS, "places": PLACES}
        return [name for name, features in read.items() if self.reads(*features)]

    @property
    def of_request_time(self) -> list[str]:
        """The features that tell the model when it is asked."""
        return [each.name for each in self.features if each.name in TIMES and each.name != "past_gap"]

    @property
    def reads_events(self) -> bool:
        """Whether event types are read at all."""
        return self.reads(*EVENTS) or bool(self.history_events)

    def id_of_event(self, word: str) -> int:
        """Id of an event type; ValueError if there is none of this name."""
        return self.events.index(word) + 1

    def to_json(self) -> dict[str, Any]:
        """What differs from a model that reads ids alone."""
        plain = asdict(Inputs())
        return {name: value for name, value in asdict(self).items() if value != plain[name]}
