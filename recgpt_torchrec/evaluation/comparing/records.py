"""The contents of an evaluation's JSON, checked before anything uses them."""

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from recgpt_torchrec.config.metric import FIGURE
from recgpt_torchrec.evaluation.per_user.files import PerUser
from recgpt_torchrec.storage.typed import check_counts, make_typed

PATH = re.compile(r"[a-z][a-z0-9_]{0,80}")
PROTOCOLS = ("masked", "unmasked")
BASELINES = ("popularity", "cooccurrence")
"""Recall paths that need no training."""


@dataclass(kw_only=True)
class ListQualityRecord:
    """Coverage and novelty of a path's lists."""

    coverage: float
    novelty: float


@dataclass(kw_only=True)
class ListsRecord:
    """What is recorded of the sample of lists."""

    users: int
    k: int
    paths: dict[str, ListQualityRecord]


@dataclass(kw_only=True)
class ExampleRecord:
    """A user of the sample, with ids."""

    user: int
    history: list[int]
    held_out: int
    lists: dict[str, list[int]]
    segments: list[int] | None = None


@dataclass(kw_only=True)
class GroupLine:
    """A group of users; its figures are beside these."""

    users: int
    to: int | None = None


@dataclass(kw_only=True)
class SampleRecord:
    """The sample of users that was ranked."""

    users: int
    seed: int


@dataclass(kw_only=True)
class EvaluationRecord:
    """What reports and comparisons read of an evaluation."""

    dataset: str
    checkpoint: str
    split: Literal["validation", "test"]
    users: int
    results: dict[str, dict[str, dict[str, float]]]
    groups: dict[str, dict[str, dict[str, list[dict[str, Any]]]]] = field(default_factory=dict)
    lists: ListsRecord | None = None
    examples: list[ExampleRecord] = field(default_factory=list)
    per_user: PerUser | None = None
    vocabulary: str | None = None
    hold_out: str = "last"
    sample: SampleRecord | None = None
    of_users: int | None = None
    event: str | None = None
    request_time: list[str] = field(default_factory=list)
    without_prompts: bool = False


def check_evaluation(values: dict[str, Any]) -> None:
    """Check the values of an evaluation's JSON.

    Raises:
        ValueError: they are none that `evaluate` writes; names the first that is wrong.
    """
    record = make_typed(EvaluationRecord, values, others=True)
    check_counts({"users": record.users})
    if not record.results:
        raise ValueError("its results are empty")
    names = None
    for path, protocols in record.results.items():
        if not PATH.fullmatch(path) or set(protocols) != {*PROTOCOLS}:
            raise ValueError(f"its results of {path[:60]!r} are not masked and unmasked figures of a recall path")
        for how, figures in protocols.items():
            names = names or list(figures)
            if list(figures) != names or not names or not all(FIGURE.fullmatch(name) for name in names):
                raise ValueError(f"the {how} results of {path} are not HR@k and NDCG@k, the same for all paths")
            if not all(math.isfinite(value) for value in figures.values()):
                raise ValueError(f"the {how} results of {path} hold a number that is not finite")
    if not any(name.startswith("NDCG@") for name in names or []) or set(record.results) <= {*BASELINES}:
        raise ValueError("its results lack NDCG or a recall path of the model")
    if record.per_user is not None and set(record.per_user.paths) != set(record.results):
        raise ValueError("its results by user are of other paths than its results")
    _check_groups(record)
    for example in record.examples:
        ids = [example.user, example.held_out, *example.history, *(i for each in example.lists.values() for i in each)]
        check_counts({"an id of the examples": max(ids), "the smallest of them": min(ids)})
        if example.segments is not None and len(example.segments) != len(example.history):
            raise ValueError("an example has another number of segments than entries")
    if record.lists is not None:
        if not all(math.isfinite(v) for each in record.lists.paths.values() for v in (each.coverage, each.novelty)):
            raise ValueError("coverage or novelty is not finite")


def _check_groups(record: EvaluationRecord) -> None:
    """Raise a `ValueError` unless all paths have the same groups."""
    expected: dict[str, list[Any]] = {}
    for path, protocols in record.groups.items():
        if path not in record.results or set(protocols) != {*PROTOCOLS}:
            raise ValueError(f"it has groups of {path[:60]!r}, which its results lack")
        for how, by_name in protocols.items():
            for name, lines in by_name.items():
                bounds = []
                for line in lines:
                    group = make_typed(GroupLine, line, "groups.", others=True)
                    first = line.get("from")
                    if not isinstance(first, int) or isinstance(first, bool):
                        raise ValueError(f"a group of {path} begins at {first!r:.60}")
                    figures = [value for key, value in line.items() if FIGURE.fullmatch(key)]
                    if not all(isinstance(value, int | float) and math.isfinite(value) for value in figures):
                        raise ValueError(f"a group of {path} has a figure that is no number")
                    bounds.append((first, group.to, group.users))
                if bounds != expected.setdefault(name, bounds):
                    raise ValueError(f"the groups {name[:60]} of {path} ({how}) are others than those of another path")
            if set(by_name) != {"by_popularity", "by_length"}:
                raise ValueError(f"the groups of {path} are not by_popularity and by_length")
