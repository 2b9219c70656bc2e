"""Merging the lists of several interests into one (paper, section 4.4): under quotas (m_n is the case of two), or by
score; every item once. Knows nothing of models, indexes or files.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Lists(NamedTuple):
    """What each interest of each user found, best first; no item twice in one list."""

    items: Tensor
    """[users, interests, n] int64; -1 fills up short lists."""
    scores: Tensor
    """[users, interests, n] float32; -inf beside -1."""


class Merged(NamedTuple):
    """One list a user, every item once."""

    items: Tensor
    """[users, n] int64; -1 at the end where the lists ran out."""
    scores: Tensor
    """[users, n] float32: the score by the interest that the item was taken from; -inf beside -1."""
    interests: Tensor
    """[users, n] int64: the number of that interest, from 0; -1 beside -1."""


class MergeRule(ABC):
    """How the lists of several interests become one. A new rule is a class here, and its name in `--merge`."""

    interests: int | None = None
    """Number of interests it merges; None: any."""

    @abstractmethod
    def merge(self, lists: Lists, length: int) -> Merged:
        """One list of `length` per user."""

    @abstractmethod
    def describe(self, interests: int, length: int) -> str:
        """What a list of `length` is made of."""


class Quota(MergeRule):
    """An equal number of new items of each interest, list after list."""

    def merge(self, lists: Lists, length: int) -> Merged:
        """See `MergeRule`."""
        return merge_quota(lists, even_quotas(length, lists.items.shape[1]))

    def describe(self, interests: int, length: int) -> str:
        """See `MergeRule`."""
        return f"equal shares of {interests} interests"


class Score(MergeRule):
    """The items that any of the interests has likeliest."""

    def merge(self, lists: Lists, length: int) -> Merged:
        """See `MergeRule`."""
        return merge_by_score(lists, length)

    def describe(self, interests: int, length: int) -> str:
        """See `MergeRule`."""
        return f"likeliest items of {interests} interests"


@dataclass
class TwoStep(MergeRule):
    """`m` items of the first interest, the rest, new ones, of the second (m_n in the paper)."""

    m: int
    """0: nine tenths of the list."""

    interests = 2

    def merge(self, lists: Lists, length: int) -> Merged:
        """See `MergeRule`."""
        m = self._first(length)
        return merge_quota(lists, (m, length - m))

    def describe(self, interests: int, length: int) -> str:
        """See `MergeRule`."""
        m = self._first(length)
        return f"{m} items of the first interest and {length - m} of the second"

    def _first(self, length: int) -> int:
        return self.m or max(1, round(0.9 * length))


SEVERAL: dict[str, MergeRule] = {"quota": Quota(), "score": Score()}
"""Rules for any number of interests, by the value of `--merge`."""


def merge_rule(name: str, m: int = 0) -> MergeRule:
    """The rule that `--merge` names; `m` items of the first interest where it is two_step."""
    return TwoStep(m) if name == "two_step" else SEVERAL[name]


def even_quotas(length: int, interests: int) -> list[int]:
    """`length` places dealt evenly, the first interests getting what is over: 10 for 4 is 3, 3, 2, 2."""
    return [length // interests + (i < length % interests) for i in range(interests)]


def merge_quota(lists: Lists, quotas: Sequence[int]) -> Merged:
    """The first `quotas[i]` items of list i that no list before gave, list after list (the paper's m_n for two).

    Where lists run out before their quotas are filled, the likeliest items left in any list come last. Lists as long as
    the merged one never run out, unless all that there is was found.

    Args:
        lists: of at least as many interests as there are quotas; the others only fill up.
        quotas: items taken of each list; the merged list has their sum.

    Example: the lists 3 1 2 and 3 2 4 under the quotas 2 and 1 make 3 1 2.
    """
    users, _, depth = lists.items.shape
    places = lists.items.new_zeros(users, 0)
    merged = lists.items.new_zeros(users, 0)
    for i, quota in enumerate(quotas):
        items = lists.items[:, i]
        new = ~_repeated(torch.cat([merged, items], dim=1))[:, merged.shape[1] :] & (items >= 0)
        here = torch.arange(i * depth, (i + 1) * depth, device=items.device).expand(users, depth)
        places = torch.cat([places, _first(here, new, quota)], dim=1)
        merged = _at(lists.items, places, -1)
    return _taken(lists, torch.cat([places, _by_share(lists)], dim=1), sum(quotas))


def merge_by_score(lists: Lists, length: int) -> Merged:
    """The `length` items that are likeliest in any list, each taken from the interest that has it likeliest.

    Scores of several interests are not alike: what the model expects once it has heard itself, it expects with higher
    scores all over. So they are compared as what they are in the loss, logits: by the share exp(score) / sum of
    exp(scores) of the interest's own list. (On validation, with half of Beauty's users, the next item was in 12.0% and
    11.3% of the lists of ten made of 2 and 6 lists of 50; with scores as they are in 11.6% and 10.1%; in 11.8% by one.)

    Example: the lists 3 1 (scores 9, 7) and 1 2 (15, 10) make 1 3 2 (shares .99 of the second, .88 of the first, ...).
    """
    return _taken(lists, _by_share(lists), length)


def _by_share(lists: Lists) -> Tensor:
    """[users, interests * n] all places, that with the largest share of its list first."""
    shares = lists.scores.log_softmax(dim=2).nan_to_num(nan=-torch.inf, neginf=-torch.inf)  # NaN: of an empty list
    return shares.flatten(1).argsort(dim=1, descending=True, stable=True)


def _taken(lists: Lists, places: Tensor, length: int) -> Merged:
    """What stands at the first `length` places (-1: none) of each row that hold an item not met before."""
    items = _at(lists.items, places, -1)
    chosen = _first(places, (items >= 0) & ~_repeated(items), length)
    interests = torch.where(chosen >= 0, chosen // max(1, lists.items.shape[2]), -1)
    return Merged(_at(lists.items, chosen, -1), _at(lists.scores, chosen, -torch.inf), interests)


def _at(values: Tensor, places: Tensor, nothing: float) -> Tensor:
    """[users, n] the values [users, interests, n] at places; `nothing` at place -1."""
    return values.flatten(1).gather(1, places.clamp(min=0)).masked_fill(places < 0, nothing)


def _repeated(items: Tensor) -> Tensor:
    """[rows, n] bool: whether the same value stands earlier in the row."""
    order = items.argsort(dim=1, stable=True)
    ordered = items.gather(1, order)
    same = torch.zeros_like(items, dtype=torch.bool)
    same[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return torch.zeros_like(same).scatter(1, order, same)


def _first(values: Tensor, wanted: Tensor, count: int) -> Tensor:
    """The first `count` wanted values of each row, in order, filled up with -1."""
    place = torch.where(wanted, wanted.cumsum(1) - 1, count)
    out = values.new_full((values.shape[0], count + 1), -1)
    out.scatter_(1, place.clamp(max=count), values)
    return out[:, :count]
