"""The log of a run: progress bar, TensorBoard, and one JSON line per epoch in history.jsonl.

Validations within an epoch have lines of their own, and so has the last epoch of a run of steps if it is not over: they
have `"partial": true`. Where the model that the run begins with is validated too, that is epoch 0, without a loss.
"""

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
from recgpt_torchrec.storage.finished import flatten
from recgpt_torchrec.training.meter import RECORDED, Speed
from recgpt_torchrec.training.progress import START

TIMINGS = ("data_wait", "train_s", "validate_s", *RECORDED)
"""Names in history.jsonl of what differs from run to run of the same training."""
PARTIAL = "partial"
"""Name in history.jsonl that marks a line written before its epoch was over."""


class RunLog:
    """Shows and records the progress of a run on rank 0; does nothing on other ranks.

    A resumed run repeats what came after its checkpoint. Those lines and points are dropped, so that each epoch has one
    line and each step one point.

    If the output is an object store, TensorBoard's events are written to the local disk and uploaded after each epoch.

    Example: `with RunLog(output, total, done) as log: log.log_step(...)`
    """

    def __init__(
        self,
        output: str,
        total: float,
        done: float,
        epochs: int = START,
        steps: int = 0,
        validated: int = 0,
        *,
        unit: str = "interactions",
    ) -> None:
        """
        Args:
            output: the run's folder.
            total: length of the run in `unit`: steps, or entries over all epochs and ranks.
            done: what was done before.
            epochs, steps: number done before; epochs are `START` where nothing was, and no line stays.
            validated: steps done at the newest validation before.
            unit: what the progress bar counts.

        Raises:
            InputError: the folder cannot be written to.
        """
        self.active, self.output = rank() == 0, output
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

        self.tensorboard = os.path.join(output, "tensorboard")
        self.scratch = tempfile.TemporaryDirectory(prefix="tensorboard-") if storage.remote(output) else None
        folder = self.tensorboard if self.scratch is None else self.scratch.name
        self.history = os.path.join(output, "history.jsonl")
        with self._report_write_errors():
            self.writer = SummaryWriter(folder, purge_step=0 if epochs == START else steps + 1)
            _drop_later_lines(self.history, epochs, validated)
        self.bar = progress_bar(int(total), unit, done=int(done), unit_scale=True)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self.active:
            self.bar.close()
            try:
                with self._report_write_errors():
                    self.writer.close()
                    if kind is None or not issubclass(kind, (InputError, OSError)):  # else the store may not answer
                        self._upload()
            except InputError:
                if kind is None:  # else the original error is the one to report
                    raise
            finally:
                if self.scratch is not None:
                    self.scratch.cleanup()

    @contextmanager
    def _report_write_errors(self) -> Iterator[None]:
        """Raise an `InputError` that names the folder for an `OSError` within the `with`."""
        try:
            yield
        except OSError as error:
            storage.raise_storage_failure(error, self.output, "write to")
            raise InputError(
                f"cannot write to {self.output}: {error}. Make room, or make sure that it can be reached; the same "
                "command resumes from the newest checkpoint"
            ) from None

    def _upload(self) -> None:
        """Upload TensorBoard's events so far, if the output is an object store."""
        if self.scratch is not None:
            self.writer.flush()
            for name in os.listdir(self.scratch.name):
                with open(os.path.join(self.scratch.name, name), "rb") as file:
                    storage.write(os.path.join(self.tensorboard, name), file.read())

    def advance(self, done: float, epoch: int) -> None:
        """Advance the progress bar.

        Args:
            done: since the last call, over all ranks, in the bar's unit.
            epoch: counted from 0.
        """
        if self.active:
            self.bar.set_description(f"epoch {epoch + 1}", refresh=False)
            self.bar.update(done)

    def log_step(self, step: int, *, loss: float, lr: float, waited: float, speed: Speed) -> None:
        """Show and record the figures of the steps since the last call.

        Args:
            step: optimizer steps done.
            loss: mean over their targets, in nats.
            lr: learning rate, as a share of its peak.
            waited: share of the time spent waiting for data.
            speed: what was measured.

        Raises:
            InputError: they cannot be written.
        """
        if self.active:
            self.bar.set_postfix_str(
                f"loss {loss:.3f}, {speed.targets_per_s:,.0f} targets/s, {speed.share_of_peak:.0%} of peak, "
                f"data wait {waited:.0%}",
                refresh=False,
            )
            figures = {"loss": loss, "lr_share": lr, "data_wait": waited, **speed.record()}
            with self._report_write_errors():
                for name, value in flatten(figures).items():
                    self.writer.add_scalar(f"train/{name.replace(' ', '_')}", value, step)

    def log_epoch(self, record: dict[str, Any], speed: Speed | None, step: int) -> None:
        """Record and log an epoch's figures, or those of a validation within it.

        Args:
            record: the line of history.jsonl, with `loss`, but for the start, and what `speed` records.
            speed: what was measured, for a line of its own in the log; None: nothing was.
            step: optimizer steps done.

        Raises:
            InputError: they cannot be written.
        """
        if self.active:
            with self._report_write_errors():
                storage.append(self.history, json.dumps(record) + "\n")
                for name, value in record.items():
                    if isinstance(value, float):
                        self.writer.add_scalar(f"epoch/{name}", value, step)
                self._upload()
            shown = {name: value for name, value in record.items() if name not in (*RECORDED, PARTIAL)}
            figures = ", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
            # In an epoch with few steps, `log_step` may not have been called.
            if "loss" in record:
                self.bar.set_postfix_str(f"loss {record['loss']:.3f}", refresh=False)
            LOGGER.info(figures)
            if speed is not None:
                LOGGER.info("  %s", speed)


def _drop_later_lines(history: str, epochs: int, validated: int) -> None:
    """Drop what a run that was begun before writes again, and incomplete lines that a kill or a loss of power left.

    What stays are lines of the start and the first `epochs` epochs (`START`: none), and those of validations within the
    next one, up to the one after `validated` steps.
    """
    if storage.exists(history):
        lines = storage.read(history).splitlines(keepends=True)
        storage.write(history, b"".join(line for line in lines if _is_before(line, epochs, validated)))


def _is_before(line: bytes, epochs: int, validated: int) -> bool:
    """Whether a line of history.jsonl is complete, and was written before a checkpoint of this progress."""
    try:
        values = json.loads(line)
        epoch, partial = int(values["epoch"]), values.get(PARTIAL) is True
        if not line.endswith(b"\n") or epoch < 0:
            return False
        return epoch <= epochs or (partial and epoch == epochs + 1 and int(values["step"]) <= validated)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, AttributeError):
        return False
