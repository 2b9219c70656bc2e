"""Progress of a run: what checkpoint.json holds of it, and what a resumed run starts from."""

import os
from dataclasses import asdict, dataclass, field
from typing import Any

from recgpt_torchrec import storage
from recgpt_torchrec.checkpoints.folder import METADATA, read_metadata
from recgpt_torchrec.checkpoints.repeat_bias import check_bias
from recgpt_torchrec.data.windows import Position
from recgpt_torchrec.storage.typed import check_counts, check_finite, make_typed

MAX_STEPS = 2**40
"""Maximum number of steps of a run; seeds, which are made of it, must stay below 2^63."""
START = -1
"""Number of the epoch before the first, counted from 0: that of the model that a run begins with."""
COUNTS = ("step", "before", "skipped", "validated")


@dataclass
class Progress:
    """Progress of a run, as checkpoint.json holds it."""

    step: int = 0
    """Optimizer steps done."""
    read: float = 0.0
    """Entries trained on, over all epochs and ranks."""
    position: Position = field(default_factory=Position)
    """The epoch, and what is left of it."""
    best_value: float = float("-inf")
    """Best validation figure so far."""
    best_epoch: int = START
    """Epoch of the best figure, from 0; `START` where it is of the start, and where there is none yet."""
    best_step: int | None = None
    """Steps done at the validation of the best figure, which name its checkpoint."""
    validated: int = 0
    """Steps done at the newest validation; 0: none yet, or that of the start."""
    finished: bool = False
    before: int = 0
    """Steps of the runs that this one started from: the optimizers' step counters include them."""
    loss: float = 0.0
    """Loss summed over the targets of the epoch so far, in nats."""
    targets: float = 0.0
    """Targets of the epoch so far."""
    repeat_bias: float = 0.0
    """Added to the scores of items of a user's history where these compete, as fitted at the newest validation; 0:
    never fitted, as in checkpoints of earlier versions."""
    skipped: int = 0
    """Steps skipped in the run because their loss or gradients were not finite."""

    @property
    def mean_loss(self) -> float:
        """Mean loss over the targets of the epoch so far, in nats."""
        return self.loss / max(self.targets, 1)

    def state_dict(self) -> dict[str, Any]:
        """The progress as JSON values."""
        return {**asdict(self), "position": self.position.state_dict()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Progress":
        """The inverse of `state_dict`.

        Raises:
            ValueError: a value is missing, unknown, or none that a run can have.
        """
        values = {name: value for name, value in state.items() if name != "position"}
        progress = make_typed(cls, values, "progress.")
        if "position" in state:
            progress.position = Position.from_state_dict(state["position"])
        check_counts({f"progress.{name}": getattr(progress, name) for name in COUNTS})
        check_finite({f"progress.{name}": getattr(progress, name) for name in ("read", "targets")})
        check_bias(progress.repeat_bias, "progress.repeat_bias")
        if max(progress.step, progress.before) > MAX_STEPS:
            raise ValueError(f"progress.step and progress.before must be at most {MAX_STEPS:,}")
        return progress

    @classmethod
    def of_checkpoint(cls, checkpoint: str) -> "Progress":
        """Read that of a checkpoint folder.

        Raises:
            InputError: it is not a complete checkpoint, or damaged.
        """
        state = read_metadata(checkpoint).get("progress")
        try:
            if not isinstance(state, dict):
                raise ValueError("it has no object 'progress'")
            return cls.from_state_dict(state)
        except ValueError as error:
            raise storage.damaged(os.path.join(checkpoint, METADATA), error) from None
