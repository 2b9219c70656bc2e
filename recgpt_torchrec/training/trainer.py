"""The training loop: pipelined steps in lockstep over ranks, validation, checkpoints, early stopping.

Of batches it knows what `lockstep.Step` holds: cursor, number of targets and entries, and the users, by which a
non-finite step's rows are found. The rest is the model's.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.optim.keyed import KeyedOptimizer

from recgpt_torchrec.checkpoints.folder import Checkpoints
from recgpt_torchrec.checkpoints.saving import Saver
from recgpt_torchrec.checkpoints.state import restore, state_of
from recgpt_torchrec.config import Optimizer, Saving, Train
from recgpt_torchrec.data.stream import SequenceStream, Share
from recgpt_torchrec.data.windows import Position, Queue
from recgpt_torchrec.distributed import signals, watchdog
from recgpt_torchrec.distributed.lockstep import Lockstep, Step
from recgpt_torchrec.distributed.processes import gather_objects, log_message
from recgpt_torchrec.distributed.replicas import Replicas
from recgpt_torchrec.distributed.signals import Stopped
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.model.dropout import seed_device
from recgpt_torchrec.model.recgpt import unwrapped, unwrapped_dense
from recgpt_torchrec.training.execution import Execution
from recgpt_torchrec.training.finite import FiniteGuard, GuardedPipeline, Place, describe_step, find_rows
from recgpt_torchrec.training.meter import LOG_EVERY, StepMeter
from recgpt_torchrec.training.progress import Progress
from recgpt_torchrec.training.runlog import RunLog
from recgpt_torchrec.training.schedule import Schedule
from recgpt_torchrec.training.trace import StepTrace


class _Trained(NamedTuple):
    """A step whose flags are not read yet."""

    number: int
    """Counted from 1."""
    step: Step
    queue: Queue | None
    """What was left of the batch's queue before it; None: the batch was empty."""
    loss: torch.Tensor
    """[] this rank's loss, on the device."""


@dataclass
class Trainer:
    """Trains a sharded model on a stream; every rank has one.

    Example: `Trainer(model=model, optimizer=optimizer, ...).fit(validate, metric="NDCG@10")`
    """

    model: nn.Module
    optimizer: KeyedOptimizer
    device: torch.device
    execution: Execution
    stream: SequenceStream
    entries: int
    """Entries of the dataset, read once per epoch; progress is counted in entries, which do not depend on the ranks."""
    train: Train
    schedule: Optimizer
    saving: Saving
    checkpoints: Checkpoints
    metadata: dict[str, Any]
    """JSON values for every checkpoint's metadata: configuration, vocabulary, sharding plan."""
    seed: int
    progress: Progress = field(default_factory=Progress)
    replicas: Replicas | None = None
    """Groups of ranks that hold the tables, if any but one."""

    def __post_init__(self) -> None:
        unwrapped_dense(unwrapped(self.model)).set_compute(self.execution.compute)
        self.learning_rate = Schedule(self.optimizer, self.schedule)
        self.guard = FiniteGuard(unwrapped(self.model).dense, self.device, hold=self.train.non_finite == "stop")
        self.pipeline = GuardedPipeline(self.model, self.optimizer, self.device, self.guard)
        self.meter = StepMeter(self.model, self.pipeline, self.device, self.execution)
        self.trace = StepTrace(self.checkpoints.output, self.train.profile, self.device)
        self.saver = Saver(self.checkpoints, self.saving)
        self._share: Share | None = None
        self._unread: list[_Trained] = []
        self._loss = torch.zeros((), dtype=torch.float64, device=self.device)

    def fit(self, validate: Callable[[], dict[str, float]] | None, metric: str) -> None:
        """Train until the last epoch, or until `metric` has not improved for `train.patience` epochs (collective).

        Args:
            validate: returns the validation figures by name, the same on all ranks (collective); None: every epoch is
                trained, and none is best.
            metric: the figure that decides the best checkpoint and early stopping; higher is better.

        Raises:
            Stopped: a rank received a stop signal; everything is saved.
            InputError: a loss or gradient was not finite and may not be skipped; or something cannot be written.
        """
        progress = self.progress
        if self.saving.asynchronous:
            self.saver.copy_state(state_of(self.model, self.optimizer))  # allocates the memory before the first step
        total, epoch = self._total_entries(), progress.position.epoch
        log = RunLog(self.checkpoints.output, total, progress.read, epoch, progress.step)
        with signals.handle_stop_signals(), self.saver, log, self.trace:
            try:
                while not progress.finished:
                    self._run_epoch(log, validate, metric)
            except Stopped:
                self._save_within_epoch()
                self.saver.finish()
                log_message(
                    f"Stopped after step {progress.step}: a rank received a stop signal. Everything is saved in "
                    f"{self.checkpoints.latest()}; the same command resumes from it"
                )
                raise

    def _run_epoch(self, log: RunLog, validate: Callable[[], dict[str, float]] | None, metric: str) -> None:
        progress, epoch, started = self.progress, self.progress.position.epoch, time.perf_counter()
        with self.execution.applied():
            waited = self._train_epoch(epoch, log)
        speed = self.meter.epoch()
        loss = progress.loss / max(progress.targets, 1)
        last = epoch + 1 >= self.train.epochs
        record = {"epoch": epoch + 1, "step": progress.step, "loss": loss, "data_wait": waited}
        record |= {"train_s": time.perf_counter() - started, **speed.record()}
        validated = last or (epoch + 1) % self.train.validate_every == 0
        if validate is not None and validated:
            started = time.perf_counter()
            self.pipeline.detach()
            self._average_replicas()
            with watchdog.phase("validating"):
                figures = validate()
            if figures[metric] > progress.best_value:
                progress.best_value, progress.best_epoch, progress.best_step = figures[metric], epoch, progress.step
            record |= {**figures, "validate_s": time.perf_counter() - started}
        idle = epoch - progress.best_epoch
        # Stop after a validation only: patience may be shorter than the time between two.
        progress.finished = last or bool(
            validated and self.train.patience and progress.best_epoch >= 0 and idle >= self.train.patience
        )
        log.log_epoch(record, speed, progress.step)
        progress.position, progress.loss, progress.targets = Position(epoch + 1), 0.0, 0.0
        self.save()

    def _train_epoch(self, epoch: int, log: RunLog) -> float:
        """Train the rest of an epoch; returns the share of time spent waiting for data."""
        progress, rank, world = self.progress, dist.get_rank(), dist.get_world_size()
        self._share = share = self.stream.batches(epoch, progress.position, rank, world)
        lockstep = Lockstep(self.meter.watch(iter(share)), self.stream.maker.empty, self.saver.requests_checkpoint)
        self.model.train()
        start = logged_at = time.perf_counter()
        logged_wait = 0.0
        logged, first = (progress.loss, progress.targets), progress.step
        self.meter.start_epoch()
        while True:
            # Dropout depends on the step only: a resumed run computes what an uninterrupted one would.
            seed_device((self.seed * 1_000_003 + progress.step) * 4099 + rank, self.device)
            lr_share = self.learning_rate.set_rates(progress.step, progress.read / self._total_entries())
            watchdog.report_phase("a training step", progress.step)
            self.trace.begin(progress.step + 1)
            self.meter.begin(progress.step)
            try:
                loss, _ = self.pipeline.progress(lockstep)
            except StopIteration:
                break
            if progress.step == first:
                self._check_pipelined()
            step = lockstep.handed_out.popleft()
            self._count(step, share, loss)
            if self.replicas is not None:
                self.replicas.after_step(progress.step)
            self.meter.end(step.targets)
            log.add_entries(step.entries, epoch)
            if progress.step % LOG_EVERY == 0:
                self._sum_losses()
                now = time.perf_counter()
                mean = (progress.loss - logged[0]) / max(progress.targets - logged[1], 1)
                wait = (lockstep.waited_s - logged_wait) / (now - logged_at)
                log.log_step(progress.step, loss=mean, lr=lr_share, waited=wait, speed=self.meter.newest())
                logged_at, logged_wait = now, lockstep.waited_s
                logged = progress.loss, progress.targets
            if self.saver.is_due(progress.step, step.checkpoint_requested):
                self._save_within_epoch()
        self.trace.end_epoch()
        self._sum_losses()
        return lockstep.waited_s / (time.perf_counter() - start)

    def _count(self, step: Step, share: Share, loss: torch.Tensor) -> None:
        """Count a step as done; whether it was finite may be read later."""
        progress, queue = self.progress, None
        if step.cursor is not None:
            queue = share.left[step.cursor.worker]
            share.done(step.cursor)
        # Without looking: the flag and the loss stay on the device.
        self._loss += torch.where(self.guard.bad, 0.0, loss) * (step.targets / dist.get_world_size())
        progress.targets += step.targets
        progress.step += 1
        progress.read += step.entries
        self._unread.append(_Trained(progress.step, step, queue, loss))
        if self.guard.on_host:
            self._read_flags()

    def _sum_losses(self) -> None:
        """Add the losses of all ranks since the last call to the epoch's loss (collective)."""
        self._read_flags()
        dist.all_reduce(self._loss)
        self.progress.loss += float(self._loss)
        self._loss.zero_()

    def _read_flags(self) -> None:
        """Read which of the steps done were not finite, and handle them (collective)."""
        done, self._unread = self._unread, []
        for trained, parts in zip(done, self.guard.read(), strict=True):
            if parts is not None:
                self._handle_non_finite(trained, parts)

    def _handle_non_finite(self, trained: "_Trained", parts: list[str]) -> None:
        """Describe a step that was not finite; count it as skipped, or end the run (collective).

        Args:
            trained: the step.
            parts: those of `finite.PARTS` that were not finite on this rank.
        """
        places: list[Place] = []
        step = trained.step
        if parts and self._share is not None and trained.queue is not None:
            assert step.cursor is not None and step.users is not None
            groups = self._share.groups_of(step.cursor, trained.queue)
            places = find_rows(self.stream.dataset, groups, step.users)
        epoch, loss = self.progress.position.epoch + 1, float(trained.loss)
        description = describe_step(self.checkpoints.output, trained.number, epoch, parts, loss, places)
        self.progress.targets -= step.targets
        self.progress.skipped += 1
        skipped, limit = self.progress.skipped, self.train.non_finite_limit
        if self.train.non_finite == "skip" and skipped <= limit:
            return log_message(f"{description}. Step skipped, {skipped} of at most {limit}")
        self.saver.finish()
        latest = self.checkpoints.latest()
        raise InputError(
            f"{description}. Nothing of the step reached tables or decoder. "
            + (f"{latest} is complete. " if latest else "No checkpoint was written before. ")
            + "Check these rows; start again in another --output with a smaller --tables.lr or --optimizer.lr; or skip "
            "such steps: --train.non_finite skip"
            + (f" --train.non_finite_limit {2 * self.progress.skipped}" if self.train.non_finite == "skip" else "")
        )

    def _total_entries(self) -> float:
        return max(1, self.entries) * self.train.epochs

    def _check_pipelined(self) -> None:
        """Fail if the pipeline does not handle every sharded table: torchrec only logs that, and trains slowly."""
        sharded = sum(isinstance(m, ShardedEmbeddingBagCollection) for m in self.model.modules())
        pipelined = len(self.pipeline._pipelined_modules)
        if pipelined != sharded:
            raise RuntimeError(
                f"the train pipeline found {pipelined} of the model's {sharded} sharded tables: the others' input was "
                "changed between batch and table, so their communication would not overlap with the step before"
            )

    def _save_within_epoch(self) -> None:
        """Save a checkpoint that holds what is left of the epoch (collective)."""
        self._sum_losses()
        local_queues = [] if self._share is None else self._share.left
        queues = [queue for rank_queues in gather_objects(local_queues) for queue in rank_queues]
        self.progress.position = Position(self.progress.position.epoch, queues)
        self.save()

    def save(self) -> None:
        """Save a checkpoint of all that a run needs to resume; training may continue at once (collective)."""
        progress = self.progress
        self._average_replicas()
        best_step = progress.best_step
        metadata = {**self.metadata, "progress": progress.state_dict()}
        metadata["best"] = {
            "checkpoint": None if best_step is None else os.path.basename(self.checkpoints.path(best_step)),
            "epoch": progress.best_epoch + 1,
            "value": progress.best_value,
        }
        with watchdog.phase("saving"):
            self.saver.save(progress.step, state_of(self.model, self.optimizer), metadata)

    def _average_replicas(self) -> None:
        if self.replicas is not None:
            self.replicas.average()

    def resume(self, checkpoint: str) -> None:
        """Resume from a checkpoint, written on any number of ranks and with any sharding (collective).

        Raises:
            InputError: the checkpoint cannot be read.
        """
        self.progress = Progress.of_checkpoint(checkpoint)
        with watchdog.phase("restoring"):
            restore(self.model, self.optimizer, checkpoint, self.progress.before + self.progress.step)
        self.saver.saved_step = self.progress.step

    def begin_from(self, checkpoint: str) -> None:
        """Start from the model and optimizer state of another run's checkpoint (collective).

        Table rows that it does not hold stay as they are. Progress and the learning-rate schedule start at 0.

        Raises:
            InputError: the checkpoint cannot be read.
        """
        earlier = Progress.of_checkpoint(checkpoint)
        self.progress.before = earlier.before + earlier.step
        restore(self.model, self.optimizer, checkpoint, self.progress.before)
