"""Positions of the entries of a history, which of them predict, and what they are to predict."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from recgpt_torchrec.data.histories import Histories
from recgpt_torchrec.data.ragged import Float32, Int64, ragged_arange
from recgpt_torchrec.data.segments import INTERACTED

PredictFrom = Literal["interacted", "last", "every"]


def positions_of(histories: Histories) -> Int64:
    """Positions [entries] int64: for an interacted entry, the number of interacted entries before it.

    The k-th prompt after it has k more, as if it were the k-th item to come: the model generates at these positions.
    Example: segments 0 1 1 0 0 have the positions 0 1 2 1 2.
    """
    segments, offsets, lengths = histories.segments, histories.offsets, histories.lengths
    entry = ragged_arange(lengths)
    if segments is None or not segments.size:
        return entry
    first = np.repeat(offsets[:-1], lengths)
    interacted = segments == INTERACTED
    before = np.concatenate([[0], np.cumsum(interacted)])
    interacted_count = before[1:] - before[first]  # interacted entries up to and including this one
    last_interacted = np.maximum.accumulate(np.where(interacted, np.arange(interacted.size), -1))
    since = np.where(last_interacted >= first, np.arange(interacted.size) - last_interacted, entry + 1)
    return np.where(interacted, interacted_count - 1, interacted_count - 1 + since)


def targets_of(
    histories: Histories, tokens: Int64, predict_from: PredictFrom, last_target: bool = False
) -> tuple[Int64, Int64]:
    """Which tokens predict, and the entries that are their targets: the next interacted ones.

    Args:
        histories: their columns `segments`, `trained`, `known` and `weights` decide.
        tokens: [tokens] int64: entry of each token; every entry but the last of its history.
        predict_from: which tokens predict where prompts precede the target (see `pack_histories`).
        last_target: whether only the last target of each history is predicted (paper, equation 5).

    Returns:
        predicting: [targets] int64, index of each predicting token among the tokens, ascending.
        targets: [targets] int64, the entry that it predicts.
    """
    segments = histories.segments
    if segments is None:
        following = tokens + 1
        predicts = None if histories.trained is None else ~histories.trained[following]
        if histories.weights is not None:
            weighted = histories.weights[following] > 0
            predicts = weighted if predicts is None else predicts & weighted
    else:
        interacted = segments == INTERACTED
        interacted_entries = np.flatnonzero(interacted)
        next_index = np.searchsorted(interacted_entries, tokens, side="right")
        following = np.append(interacted_entries, -1)[next_index]
        end = np.repeat(histories.offsets[1:], histories.lengths)[tokens]
        predicts = (following >= 0) & (following < end)
        if histories.trained is not None:
            predicts &= ~histories.trained[following]
        if histories.weights is not None:
            predicts &= histories.weights[following] > 0
        if predict_from == "interacted":
            predicts &= interacted[tokens]
        else:
            known = np.ones(tokens.size, dtype=bool) if histories.known is None else histories.known[tokens]
            predicts &= known if predict_from == "every" else find_last(following, known)
    predicting = np.arange(tokens.size) if predicts is None else np.flatnonzero(predicts)
    targets = following[predicting]
    if last_target and targets.size:
        history = np.searchsorted(histories.offsets, targets, side="right") - 1
        ends = np.append(history[1:] != history[:-1], True)  # targets ascend
        last = targets[ends][np.cumsum(ends) - ends]
        predicting, targets = predicting[targets == last], targets[targets == last]
    return predicting, targets


def find_last(following: Int64, known: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """[tokens] bool: whether a token is the last `known` [tokens] one before the target in `following` [tokens]."""
    candidates = np.flatnonzero(known)
    last = np.zeros(following.size, dtype=bool)
    if candidates.size:
        last[candidates] = np.append(following[candidates[1:]] != following[candidates[:-1]], True)
    return last


@dataclass(frozen=True)
class SoftShares:
    """Shares of a target's weight, each from 0 to 1, together at most 1, that go to its soft targets."""

    answers: float = 0.0
    """To the pre-trained model's answers, by the softmax of their scores."""
    neighbours: float = 0.0
    """To the neighbours of the history's items, in proportion to their scores."""


def soft_targets_of(
    histories: Histories,
    tokens: Int64,
    predicting: Int64,
    targets: Int64,
    shares: SoftShares,
    negatives: npt.NDArray[np.bool_] | None = None,
) -> tuple[Int64, Float32]:
    """The answers that share a target's weight, [targets, answers] int64, and the weight of each, float32.

    An answer that is missing or is the target itself has weight 0; the target's id takes its place. So has one that is
    never a negative, and its weight goes back to the target: else its score would be pushed up in every step, and down
    in none.

    Args:
        histories: with or without answers and neighbours.
        tokens, predicting: see `targets_of`.
        targets: [targets] int64: item ids of the targets.
        shares: of each kind of answer.
        negatives: [items] bool: whether an item is ever a negative; None: all are.
    """
    entries = tokens[predicting]
    none = np.zeros((targets.size, 0), dtype=np.int64), np.zeros((targets.size, 0), dtype=np.float32)
    kinds = [none]
    if shares.answers and histories.answers is not None and histories.answer_scores is not None:
        answers = histories.answers[entries]
        valid = (answers >= 0) & (answers != targets[:, None])
        scores = np.where(valid, histories.answer_scores[entries], -np.inf)
        top = scores.max(1, initial=-np.inf, keepdims=True)
        weights = np.exp(scores - np.where(np.isfinite(top), top, 0.0))
        kinds.append(_spread(answers, valid, weights, targets, shares.answers, negatives))
    if shares.neighbours and histories.neighbours is not None and histories.neighbour_scores is not None:
        answers = histories.neighbours[entries]
        valid = (answers >= 0) & (answers != targets[:, None])
        weights = np.where(valid, histories.neighbour_scores[entries], 0.0)
        kinds.append(_spread(answers, valid, weights, targets, shares.neighbours, negatives))
    ids, found = zip(*kinds, strict=True)
    return np.concatenate(ids, axis=1), np.concatenate(found, axis=1)


def _spread(
    answers: Int64,
    valid: npt.NDArray[np.bool_],
    weights: npt.NDArray[np.floating],
    targets: Int64,
    share: float,
    negatives: npt.NDArray[np.bool_] | None,
) -> tuple[Int64, Float32]:
    """Spread a share of each target's weight over its valid answers [targets, answers], in proportion to `weights`."""
    weights = weights * (share / np.maximum(weights.sum(1, keepdims=True), 1e-30))
    if negatives is not None:
        valid = valid & negatives.take(np.maximum(answers, 0))
        weights *= valid
    return np.where(valid, answers, targets[:, None]), weights.astype(np.float32)
