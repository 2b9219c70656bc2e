"""What a run shows and keeps of itself: a progress bar, TensorBoard, and one JSON line an epoch."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from recgpt_torchrec import storage
from recgpt_torchrec.distributed.processes import rank
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.progress import LOGGER, progress_bar


class RunLog:
    """Progress of a run; silent on every rank but 0.

    A run that goes on from a checkpoint does again what came after it: that is dropped here, so that each epoch has one
    line and each step one point.

    Where the output is a store, TensorBoard's events are kept on the local disk and brought there after each epoch.

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
        self.active, self.output = rank() == 0, output
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter  # imports slowly, and on one rank is enough

        self.boards = os.path.join(output, "tensorboard")
        self.scratch = tempfile.TemporaryDirectory(prefix="tensorboard-") if storage.remote(output) else None
        folder = self.boards if self.scratch is None else self.scratch.name
        self.history = os.path.join(output, "history.jsonl")
        with self._writing():
            self.board = SummaryWriter(folder, purge_step=steps + 1 if steps else None)
            _keep_epochs(self.history, epochs)
        self.bar = progress_bar(int(total), "interactions", done=int(done), unit_scale=True)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self.active:
            self.bar.close()
            try:
                with self._writing():
                    self.board.close()
                    if kind is None or not issubclass(kind, (InputError, OSError)):  # else the store may not answer
                        self._upload()
            except InputError:
                if kind is None:  # else the error that led here is the one to be said
                    raise
            finally:
                if self.scratch is not None:
                    self.scratch.cleanup()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Say where it was if something cannot be written."""
        try:
            yield
        except OSError as error:
            raise InputError(
                f"cannot write to {self.output}: {error}. Make room, or see that it can be reached; the same command "
                "goes on from the newest checkpoint"
            ) from None

    def _upload(self) -> None:
        """Bring the events so far, kept on the local disk, to where the run lies, if that is a store."""
        if self.scratch is not None:
            self.board.flush()
            for name in os.listdir(self.scratch.name):
                with open(os.path.join(self.scratch.name, name), "rb") as file:
                    storage.write(os.path.join(self.boards, name), file.read())

    def read(self, interactions: float, epoch: int) -> None:
        """Move the progress bar on by interactions trained on, all ranks together, in an epoch (from 0)."""
        if self.active:
            self.bar.set_description(f"epoch {epoch + 1}", refresh=False)
            self.bar.update(interactions)

    def step(self, step: int, *, loss: float, lr: float, rate: float, waited: float) -> None:
        """Show and keep the figures of the last steps.

        Args:
            step: optimizer steps done.
            loss: mean over the targets since the last call, in nats.
            lr: share of the peak learning rate.
            rate: targets trained a second, all ranks together.
            waited: share of the time spent waiting for data.
        """
        if self.active:
            self.bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} targets/s, data wait {waited:.0%}", refresh=False)
            figures = {"loss": loss, "lr_share": lr, "targets_per_s": rate, "data_wait": waited}
            with self._writing():
                for name, value in figures.items():
                    self.board.add_scalar(f"train/{name}", value, step)

    def epoch(self, record: dict[str, Any], step: int) -> None:
        """Keep and print an epoch's summary."""
        if self.active:
            with self._writing():
                storage.append(self.history, json.dumps(record) + "\n")
                for name, value in record.items():
                    if isinstance(value, float):
                        self.board.add_scalar(f"epoch/{name}", value, step)
                self._upload()
            figures = ", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items())
            # Where an epoch has few steps, `step` is not called in each.
            self.bar.set_postfix_str(f"loss {record['loss']:.3f}", refresh=False)
            LOGGER.info(figures)


def _keep_epochs(history: str, epochs: int) -> None:
    """Drop the lines of a history that are of later epochs, or that a kill or a loss of power left unfinished."""
    if storage.exists(history):
        lines = storage.read(history).splitlines(keepends=True)
        storage.write(history, b"".join(line for line in lines if 0 < _epoch_of(line) <= epochs))


def _epoch_of(line: bytes) -> int:
    """The epoch that a line of a history is of; 0: it is not a whole one."""
    try:
        return int(json.loads(line)["epoch"]) if line.endswith(b"\n") else 0
    except (ValueError, KeyError, TypeError):
        return 0
