"""Options of event types, such as view, cart and buy: which are history, which are targets, which is asked for."""

from dataclasses import dataclass, field
from typing import Literal

from recgpt_torchrec.config.checks import split_words, within

WEIGHTS = 0.001, 1000.0
"""Smallest and largest weight of a target."""


@dataclass(kw_only=True)
class TargetEvents:
    """Event types as targets and in validation; a dataset has them with prepare --event_column."""

    targets: list[str] = field(default_factory=list)
    """Event types that are targets: TYPE or TYPE=WEIGHT, separated by commas or blanks, for example buy=5,cart. The
    weight, 0.001 to 1000, multiplies the loss, whose mean is over the weights. Events of other types are no targets,
    but stay in the histories. []: all types, with weight 1."""
    validate: str | None = None
    """Event type that is asked for in validation; then only users whose validation item is of this type are ranked.
    null: all users are ranked, and any type is asked for."""

    def __post_init__(self) -> None:
        self.targets = split_words(self.targets)
        words = [word for word, _ in map(parse_target, self.targets)]
        if repeated := [word for word in words if words.count(word) > 1]:
            raise ValueError(f"--events.targets names {repeated[0]!r} twice; give each event type once")


@dataclass(kw_only=True)
class Events(TargetEvents):
    """Event types in training; a dataset has them with prepare --event_column."""

    history: list[str] = field(default_factory=list)
    """Event types that histories hold, separated by commas or blanks; others are left out of the input, in training,
    evaluation and export alike. []: all types. What a user has seen is that of all types."""
    input: bool | Literal["auto"] = "auto"
    """Whether the type of each event is embedded at the decoder's input. auto: where the dataset has event types."""
    ask: bool | Literal["auto"] = "auto"
    """Whether the decoder is told the type of the next event, so that a type can be asked for in evaluate --event and
    export --event. auto: where the dataset has event types."""
    ask_dropout: float = 0.5
    """Probability that the type of the next event is hidden from a token in a training step, 0 to 1, so that any type
    can be asked for too, which is what evaluate and export do by default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.history = split_words(self.history)
        within("--events.ask_dropout", self.ask_dropout, 0, 1)
        outside = [word for word, _ in map(parse_target, self.targets) if self.history and word not in self.history]
        if outside:
            raise ValueError(
                f"--events.targets {outside[0]} is not among --events.history {','.join(self.history)}, and a target "
                "becomes history for what follows it; add it there"
            )


def parse_target(text: str) -> tuple[str, float]:
    """The event type and the weight of `TYPE` or `TYPE=WEIGHT`.

    Raises:
        ValueError: the weight is no number, or outside `WEIGHTS`.
    """
    word, equals, weight = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        number = float(weight)
    except ValueError:
        raise ValueError(
            f"--events.targets {text}: {weight!r} is no weight; write TYPE=WEIGHT, such as buy=5"
        ) from None
    within(f"--events.targets {word}: its weight", number, *WEIGHTS)
    return word, number
