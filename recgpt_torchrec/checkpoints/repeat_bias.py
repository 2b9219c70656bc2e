"""The repeat bias of a model: a number that checkpoints and exports hold, its bounds, and how it is told.

The score of item j after a history is h . v_j + b [j is in the whole history], where items of the history compete. b is
fitted at validations (`evaluation.repeats`).
"""

import math

NAME = "repeat_bias"
"""Its name in checkpoints, manifests and evaluations."""
BOUND = 30.0
"""Maximum absolute value: e^30 is 10^13, so that with -30 no item of a history comes back in practice."""


def check_bias(bias: float, name: str = NAME) -> None:
    """Check a repeat bias that was read from a file.

    Raises:
        ValueError: it is none that is fitted.
    """
    if not abs(bias) <= BOUND:  # also not a number
        raise ValueError(f"{name} is {bias}, it must be from -{BOUND:g} to {BOUND:g}")


def describe_bias(bias: float) -> str:
    """A repeat bias and what it means, as the rest of a line that begins with `repeat`."""
    if bias <= -BOUND:
        meaning = "no item of a history comes back"
    elif bias >= BOUND:
        meaning = "only items of the history come"
    elif bias:
        meaning = f"items of a history weigh {math.exp(bias):.3g} times as much as by their vectors alone"
    else:
        meaning = "items of a history weigh as much as any others"
    return f"bias {bias:g}: {meaning}"
