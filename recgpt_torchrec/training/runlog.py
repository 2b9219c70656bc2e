"""What a run shows and keeps of itself: a progress bar, TensorBoard, and one JSON line an epoch."""

import json
import os
from typing import Any

from recgpt_torchrec.progress import bar
from recgpt_torchrec.training.processes import rank


class RunLog:
    """Progress of a run; silent on every rank but 0.

    Example: `with RunLog(output, total, done) as log: log.step(...)`
    """

    def __init__(self, output: str, total: float, done: float) -> None:
        self.active = rank() == 0
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter  # imports slowly, and on one rank is enough

        self.board = SummaryWriter(os.path.join(output, "tensorboard"))
        self.history = open(os.path.join(output, "history.jsonl"), "a")
        self.bar = bar(int(total), "interactions", done=int(done), unit_scale=True)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error: object) -> None:
        if self.active:
            self.bar.close()
            self.board.close()
            self.history.close()

    def read(self, interactions: float) -> None:
        """Move the progress bar on by interactions trained on, all ranks together."""
        if self.active:
            self.bar.update(interactions)

    def step(self, step: int, epoch: int, *, loss: float, lr: float, rate: float, waited: float) -> None:
        """Show and keep the figures of the last steps.

        Args:
            step: optimizer steps done.
            epoch: from 0.
            loss: mean over the targets since the last call, in nats.
            lr: share of the peak learning rate.
            rate: targets trained a second, all ranks together.
            waited: share of the time spent waiting for data.
        """
        if self.active:
            self.bar.set_description(f"epoch {epoch + 1}", refresh=False)
            self.bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} targets/s, data wait {waited:.0%}", refresh=False)
            for name, value in {"loss": loss, "lr_share": lr, "targets_per_s": rate, "data_wait": waited}.items():
                self.board.add_scalar(f"train/{name}", value, step)

    def epoch(self, record: dict[str, Any], step: int) -> None:
        """Keep and print an epoch's summary."""
        if self.active:
            self.history.write(json.dumps(record) + "\n")
            self.history.flush()
            for name, value in record.items():
                if isinstance(value, float):
                    self.board.add_scalar(f"epoch/{name}", value, step)
            figures = ", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items())
            self.bar.write(figures)  # above the bar, on standard output
