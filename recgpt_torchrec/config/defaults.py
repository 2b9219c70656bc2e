"""Defaults that follow the data: what an option becomes that is `auto`. Numbers in, numbers out."""

import math

STEPS = 100
"""Number of steps per epoch that the default number of tokens aims at. Best validation NDCG@10 in the default 20 epochs
by steps per epoch: a synthetic log of 18 thousand targets .183 (9), .270 (35), .429 (71), .543 (150), item
co-occurrence .356; one of 85 thousand .380 (21), .546 (41), .626 (82), .656 (165), co-occurrence .373; Beauty, 8
epochs, .0613 (32), .0656 (63), .0682 (126). MovieLens 100k does not care: .120 to .123 from 20 to 79, +-.004."""
FEWEST = 128
"""Minimum number of tokens of a step, over all ranks: a step of 64 takes as long."""
MOST = {"cpu": 2048, "cuda": 16384}
"""Maximum number of tokens of a step per rank, by type of device."""
MULTIPLE = 32
"""A rank's tokens are a multiple of this, for the sake of vector units and of round numbers."""


def tokens_of_step(epoch_tokens: float, ranks: int, device: str, given: int | None = None) -> int:
    """The maximum number of tokens of a step, over all ranks.

    It is the same on any number of ranks until each has `MOST`: more ranks must not mean fewer steps on a small log.

    Args:
        epoch_tokens: tokens of one epoch, over all ranks.
        ranks: number of ranks.
        device: `cpu` or `cuda`.
        given: what is aimed at (`--batch.step_tokens`); None: `STEPS`.
    """
    wanted = given or math.ceil(epoch_tokens / STEPS)
    return min(max(wanted, FEWEST), MOST[device] * ranks)


def tokens_of_rank(step_tokens: int, ranks: int, max_len: int) -> int:
    """One rank's part of the tokens of a step: rounded up to a multiple of `MULTIPLE`, at least the longest history.

    Args:
        step_tokens: over all ranks.
        ranks: number of ranks.
        max_len: maximum number of entries of a history.
    """
    return max(max_len, math.ceil(step_tokens / ranks / MULTIPLE) * MULTIPLE)
