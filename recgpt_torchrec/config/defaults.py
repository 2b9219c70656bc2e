"""Defaults that follow the data: what an option becomes that is `auto`. Numbers in, numbers out."""

import math

STEPS = 100
"""Number of steps per epoch that the default number of tokens aims at."""
FEWEST = 256
"""Minimum number of tokens of a step, over all ranks: smaller steps cost more time than they are worth."""
MOST = {"cpu": 2048, "cuda": 16384}
"""Maximum number of tokens of a step per rank, by type of device."""
MULTIPLE = 64
"""A rank's tokens are a multiple of this: whole rows of the packed grid."""


def tokens_of_step(epoch_tokens: float, ranks: int, device: str) -> int:
    """The maximum number of tokens of a step, over all ranks.

    It is the same on any number of ranks until each has `MOST`: more ranks must not mean fewer steps on a small log.

    Args:
        epoch_tokens: tokens of one epoch, over all ranks.
        ranks: number of ranks.
        device: `cpu` or `cuda`.
    """
    wanted = math.ceil(epoch_tokens / STEPS)
    return min(max(wanted, FEWEST), MOST[device] * ranks)


def tokens_of_rank(step_tokens: int, ranks: int, max_len: int) -> int:
    """One rank's part of the tokens of a step: rounded up to a multiple of 64, at least the longest history.

    Args:
        step_tokens: over all ranks.
        ranks: number of ranks.
        max_len: maximum number of entries of a history.
    """
    return max(max_len, math.ceil(step_tokens / ranks / MULTIPLE) * MULTIPLE)
