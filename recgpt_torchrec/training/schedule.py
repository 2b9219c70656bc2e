"""The length of a run, and the learning-rate schedule that spans it.

A run of epochs is measured in entries trained on rather than in steps: the same for any number of ranks. A run of
`--train.steps` is measured in steps.
"""

import math
from dataclasses import dataclass

from torchrec.optim.keyed import KeyedOptimizer

from recgpt_torchrec.config import Optimizer, Train
from recgpt_torchrec.training.progress import Progress

LONGEST_WARMUP = 0.1
"""Maximum warm-up, as a share of the run: runs on a small dataset have few steps."""


@dataclass(frozen=True)
class Length:
    """How long a run is: a number of epochs, or of steps.

    Example: `Length.of(train, entries).share(progress)`
    """

    epochs: int
    """Number of epochs; no limit where `steps` is given."""
    steps: int
    """Number of optimizer steps; 0: as many as the epochs have."""
    entries: float
    """Entries of the dataset, read once per epoch."""

    @classmethod
    def of(cls, train: Train, entries: float) -> "Length":
        """The length by the options, on a dataset of `entries` entries."""
        return cls(train.epochs, train.steps, max(1, entries))

    @property
    def unit(self) -> str:
        """What `total` and `done` count, for the progress bar."""
        return "steps" if self.steps else "interactions"

    @property
    def total(self) -> float:
        """The whole run, in `unit`."""
        return self.steps or self.entries * self.epochs

    def done(self, progress: Progress) -> float:
        """What is done of the run, in `unit`."""
        return progress.step if self.steps else progress.read

    def share(self, progress: Progress) -> float:
        """Share of the run that is done, 0 to about 1: entries are counted, and steps round them up."""
        return self.done(progress) / self.total

    def has_all_steps(self, progress: Progress) -> bool:
        """Whether the steps that were given are done, wherever in an epoch that is."""
        return 0 < self.steps <= progress.step

    def is_last_epoch(self, epoch: int) -> bool:
        """Whether the run ends with this epoch, counted from 0."""
        return not self.steps and epoch + 1 >= self.epochs


def learning_rate_share(config: Optimizer, steps: int, progress: float) -> float:
    """The learning rate as a share of its peak: linear warm-up, then cosine decay over the whole run.

    Args:
        config: warm-up steps and final share.
        steps: optimizer steps done.
        progress: share of the run's entries trained on, or of its steps done, 0 to 1 (`Length.share`).
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
