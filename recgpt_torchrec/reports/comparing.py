"""Compares runs user by user: each with the first, on every split on which both have one evaluation to compare."""

from typing import Any

from recgpt_torchrec.errors import InputError
from recgpt_torchrec.evaluation.comparing.comparison import (
    Evaluation,
    compare,
    differing_neighbours,
    why_incomparable,
)
from recgpt_torchrec.evaluation.per_user.files import UserResults
from recgpt_torchrec.reports.evaluations import ahead_of
from recgpt_torchrec.reports.values import Comparison

Evaluations = dict[str, dict[str, Any]]
"""JSON of evaluations by their files."""


def compare_runs(names: list[str], evaluations: list[Evaluations]) -> list[Comparison]:
    """Comparisons of the runs after the first with the first; `evaluations` are those of each."""
    comparisons = []
    for name, of_run in zip(names[1:], evaluations[1:], strict=True):
        splits = sorted({values["split"] for values in of_run.values()} | _splits(evaluations[0]))
        for split in splits or ["test"]:
            comparisons.append(_compare(name, names[0], split, of_run, evaluations[0]))
    return comparisons


def _splits(evaluations: Evaluations) -> set[str]:
    return {values["split"] for values in evaluations.values()}


def _compare(name: str, reference: str, split: str, of_run: Evaluations, of_reference: Evaluations) -> Comparison:
    comparison = Comparison(run=name, reference=reference, split=split, differences=[])
    sides = [
        {file: values for file, values in each.items() if values["split"] == split} for each in (of_run, of_reference)
    ]
    for side, who in zip(sides, (name, reference), strict=True):
        if not side:
            comparison.reason = f"{who} has no evaluation on {split}"
            return comparison
    reasons = []
    for file, values in sides[0].items():
        for other, other_values in sides[1].items():
            try:
                results = [UserResults.of(each, of) for each, of in ((file, values), (other, other_values))]
                if any(each is None for each in results):
                    raise InputError("an evaluation has no results by user; evaluate again with --per_user true")
                if (reason := why_incomparable(values, other_values)) is not None:
                    raise InputError(reason)
                first, second = (
                    Evaluation(each, of, result)
                    for each, of, result in zip((file, other), (values, other_values), results, strict=True)
                    if result is not None
                )
                differences = compare(first, second)
            except InputError as error:
                reasons.append(str(error))
                continue
            comparison.note = differing_neighbours(values, other_values)
            comparison.differences = [ahead_of(each) for each in differences if each.interval.low or each.interval.high]
            return comparison
    comparison.reason = reasons[0]
    return comparison
