"""How the lists of several interests of a request are merged: the rule that arguments ask for, and its use."""

from typing import Any

import torch

from recgpt_torchrec.config.retrieval import INTERESTS
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.retrieval.merging import Lists, Merged, MergeRule, merge_rule


def choose_rule(merge: str, m: int, k: int, interests: int) -> tuple[MergeRule, int]:
    """The rule that merges interests, and their number."""
    check_whole("interests", interests, 1, INTERESTS)
    check_whole("m", m, 0, k)
    if merge not in ("auto", "two_step", "quota", "score"):
        raise InputError(f"merge is {merge!r}; give auto, two_step, quota or score")
    name = merge if merge != "auto" else {1: "score", 2: "two_step"}.get(interests, "quota")
    if m and name != "two_step":
        raise InputError(f"m is {m}, but merge is {name}; only two_step uses m, leave it out")
    rule = merge_rule(name, m)
    if rule.interests is not None and rule.interests != interests:
        raise InputError(f"interests is {interests}, but two_step merges 2; give interests=2, or another rule")
    return rule, interests


def merge_interests(lists: Lists, rule: MergeRule, k: int) -> Merged:
    """One list per history; a single interest's is that list, whatever the rule."""
    if lists.items.shape[1] > 1:
        return rule.merge(lists, k)
    items, scores = lists.items[:, 0], lists.scores[:, 0]
    return Merged(items, scores, torch.where(items < 0, -1, 0))


def check_whole(name: str, value: Any, least: int, most: int) -> None:
    """Raise an `InputError` where an argument is no whole number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InputError(f"{name} is {value!r}; it must be a whole number from {least} to {most}")
