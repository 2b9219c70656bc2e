"""Everything that a report shows, as plain values: what the page draws, and the JSON in it for other programs."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

Points = list[tuple[float, float]]
"""Pairs of x and y."""


@dataclass(kw_only=True)
class Estimate:
    """A figure over users with its 95% bootstrap interval; without one where the results by user are missing."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(kw_only=True)
class Ahead:
    """By how much one path is ahead of another over the same users, with the 95% interval of the difference."""

    path: str
    other: str
    metric: str
    users: int
    value: float
    other_value: float
    difference: Estimate
    beyond_chance: bool


@dataclass(kw_only=True)
class PathFigures:
    """The figures of a recall path or a baseline, as `evaluate` wrote them."""

    path: str
    is_baseline: bool
    masked: dict[str, Estimate]
    """By name, such as NDCG@10."""
    unmasked: dict[str, Estimate]
    coverage: float | None = None
    """Share of the catalogue's items in the lists of the sample."""
    novelty: float | None = None
    """Bits, see `evaluation.list_sample`."""


@dataclass(kw_only=True)
class Group:
    """Users of an evaluation that have something in common."""

    label: str
    users: int
    figures: dict[str, Estimate]
    """The masked metric by path; a path without users here is left out."""


@dataclass(kw_only=True)
class Item:
    """An item in an example, by its key and, where there is one, its name."""

    key: str
    name: str | None = None
    prompt: str | None = None
    """What put it into the history, if no interaction did: generated, shown, ..."""


@dataclass(kw_only=True)
class Example:
    """A user's history, the held-out item, and lists by path."""

    user: str
    history: list[Item]
    held_out: Item
    lists: dict[str, list[Item]]


@dataclass(kw_only=True)
class EvaluationValues:
    """One evaluation of a run."""

    file: str
    split: str
    dataset: str
    checkpoint: str
    users: int
    metric: str
    """The metric that charts show, such as NDCG@10."""
    main: str
    """The model's path of one step."""
    notes: list[str]
    """What a reader must know: a sample, an event type, a model measured without its prompts."""
    paths: list[PathFigures]
    ahead: list[Ahead]
    groups: dict[str, list[Group]]
    """By what users are grouped by, in words."""
    list_users: int
    """Number of users whose lists coverage and novelty are of; 0: they were not measured."""
    list_length: int
    examples: list[Example]


@dataclass(kw_only=True)
class TableValues:
    """Where a table of the model is."""

    table: str
    rows: int
    dim: int
    dtype: str
    sharding: str
    kernel: str
    ranks: int
    bytes_per_rank: int


@dataclass(kw_only=True)
class RunValues:
    """One run."""

    name: str
    """Short, unique in the report."""
    folder: str
    kind: str
    """In words: pre-training, prompt-tuning."""
    state: str
    """In words."""
    finished: bool
    facts: list[tuple[str, str]]
    """What was run on what: label and value."""
    options: list[tuple[str, str, bool]]
    """All options: dotted name, value, and whether it is not the default."""
    epochs: list[dict[str, Any]]
    """The lines of history.jsonl."""
    steps: dict[str, Points]
    """Curves by step: loss, lr_share, data_wait, targets_per_s; empty where the event files cannot be read."""
    tables: list[TableValues]
    evaluations: list[EvaluationValues]
    notes: list[str]
    """What could not be read."""


@dataclass(kw_only=True)
class Comparison:
    """A run compared with the first one, user by user."""

    run: str
    reference: str
    split: str
    differences: list[Ahead]
    reason: str | None = None
    """Why there are no differences."""
    note: str | None = None
    """What the differences are of beside the models."""


@dataclass(kw_only=True)
class ReportValues:
    """A report."""

    runs: list[RunValues]
    comparisons: list[Comparison]
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As JSON values; a number that is not finite is null, as JSON has none."""
        finite: dict[str, Any] = _finite(asdict(self))
        return finite


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value
