"""What a report shows of an evaluation: the figures that `evaluate` wrote, with intervals from its results by user."""

from typing import Any

import numpy as np

from recgpt_torchrec.evaluation.comparing.comparison import (
    Difference,
    against_baselines,
    choose_k,
    measured_ks,
)
from recgpt_torchrec.evaluation.comparing.paired import Interval, RankCounts
from recgpt_torchrec.evaluation.comparing.records import BASELINES, PROTOCOLS
from recgpt_torchrec.evaluation.per_user.files import UserResults, column_of
from recgpt_torchrec.reports.values import Ahead, Estimate, EvaluationValues, Group, PathFigures

DAYS = ((1, "up to a day"), (7, "1 to 7 days"), (30, "7 to 30 days"), (180, "30 to 180 days"), (None, "over 180 days"))
"""Upper bounds of the groups by item age in days, where the unit of time is known; None: no limit."""
QUARTERS = 4
"""Number of groups by item age where it is not known, with about equal numbers of users."""
BY_LENGTH = "items in the history"
BY_POPULARITY = "training interactions of the held-out item"
BY_AGE = "age of the held-out item"
SECONDS_PER_DAY = 86_400


def read_evaluation(file: str, values: dict[str, Any]) -> EvaluationValues:
    """Make the values of an evaluation that was read from `file`; examples are left empty.

    Raises:
        InputError: its results by user are damaged.
    """
    results = UserResults.of(file, values)
    measured = values["results"]
    k = choose_k(measured_ks(values))
    main = next(name for name in measured if name not in BASELINES)
    intervals = {} if results is None else _intervals(results, measured_ks(values))
    lists = values.get("lists", {})
    return EvaluationValues(
        file=file,
        split=values["split"],
        dataset=str(values["dataset"]),
        checkpoint=str(values["checkpoint"]),
        users=int(values["users"]),
        metric=f"NDCG@{k}",
        main=main,
        notes=_notes(values, results is not None),
        paths=[_path_figures(path, figures, intervals, lists) for path, figures in measured.items()],
        ahead=[] if results is None else [ahead_of(each) for each in against_baselines(results, main, values)],
        groups=_groups(values, results, k),
        list_users=int(lists.get("users", 0)),
        list_length=int(lists.get("k", 0)),
        examples=[],
    )


def ahead_of(difference: Difference) -> Ahead:
    """A difference as the report shows it."""
    return Ahead(
        path=difference.path,
        other=difference.other,
        metric=difference.metric,
        users=difference.users,
        value=difference.value,
        other_value=difference.other_value,
        difference=_estimate(difference.interval),
        beyond_chance=difference.interval.beyond_chance,
    )


def _estimate(interval: Interval) -> Estimate:
    return Estimate(value=interval.mean, low=interval.low, high=interval.high)


def _notes(values: dict[str, Any], has_users: bool) -> list[str]:
    notes = []
    if sample := values.get("sample"):
        of = values.get("of_users")
        notes.append(f"A sample of {sample['users']:,} users" + ("" if of is None else f" of {of:,}") + ".")
    if event := values.get("event"):
        notes.append(f"Only users whose held-out item is of the event type {event}.")
    if told := values.get("request_time"):
        notes.append(f"The model is told the time of each request ({', '.join(told)}).")
    if values.get("without_prompts"):
        notes.append("The model was tuned on prompts, and is measured here on a dataset without them.")
    if not has_users:
        notes.append("Without results by user, so without intervals: evaluate again with --per_user true to have them.")
    return notes


def _intervals(results: UserResults, ks: list[int]) -> dict[tuple[str, str, int], RankCounts]:
    """Users by rank, by column and list length, for intervals."""
    columns = [column_of(path, how) for path in results.record.paths for how in PROTOCOLS]
    counts = {(name, k): RankCounts(k) for name in columns for k in ks}
    for batch in results.read(columns):
        for (name, _), each in counts.items():
            each.add(batch[name])
    paths = [(path, how) for path in results.record.paths for how in PROTOCOLS]
    return {(path, how, k): counts[column_of(path, how), k] for path, how in paths for k in ks}


def _path_figures(
    path: str,
    figures: dict[str, dict[str, float]],
    counts: dict[tuple[str, str, int], RankCounts],
    lists: dict[str, Any],
) -> PathFigures:
    """The figures of `evaluate` as they are, with intervals around them."""

    def estimates(how: str) -> dict[str, Estimate]:
        told = {}
        for name, value in figures[how].items():
            metric, k = name.split("@")
            told[name] = Estimate(value=value)
            if (users := counts.get((path, how, int(k)))) is not None:
                interval = users.interval("HR" if metric == "HR" else "NDCG")
                told[name] = Estimate(value=value, low=interval.low, high=interval.high)
        return told

    quality = lists.get("paths", {}).get(path, {})
    return PathFigures(
        path=path,
        is_baseline=path in BASELINES,
        masked=estimates("masked"),
        unmasked=estimates("unmasked"),
        coverage=quality.get("coverage"),
        novelty=quality.get("novelty"),
    )


def _groups(values: dict[str, Any], results: UserResults | None, k: int) -> dict[str, list[Group]]:
    """Users in groups: those of `evaluate` by length and popularity, and by item age from the results by user."""
    groups: dict[str, list[Group]] = {}
    for name, words in (("by_length", BY_LENGTH), ("by_popularity", BY_POPULARITY)):
        by_path = {path: of["masked"][name] for path, of in values.get("groups", {}).items()}
        rows: list[dict[str, Any]] = next(iter(by_path.values()), [])
        groups[words] = [
            Group(
                label=_bounds(row["from"], row["to"]),
                users=row["users"],
                figures={
                    path: Estimate(value=lines[number][f"NDCG@{k}"])
                    for path, lines in by_path.items()
                    if f"NDCG@{k}" in lines[number]
                },
            )
            for number, row in enumerate(rows)
        ]
    # From few to many, as the others.
    groups[BY_POPULARITY] = groups[BY_POPULARITY][::-1]
    if results is not None and results.record.has_age:
        groups[BY_AGE] = _by_age(results, k)
    return {words: rows for words, rows in groups.items() if rows}


def _bounds(low: int, high: int | None) -> str:
    if high is None:
        return f"{low:,} or more"
    if high == 0:
        return "never trained"
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _by_age(results: UserResults, k: int) -> list[Group]:
    """Users by the age of their held-out item."""
    labels, limits = _age_limits(results)
    columns = {path: column_of(path, "masked") for path in results.record.paths}
    counts = [{path: RankCounts(k) for path in columns} for _ in labels]
    for batch in results.read(["item_age", *columns.values()]):
        group = np.searchsorted(limits, batch["item_age"], side="left")
        for number in np.unique(group).tolist():
            for path, column in columns.items():
                counts[number][path].add(batch[column][group == number])
    groups = []
    for label, by_path in zip(labels, counts, strict=True):
        users = next(iter(by_path.values())).users
        if users:
            figures = {path: _estimate(each.interval("NDCG")) for path, each in by_path.items()}
            groups.append(Group(label=label, users=users, figures=figures))
    return groups


def _age_limits(results: UserResults) -> tuple[list[str], list[float]]:
    """Labels of the groups by age, and the largest age of each but the last, in the unit of the column."""
    unit = results.record.age_unit
    if unit is not None:
        return [label for _, label in DAYS], [day * SECONDS_PER_DAY / unit for day, _ in DAYS if day is not None]
    low, high = np.inf, -np.inf
    for batch in results.read(["item_age"]):
        low, high = min(low, batch["item_age"].min()), max(high, batch["item_age"].max())
    # Of a histogram, so that no age is held per user.
    edges = np.linspace(low, high, 4097)
    counts = np.zeros(4096, np.int64)
    for batch in results.read(["item_age"]):
        counts += np.histogram(batch["item_age"], edges)[0]
    reached = np.searchsorted(np.cumsum(counts), counts.sum() * np.arange(1, QUARTERS) / QUARTERS)
    limits = np.unique(edges[1:][reached])
    names = [f"up to {limit:,.0f}" for limit in limits] + [f"over {limits[-1]:,.0f}"]
    return names, limits.tolist()
