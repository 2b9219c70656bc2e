"""The training loop: epochs of pipelined steps in step over all ranks, validation, checkpoints, early stopping.

It knows batches only as things with a cursor and a number of targets; what they mean is the model's affair.
"""

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.optim.keyed import KeyedOptimizer

from recgpt_torchrec.checkpoints.folder import Checkpoints, read_metadata
from recgpt_torchrec.checkpoints.saving import Saver
from recgpt_torchrec.checkpoints.state import restore, state_of
from recgpt_torchrec.config import Optimizer, Saving, Train
from recgpt_torchrec.data.stream import SequenceStream, Share
from recgpt_torchrec.data.windows import Position
from recgpt_torchrec.distributed import signals, watchdog
from recgpt_torchrec.distributed.lockstep import Lockstep, Step
from recgpt_torchrec.distributed.processes import gather_objects, log_message
from recgpt_torchrec.distributed.signals import Stopped
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.model.recgpt import unwrapped
from recgpt_torchrec.training.finite import FiniteGuard, GuardedPipeline, Place, describe_step, find_rows
from recgpt_torchrec.training.runlog import RunLog
from recgpt_torchrec.training.schedule import Schedule

LOG_EVERY = 20
"""Steps between looks at the loss (each is one all-reduce of one number)."""


@dataclass
class Progress:
    """How far a run is; what a checkpoint holds beside tensors."""

    step: int = 0
    read: float = 0.0
    """Interactions of the dataset trained on, all epochs and ranks together."""
    position: Position = field(default_factory=Position)
    best_value: float = float("-inf")
    best_epoch: int = -1
    best_step: int | None = None
    """Steps done when the best epoch ended, which name its checkpoint."""
    finished: bool = False
    before: int = 0
    """Steps of the runs that this one began from, which the optimizers count as well."""
    loss: float = 0.0
    """Sum of the losses of the epoch's steps so far, over its targets, in nats."""
    targets: float = 0.0
    """Positions predicted in these steps."""
    skipped: int = 0
    """Steps left out because their loss or gradients were not finite."""

    def state_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "position": self.position.state_dict()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Progress":
        """The inverse of `state_dict`."""
        return cls(**{**state, "position": Position.from_state_dict(state["position"])})


@dataclass
class Trainer:
    """Trains a distributed model on a stream.

    Example: `Trainer(model=model, optimizer=optimizer, ...).fit(validate)`
    """

    model: nn.Module
    optimizer: KeyedOptimizer
    device: torch.device
    stream: SequenceStream
    interactions: int
    """Interactions of the dataset: with the number of epochs the measure of progress, whatever the number of ranks."""
    train: Train
    schedule: Optimizer
    saving: Saving
    checkpoints: Checkpoints
    metadata: dict[str, Any]
    """What every checkpoint says of itself: configuration, vocabulary, sharding plan."""
    seed: int
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.learning_rate = Schedule(self.optimizer, self.schedule)
        self.guard = FiniteGuard(unwrapped(self.model).dense)
        self.pipeline = GuardedPipeline(self.model, self.optimizer, self.device, self.guard)
        self.saver = Saver(self.checkpoints, self.saving)
        self._share: Share | None = None
        self._loss = torch.zeros((), dtype=torch.float64, device=self.device)

    def fit(self, validate: Callable[[], dict[str, float]], metric: str) -> Progress:
        """Train until the last epoch, or until `metric` has not grown for `train.patience` epochs.

        Args:
            validate: collective; the validation figures, the same on all ranks.
            metric: the figure that decides about the best checkpoint and early stopping.

        Raises:
            Stopped: a rank was asked to end by a signal, and everything is saved.
            InputError: a loss or a gradient was not finite, and no such step may be left out.
        """
        progress = self.progress
        if self.saving.asynchronous:
            self.saver.copy(state_of(self.model, self.optimizer))  # takes the memory before the first step
        log = RunLog(self.checkpoints.output, self._total(), progress.read, progress.position.epoch, progress.step)
        with signals.handle_stop_signals(), self.saver, log:
            try:
                while not progress.finished:
                    self._epoch(log, validate, metric)
            except Stopped:
                self._save_within_epoch()
                self.saver.finish()
                log_message(
                    f"Stopped after step {progress.step}: a rank was asked to end by a signal. Everything is saved in "
                    f"{self.checkpoints.latest()}; the same command goes on from there"
                )
                raise
        return progress

    def _epoch(self, log: RunLog, validate: Callable[[], dict[str, float]], metric: str) -> None:
        progress, epoch, started = self.progress, self.progress.position.epoch, time.perf_counter()
        waited = self._train_epoch(epoch, log)
        loss = progress.loss / max(progress.targets, 1)
        last = epoch + 1 >= self.train.epochs
        record = {"epoch": epoch + 1, "step": progress.step, "loss": loss, "data_wait": waited}
        record["train_s"] = time.perf_counter() - started
        validated = last or (epoch + 1) % self.train.validate_every == 0
        if validated:
            started = time.perf_counter()
            self.pipeline.detach()
            with watchdog.phase("validating"):
                figures = validate()
            if figures[metric] > progress.best_value:
                progress.best_value, progress.best_epoch, progress.best_step = figures[metric], epoch, progress.step
            record |= {**figures, "validate_s": time.perf_counter() - started}
        idle = epoch - progress.best_epoch
        # Only a validation can end a run: patience may be shorter than the time between two.
        progress.finished = last or bool(
            validated and self.train.patience and progress.best_epoch >= 0 and idle >= self.train.patience
        )
        log.epoch(record, progress.step)
        progress.position, progress.loss, progress.targets = Position(epoch + 1), 0.0, 0.0
        self.save()

    def _train_epoch(self, epoch: int, log: RunLog) -> float:
        """Train what is left of an epoch; returns the share of time spent waiting for data."""
        progress, rank, world = self.progress, dist.get_rank(), dist.get_world_size()
        self._share = share = self.stream.batches(epoch, progress.position, rank, world)
        ahead = Lockstep(iter(share), self.stream.maker.empty, self.saver.wanted)
        self.model.train()
        began = since = time.perf_counter()
        seen = waited = 0.0
        before = progress.loss, progress.targets
        while True:
            # Dropout depends on where the run stands only: a resumed run goes on as the uninterrupted one would.
            torch.manual_seed((self.seed * 1_000_003 + progress.step) * 4099 + rank)
            lr_share = self.learning_rate.set(progress.step, progress.read / self._total())
            watchdog.report_phase("a training step", progress.step)
            try:
                loss, _ = self.pipeline.progress(ahead)
            except StopIteration:
                break
            self._check_pipelined()
            step = ahead.handed_out.popleft()
            if self.guard.found:
                self._not_finite(step, share, epoch, loss)
            else:
                self._loss += loss * (step.targets / world)
                progress.targets += step.targets
            if step.cursor is not None:
                share.done(step.cursor)
            seen += step.targets
            progress.step += 1
            progress.read += step.read
            log.read(step.read, epoch)
            if progress.step % LOG_EVERY == 0:
                self._sum_losses()
                now = time.perf_counter()
                mean = (progress.loss - before[0]) / max(progress.targets - before[1], 1)
                wait = (ahead.waited - waited) / (now - since)
                log.step(progress.step, loss=mean, lr=lr_share, rate=seen / (now - since), waited=wait)
                since, waited, seen, before = now, ahead.waited, 0.0, (progress.loss, progress.targets)
            if self.saver.is_due(progress.step, step.asked):
                self._save_within_epoch()
        self._sum_losses()
        return ahead.waited / (time.perf_counter() - began)

    def _sum_losses(self) -> None:
        """Add to the epoch's loss what all ranks had since the last call (collective)."""
        dist.all_reduce(self._loss)
        self.progress.loss += float(self._loss)
        self._loss.zero_()

    def _not_finite(self, step: Step, share: Share, epoch: int, loss: torch.Tensor) -> None:
        """Say where a step came from whose loss or gradients were not finite; end, or count it (collective)."""
        there: list[Place] = []
        if self.guard.here and step.cursor is not None and step.users is not None:
            there = find_rows(self.stream.dataset, share.groups_of(step.cursor), step.users)
        what = describe_step(
            self.checkpoints.output, self.progress.step + 1, epoch + 1, self.guard.here, float(loss), there
        )
        self.progress.skipped += 1
        if self.train.non_finite == "skip" and self.progress.skipped <= self.train.non_finite_limit:
            return log_message(f"{what}. Left out, {self.progress.skipped} of at most {self.train.non_finite_limit}")
        self.saver.finish()
        kept = self.checkpoints.latest()
        raise InputError(
            f"{what}. Tables and decoder were left as they were before the step. "
            + (f"{kept} is whole. " if kept else "No checkpoint was written before. ")
            + "Look at these rows; begin anew in another --output with a smaller --tables.lr or --optimizer.lr; or go "
            "on without such steps: --train.non_finite skip"
            + (f" --train.non_finite_limit {2 * self.progress.skipped}" if self.train.non_finite == "skip" else "")
        )

    def _total(self) -> float:
        return max(1, self.interactions) * self.train.epochs

    def _check_pipelined(self) -> None:
        """Fail loudly where the pipeline passed a sharded table by (torchrec only logs that, and trains on slowly)."""
        sharded = sum(isinstance(m, ShardedEmbeddingBagCollection) for m in self.model.modules())
        found = len(self.pipeline._pipelined_modules)
        if found != sharded:
            raise RuntimeError(
                f"the train pipeline found {found} of the model's {sharded} sharded tables: the others' input was "
                "changed between batch and table, so their communication would not overlap with the step before"
            )

    def _save_within_epoch(self) -> None:
        """Write a checkpoint that says what is left of the epoch (collective)."""
        self._sum_losses()
        left = [] if self._share is None else self._share.left
        queues = [queue for of_rank in gather_objects(left) for queue in of_rank]
        self.progress.position = Position(self.progress.position.epoch, queues)
        self.save()

    def save(self) -> None:
        """Write a checkpoint of everything a run needs to go on; training may go on at once."""
        progress = self.progress
        best = progress.best_step
        metadata = {**self.metadata, "progress": progress.state_dict()}
        metadata["best"] = {
            "checkpoint": None if best is None else os.path.basename(self.checkpoints.path(best)),
            "epoch": progress.best_epoch + 1,
            "value": progress.best_value,
        }
        with watchdog.phase("saving"):
            self.saver.save(progress.step, state_of(self.model, self.optimizer), metadata)

    def resume(self, checkpoint: str) -> None:
        """Go on from a checkpoint, whatever number of ranks and sharding it was written with."""
        self.progress = Progress.from_state_dict(read_metadata(checkpoint)["progress"])
        with watchdog.phase("restoring"):
            restore(self.model, self.optimizer, checkpoint, self.progress.before + self.progress.step)
        self.saver.saved = self.progress.step

    def begin_from(self, checkpoint: str) -> None:
        """Begin with what another run's checkpoint holds of the model and its optimizers; rows of tables that it does
        not have stay as they are. Progress and the learning rate's course begin anew."""
        earlier = Progress.from_state_dict(read_metadata(checkpoint)["progress"])
        self.progress.before = earlier.before + earlier.step
        restore(self.model, self.optimizer, checkpoint, self.progress.before)
