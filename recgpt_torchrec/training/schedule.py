"""The learning-rate schedule, by entries trained on rather than steps: the same for any number of ranks."""

import math

from torchrec.optim.keyed import KeyedOptimizer

from recgpt_torchrec.config import Optimizer

LONGEST_WARMUP = 0.1
"""Maximum warm-up, as a share of the run: runs on a small dataset have few steps."""


def learning_rate_share(config: Optimizer, steps: int, progress: float) -> float:
    """The learning rate as a share of its peak: linear warm-up, then cosine decay over the whole run.

    Args:
        config: warm-up steps and final share.
        steps: optimizer steps done.
        progress: share of the run's entries trained on, 0 to 1.
    """
    warm = min(1.0, max((steps + 1) / config.warmup_steps, progress / LONGEST_WARMUP)) if config.warmup_steps else 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
    return warm * (config.final_lr + (1 - config.final_lr) * cosine)


class Schedule:
    """Sets the learning rate of every parameter group, including fused table optimizers.

    Example: `Schedule(optimizer, options).set_rates(steps, progress)` before each step
    """

    def __init__(self, optimizer: KeyedOptimizer, config: Optimizer) -> None:
        self.optimizer, self.config = optimizer, config
        self.peaks = [group["lr"] for group in optimizer.param_groups]

    def set_rates(self, steps: int, progress: float) -> float:
        """Set the learning rates for the next step; returns the share of the peak.

        fbgemm receives them in the pipeline's `zero_grad`. For the arguments see `learning_rate_share`.
        """
        share = learning_rate_share(self.config, steps, progress)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * share
        return share
