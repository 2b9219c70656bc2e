"""Compares recall paths user by user: a model with the baselines beside it, and one evaluation with another."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from recgpt_torchrec.errors import InputError
from recgpt_torchrec.evaluation.comparing.finding import read_evaluation_json
from recgpt_torchrec.evaluation.comparing.paired import Interval, PairCounts
from recgpt_torchrec.evaluation.comparing.records import BASELINES
from recgpt_torchrec.evaluation.per_user.files import Columns, UserResults, column_of
from recgpt_torchrec.texts.tables import table

ONE_STEP = {"pretrain", "fine_tuning", "recgpt_1"}
"""Paths of one step, each of another kind of model."""
TWO_STEPS = {"pretrain_two_step", "fine_tuning_two_step", "recgpt"}
PREFERRED_K = 10
SAME = ("item_id", "history_length")
"""What shared users must have in common."""


@dataclass(frozen=True)
class Difference:
    """By how much one path is ahead of another, over the same users."""

    path: str
    other: str
    metric: str
    """`NDCG@10`."""
    users: int
    value: float
    other_value: float
    interval: Interval

    @property
    def verdict(self) -> str:
        """In words, with the path as subject."""
        if not self.interval.beyond_chance:
            return "no difference beyond chance"
        return "ahead, beyond chance" if self.interval.mean > 0 else "behind, beyond chance"

    def sentence(self) -> str:
        """One line of text."""
        low, high = self.interval.low, self.interval.high
        sides = f"{self.metric} {self.value:.4f} against {self.other_value:.4f}"
        how = f"95% interval {low:+.4f} to {high:+.4f}, paired bootstrap over {self.users:,} users"
        if not self.interval.mean:
            return f"{self.path} is level with {self.other}: {sides} ({how}), {self.verdict}"
        word = "ahead of" if self.interval.mean > 0 else "behind"
        chance = "beyond chance" if self.interval.beyond_chance else "not beyond chance"
        return f"{self.path} is {word} {self.other} by {abs(self.interval.mean):.4f}, {chance}: {sides} ({how})"

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "difference": self.interval.mean,
            "low": self.interval.low,
            "high": self.interval.high,
            "beyond_chance": self.interval.beyond_chance,
            "users": self.users,
        }


def choose_k(ks: list[int]) -> int:
    """The list length that comparisons are made at: 10 where it was measured, else the longest."""
    return PREFERRED_K if PREFERRED_K in ks else max(ks)


def measured_ks(evaluation: dict[str, Any]) -> list[int]:
    """The list lengths of an evaluation."""
    figures = next(iter(evaluation["results"].values()))["masked"]
    return sorted(int(name.removeprefix("NDCG@")) for name in figures if name.startswith("NDCG@"))


def role_of(path: str) -> str:
    """What a path is, whatever kind of model it is of: paths with the same role are compared between evaluations.

    Example: `role_of("recgpt_1_interests_6_quota")` is `"one step_interests_6_quota"`
    """
    for role, names in (("two steps", TWO_STEPS), ("one step", ONE_STEP)):
        if path in names:
            return role
    for name in ONE_STEP:
        if path.startswith((f"{name}_interests_", f"{name}_neighbours")):
            return "one step" + path.removeprefix(name)
    return path


def compare_within(results: UserResults, pairs: list[tuple[str, str]], k: int, protocol: str) -> list[Difference]:
    """Differences in NDCG@k between paths of one evaluation.

    Raises:
        InputError: the results cannot be read.
    """
    paths = list(dict.fromkeys(path for pair in pairs for path in pair))
    counts = {pair: PairCounts(k) for pair in pairs}
    for columns in results.read([column_of(path, protocol) for path in paths]):
        for first, second in pairs:
            counts[first, second].add(columns[column_of(first, protocol)], columns[column_of(second, protocol)])
    return [_difference(*pair, counts[pair]) for pair in pairs]


def _difference(path: str, other: str, counts: PairCounts, metric: Any = "NDCG") -> Difference:
    return Difference(
        path,
        other,
        f"{metric}@{counts.k}",
        counts.users,
        counts.mean(metric, 0),
        counts.mean(metric, 1),
        counts.difference(metric),
    )


def against_baselines(results: UserResults, path: str, evaluation: dict[str, Any]) -> list[Difference]:
    """By how much a path is ahead of each baseline that was measured, masked."""
    names = [name for name in BASELINES if name in results.record.paths]
    return compare_within(results, [(path, name) for name in names], choose_k(measured_ks(evaluation)), "masked")


@dataclass(frozen=True)
class Evaluation:
    """An evaluation that can be compared with another: its JSON, and its results by user."""

    path: str
    values: dict[str, Any]
    results: UserResults

    @classmethod
    def open(cls, path: str) -> "Evaluation":
        """Open one that was made by this version, and check its results by user.

        Raises:
            InputError: it is none, or has no results by user.
        """
        values = read_evaluation_json(path)
        if values is None:
            raise InputError(f"{path} is not an evaluation; give a JSON file that evaluate wrote, or a run's folder")
        results = UserResults.of(path, values)
        if results is None:
            raise InputError(
                f"{path} has no results by user, which a comparison needs; evaluate its checkpoint again, with "
                f"--per_user true: --checkpoint {values.get('checkpoint')} --output {path} --overwrite true"
            )
        return cls(path, values, results)


def check_comparable(first: dict[str, Any], second: dict[str, Any], names: tuple[str, str]) -> None:
    """Check that two evaluations ranked the same held-out items, as far as their JSON tells.

    Args:
        first, second: JSON of the evaluations; of one that is yet to be made, the values that are known.
        names: of both, for the message.

    Raises:
        InputError: they are of other splits or vocabularies.
    """
    if (reason := why_incomparable(first, second)) is not None:
        raise InputError(f"{names[0]} and {names[1]} cannot be compared user by user: {reason}")


def why_incomparable(first: dict[str, Any], second: dict[str, Any]) -> str | None:
    """Why two evaluations have no users in common, by their JSON; None: they may have."""
    for name, words, default in (
        ("split", "the splits are", None),
        ("vocabulary", "the fingerprints of the users and items are", None),
        ("hold_out", "what was held out (prepare --hold_out) is", "last"),
    ):
        one, two = first.get(name, default), second.get(name, default)
        if one != two:
            return f"{words} {str(one)[:12]} and {str(two)[:12]}"
    return None


def differing_neighbours(first: dict[str, Any], second: dict[str, Any]) -> str | None:
    """How neighbours at recall differ between two evaluations that both have them, in a sentence; None: they do not."""
    one, two = first.get("neighbours"), second.get("neighbours")
    if not isinstance(one, dict) or not isinstance(two, dict) or one == two:
        return None
    differing = [
        f"{name} {str(one.get(name))[:12]} and {str(two.get(name))[:12]}"
        for name in {**one, **two}
        if one.get(name) != two.get(name)
    ]
    return f"The paths with neighbours differ by more than the model, in how these take part: {', '.join(differing)}"


def shared_paths(first: UserResults, second: UserResults) -> list[tuple[str, str]]:
    """Pairs of paths with the same role, in the order of the first."""
    by_role = {role_of(path): path for path in second.record.paths}
    return [(path, by_role[role]) for path in first.record.paths if (role := role_of(path)) in by_role]


def compare(
    first: Evaluation, second: Evaluation, protocol: str = "masked", pairs: list[tuple[str, str]] | None = None
) -> list[Difference]:
    """Paired differences, first minus second, over the shared users: NDCG@k and HR@k of each pair of paths.

    Args:
        first, second: the evaluations; they may be the same.
        protocol: `masked` or `unmasked`.
        pairs: a path of the first and one of the second; None: all paths with the same role in both.

    Raises:
        InputError: they cannot be compared, or share no user.
    """
    names = (first.path, second.path)
    check_comparable(first.values, second.values, names)
    pairs = shared_paths(first.results, second.results) if pairs is None else pairs
    k = choose_k(sorted({*measured_ks(first.values)} & {*measured_ks(second.values)}) or [0])
    if not k:
        raise InputError(f"{names[0]} and {names[1]} have no list length in common; evaluate both with the same --ks")
    counts = {pair: PairCounts(k) for pair in pairs}
    shared = differing = 0
    for one, two in shared_users(
        first.results.read([*SAME, *dict.fromkeys(column_of(path, protocol) for path, _ in pairs)]),
        second.results.read([*SAME, *dict.fromkeys(column_of(path, protocol) for _, path in pairs)]),
    ):
        shared += one["user_id"].size
        differing += int(np.any([one[name] != two[name] for name in SAME], axis=0).sum())
        for a, b in pairs:
            counts[a, b].add(one[column_of(a, protocol)], two[column_of(b, protocol)])
    if differing:
        raise InputError(
            f"{names[0]} and {names[1]} cannot be compared user by user: {differing:,} of {shared:,} shared users have "
            "another held-out item or history. Evaluate both on the same interactions"
        )
    if not shared or not pairs:
        raise InputError(f"{names[0]} and {names[1]} share no {'user' if pairs else 'recall path'}; nothing to compare")
    return [_difference(*pair, counts[pair], metric) for pair in pairs for metric in ("NDCG", "HR")]


def shared_users(first: Iterator[Columns], second: Iterator[Columns]) -> Iterator[tuple[Columns, Columns]]:
    """Join two streams of columns in order of `user_id`: yields those of the users in both, row by row the same."""
    one, two = next(first, None), next(second, None)
    while one is not None and two is not None:
        _, at, of = np.intersect1d(one["user_id"], two["user_id"], assume_unique=True, return_indices=True)
        if at.size:
            yield _take(one, at), _take(two, of)
        last = min(one["user_id"][-1], two["user_id"][-1])
        one, two = (
            next(stream, None) if left["user_id"][-1] == last else _take(left, left["user_id"] > last)
            for left, stream in ((one, first), (two, second))
        )


def _take(columns: Columns, rows: Any) -> Columns:
    return {name: values[rows] for name, values in columns.items()}


def comparison_text(differences: list[Difference], other: str, protocol: str = "masked") -> str:
    """Differences with another evaluation as a table of text; baselines that are equal have one line."""
    lines = [f"\nAgainst {other}, {protocol}, {differences[0].users:,} shared users, 95% intervals by paired bootstrap"]
    rows = [["", "metric", "this", "other", "difference", "interval"]]
    equal = [each.path for each in differences if each.path in BASELINES and each.interval == Interval(0, 0, 0)]
    for each in differences:
        if each.path in equal:
            continue
        name = each.path if each.path == each.other else f"{each.path} against {each.other}"
        bounds = f"{each.interval.low:+.4f} to {each.interval.high:+.4f}"
        figures = f"{each.value:.4f}", f"{each.other_value:.4f}", f"{each.interval.mean:+.4f}"
        rows.append([name, each.metric, *figures, f"{bounds}  {each.verdict}"])
    lines.append(table(rows, right=(1, 2, 3, 4)))
    if equal:
        lines.append(f"{' and '.join(dict.fromkeys(equal))}: equal")
    return "\n".join(lines) + "\n"
