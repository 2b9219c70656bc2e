"""Fits the repeat bias by maximum likelihood, from the odds that a model gives to each user's history.

The score of item j after a history is h . v_j + b [j is in the history]: one number b for the model. With r the share
of the softmax that the items of the history have without b, the next item is one of them with probability
e^b r / (1 - r + e^b r), which is the logistic function of b + log(r / (1 - r)). The likelihood of b is that of a
logistic regression with an intercept alone: at its maximum the probabilities sum to the number of users whose item is
in their history. Where nobody takes an item twice there is no maximum, and b is the bound.
"""

import numpy as np
import numpy.typing as npt

from recgpt_torchrec.checkpoints.repeat_bias import BOUND

DECIMALS = 3
"""Decimals that are kept: sums over other numbers of ranks round otherwise, by less than 1e-5."""
STEPS = 60
"""Number of bisections: the bounds are then one float64 apart."""

Float64 = npt.NDArray[np.float64]


def fit_bias(log_odds: Float64, is_repeat: npt.NDArray[np.bool_]) -> float | None:
    """The bias under which the held-out items of some users are likeliest.

    Args:
        log_odds: [users] float64 log of the odds of their histories without the bias; -inf: it is empty, inf: it has
            all items.
        is_repeat: [users] bool, whether the held-out item is in the history.

    Returns:
        From -`BOUND` (no item is) to `BOUND`; None: no user says anything of it.
    """
    informs = np.isfinite(log_odds)
    if not informs.any():
        return None
    odds, repeats = log_odds[informs], int(is_repeat[informs].sum())

    def exceeds(bias: float) -> bool:
        """Whether more repeats are expected than there are."""
        return float(_logistic(odds + bias).sum()) > repeats

    low, high = -BOUND, BOUND
    if not repeats or exceeds(low):
        return low
    if repeats == odds.size or not exceeds(high):
        return high
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if exceeds(middle) else (middle, high)
    return round((low + high) / 2, DECIMALS)


def _logistic(values: Float64) -> Float64:
    shares: Float64 = 1 / (1 + np.exp(-np.maximum(values, -700)))  # e^700 is the largest that float64 holds, about
    return shares
