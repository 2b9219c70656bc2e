"""What all kinds of benchmark share: the dataset, the sizes, a folder for what they make."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tools.benchmarks.training import Training
from tools.small_run import write_dataset

TOKENS = 1536
"""Tokens per step of most kinds: about the targets of the plain loops' 256 users."""


@dataclass
class Settings:
    """The dataset and the sizes of a run of the benchmark."""

    data: str
    """Folder of the dataset."""
    folder: Path
    """For synthetic datasets and exports."""
    quick: bool = False
    """Whether sizes are toys: to try that everything runs, not to measure."""
    _trainings: dict[str, Training] = field(default_factory=dict)

    def pick(self, value: int, quick: int) -> int:
        """A size: `value`, or the toy one."""
        return quick if self.quick else value

    def training(
        self, options: dict[str, Any] | None = None, steps: int | None = None, data: str | None = None
    ) -> Training:
        """A trainer with configs/beauty.yaml's options and these; kinds that ask for the same one share it.

        Args:
            options: dotted names; by default `TOKENS` tokens per step.
            steps: maximum number of steps in a turn; None: an epoch.
            data: folder of another dataset.
        """
        options = {"batch.tokens": TOKENS, **(options or {})}
        key = json.dumps([options, steps, data])
        if key not in self._trainings:
            warm_up = self.pick(5, 1)
            self._trainings[key] = Training(data or self.data, options, steps, warm_up)
        return self._trainings[key]

    def synthetic(self, *, items: int, length: int, users: int) -> str:
        """The folder of a synthetic dataset whose training parts have `length` tokens each; made once."""
        folder = self.folder / f"items-{items}-length-{length}-users-{users}"
        if not folder.exists():
            rng = np.random.default_rng(0)
            entries = length + 3  # one more for the last target, two held out
            histories = rng.integers(0, items, (users, entries)).tolist()
            write_dataset(folder, histories, items=items, rows_per_group=256, groups_per_part=8)
        return str(folder)
