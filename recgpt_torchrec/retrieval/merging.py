"""Merges the lists of several interests into one (paper, section 4.4): by quotas (m_n for two interests) or by score.

Every item comes once. Knows nothing of models, indexes or files.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Lists(NamedTuple):
    """The items that each interest recalled, best first; no item twice in one list."""

    items: Tensor
    """[users, interests, n] int64; -1 fills up short lists."""
    scores: Tensor
    """[users, interests, n] float32; -inf beside -1."""


class Merged(NamedTuple):
    """One list per user, every item once."""

    items: Tensor
    """[users, n] int64; -1 at the end where the lists ran out."""
    scores: Tensor
    """[users, n] float32: the score under the interest that contributed the item; -inf beside -1."""
    interests: Tensor
    """[users, n] int64: that interest, from 0; -1 beside -1."""


class MergeRule(ABC):
    """A rule that merges the lists of several interests. A new rule is a class here and a value of `--merge`."""

    interests: int | None = None
    """Number of interests that it merges; None: any number."""

    @abstractmethod
    def merge(self, lists: Lists, length: int) -> Merged:
        """One list of `length` per user."""

    @abstractmethod
    def describe(self, interests: int, length: int) -> str:
        """Describe the origin of a list of `length` in words."""


class Quota(MergeRule):
    """An equal number of new items from each interest, list after list."""

    def merge(self, lists: Lists, length: int) -> Merged:
        """See `MergeRule`."""
        return merge_quota(lists, even_quotas(length, lists.items.shape[1]))

    def describe(self, interests: int, length: int) -> str:
        """See `MergeRule`."""
        return f"equal shares of {interests} interests"


class Score(MergeRule):
    """The items that are likeliest under any interest."""

    def merge(self, lists: Lists, length: int) -> Merged:
        """See `MergeRule`."""
        return merge_by_score(lists, length)

    def describe(self, interests: int, length: int) -> str:
        """See `MergeRule`."""
        return f"likeliest items of {interests} interests"


@dataclass
class TwoStep(MergeRule):
    """`m` items of the first interest, then new items of the second (m_n in the paper)."""

    m: int
    """0: nine tenths of the list."""

    interests = 2

    def merge(self, lists: Lists, length: int) -> Merged:
        """See `MergeRule`."""
        m = self.first_quota(length)
        return merge_quota(lists, (m, length - m))

    def describe(self, interests: int, length: int) -> str:
        """See `MergeRule`."""
        m = self.first_quota(length)
        return f"{m} items of the first interest and {length - m} of the second"

    def first_quota(self, length: int) -> int:
        """Number of items of the first interest in a list of `length`."""
        return self.m or max(1, round(0.9 * length))


SEVERAL: dict[str, MergeRule] = {"quota": Quota(), "score": Score()}
"""Rules for any number of interests, by the value of `--merge`."""


def merge_rule(name: str, m: int = 0) -> MergeRule:
    """The rule that `--merge` names; for two_step, `m` is the number of items of the first interest."""
    return TwoStep(m) if name == "two_step" else SEVERAL[name]


def even_quotas(length: int, interests: int) -> list[int]:
    """Split `length` evenly among interests; the first ones get the remainder: 10 among 4 is 3, 3, 2, 2."""
    return [length // interests + (i < length % interests) for i in range(interests)]


def merge_quota(lists: Lists, quotas: Sequence[int]) -> Merged:
    """Take the first `quotas[i]` items of list i that no earlier list contributed (the paper's m_n for two lists).

    Where a list runs out before its quota is filled, the likeliest items left in any list fill the end. Lists as long
    as the merged one run out only when no items are left.

    Args:
        lists: at least as many interests as quotas; further ones only fill the end.
        quotas: number of items from each list; their sum is the merged length.

    Example: the lists 3 1 2 and 3 2 4 under the quotas 2 and 1 make 3 1 2.
    """
    users, _, depth = lists.items.shape
    places = lists.items.new_zeros(users, 0)
    merged = lists.items.new_zeros(users, 0)
    for i, quota in enumerate(quotas):
        items = lists.items[:, i]
        new = ~_mark_repeats(torch.cat([merged, items], dim=1))[:, merged.shape[1] :] & (items >= 0)
        list_places = torch.arange(i * depth, (i + 1) * depth, device=items.device).expand(users, depth)
        places = torch.cat([places, _pick_first(list_places, new, quota)], dim=1)
        merged = _gather_at(lists.items, places, -1)
    return _pick_distinct(lists, torch.cat([places, _order_by_share(lists)], dim=1), sum(quotas))


def merge_by_score(lists: Lists, length: int) -> Merged:
    """Take the `length` items that are likeliest in any list, each from the interest under which it is likeliest.

    Scores of different interests are not comparable: after generated entries all scores are higher. So each list's
    scores are compared as logits: by the share exp(score) / sum of exp(scores) in their own list. (On validation, with
    half of Beauty's users, lists of ten merged from 2 and 6 lists of 50 held the next item for 12.0% and 11.3% of
    users; with raw scores for 11.6% and 10.1%; with one interest for 11.8%.)

    Example: the lists 3 1 (scores 9, 7) and 1 2 (15, 10) make 1 3 2 (shares .99 of the second, .88 of the first, ...).
    """
    return _pick_distinct(lists, _order_by_share(lists), length)


def _order_by_share(lists: Lists) -> Tensor:
    """[users, interests * n] all places, by descending share in their list."""
    shares = lists.scores.log_softmax(dim=2).nan_to_num(nan=-torch.inf, neginf=-torch.inf)  # NaN: an empty list
    return shares.flatten(1).argsort(dim=1, descending=True, stable=True)


def _pick_distinct(lists: Lists, places: Tensor, length: int) -> Merged:
    """Take the first `length` distinct items of each row, in the order of `places` (-1: none)."""
    items = _gather_at(lists.items, places, -1)
    chosen = _pick_first(places, (items >= 0) & ~_mark_repeats(items), length)
    interests = torch.where(chosen >= 0, chosen // max(1, lists.items.shape[2]), -1)
    return Merged(_gather_at(lists.items, chosen, -1), _gather_at(lists.scores, chosen, -torch.inf), interests)


def _gather_at(values: Tensor, places: Tensor, missing: float) -> Tensor:
    """[users, n] `values` [users, interests, n] at flat places [users, n]; `missing` at place -1."""
    return values.flatten(1).gather(1, places.clamp(min=0)).masked_fill(places < 0, missing)


def _mark_repeats(items: Tensor) -> Tensor:
    """[rows, n] bool: whether the same value occurs earlier in the row."""
    order = items.argsort(dim=1, stable=True)
    ordered = items.gather(1, order)
    same = torch.zeros_like(items, dtype=torch.bool)
    same[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return torch.zeros_like(same).scatter(1, order, same)


def _pick_first(values: Tensor, wanted: Tensor, count: int) -> Tensor:
    """[rows, count] the first wanted values of each row, in order, filled up with -1."""
    place = torch.where(wanted, wanted.cumsum(1) - 1, count)
    out = values.new_full((values.shape[0], count + 1), -1)
    out.scatter_(1, place.clamp(max=count), values)
    return out[:, :count]
