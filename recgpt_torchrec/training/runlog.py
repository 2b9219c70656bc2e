"""What a run shows and keeps of itself: a progress bar, TensorBoard, and one JSON line an epoch."""

import json
import os
from typing import Any

from recgpt_torchrec.progress import bar
from recgpt_torchrec.training.processes import rank


class RunLog:
    """Progress of a run; silent on every rank but 0.

    A run that goes on from a checkpoint does again what came after it: that is dropped here, so that each epoch has one
    line and each step one point.

    Example: `with RunLog(output, total, done) as log: log.step(...)`
    """

    def __init__(self, output: str, total: float, done: float, epochs: int = 0, steps: int = 0) -> None:
        """
        Args:
            output: the run's folder.
            total: interactions to be trained on, all epochs and ranks together.
            done: of them trained on before.
            epochs, steps: done before.
        """
        self.active = rank() == 0
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter  # imports slowly, and on one rank is enough

        self.board = SummaryWriter(os.path.join(output, "tensorboard"), purge_step=steps + 1 if steps else None)
        history = os.path.join(output, "history.jsonl")
        _keep_epochs(history, epochs)
        self.history = open(history, "a")
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


def _keep_epochs(history: str, epochs: int) -> None:
    """Drop the lines of a history that are of later epochs, or that a kill left unfinished."""
    if not os.path.exists(history):
        return
    with open(history) as file:
        lines = [line for line in file if line.endswith("\n") and json.loads(line)["epoch"] <= epochs]
    with open(history + ".tmp", "w") as file:
        file.writelines(lines)
    os.replace(history + ".tmp", history)
