"""The training loop: pipelined steps in lockstep over ranks, validation, checkpoints, early stopping.

Of batches it knows what `lockstep.Step` holds: cursor, number of targets and entries, and the users, by which a
non-finite step's rows are found. The rest is the model's.
"""

import itertools
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.optim.keyed import KeyedOptimizer

from recgpt_torchrec.checkpoints.folder import Checkpoints, await_checkpoint
from recgpt_torchrec.checkpoints.repeat_bias import NAME as REPEAT_BIAS
from recgpt_torchrec.checkpoints.saving import Saver
from recgpt_torchrec.checkpoints.state import restore, state_of
from recgpt_torchrec.config import Optimizer, Saving, Train
from recgpt_torchrec.data.stream import SequenceStream, Share
from recgpt_torchrec.data.windows import Position, Queue
from recgpt_torchrec.distributed import signals, watchdog
from recgpt_torchrec.distributed.lockstep import Lockstep, Step
from recgpt_torchrec.distributed.processes import gather_objects, log_message, run_on_first_rank
from recgpt_torchrec.distributed.replicas import Replicas
from recgpt_torchrec.distributed.signals import Stopped
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.model.dropout import seed_device
from recgpt_torchrec.model.tabled.base import unwrapped, unwrapped_dense
from recgpt_torchrec.training.execution import Execution
from recgpt_torchrec.training.finite import FiniteGuard, GuardedPipeline, Place, describe_step, find_rows
from recgpt_torchrec.training.meter import LOG_EVERY, StepMeter
from recgpt_torchrec.training.progress import START, Progress
from recgpt_torchrec.training.runlog import PARTIAL, RunLog
from recgpt_torchrec.training.schedule import Length, Schedule
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

    Example: `Trainer(model=model, optimizer=optimizer, ...).fit(validate)`
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
        self.length = Length.of(self.train, self.entries)
        self.guard = FiniteGuard(unwrapped(self.model).dense, self.device, hold=self.train.non_finite == "stop")
        self.pipeline = GuardedPipeline(self.model, self.optimizer, self.device, self.guard)
        self.meter = StepMeter(self.model, self.pipeline, self.device, self.execution)
        self.trace = StepTrace(self.checkpoints.output, self.train.profile, self.device)
        self.saver = Saver(self.checkpoints, self.saving)
        self._share: Share | None = None
        self._unread: list[_Trained] = []
        self._loss = torch.zeros((), dtype=torch.float64, device=self.device)

    def fit(self, validate: Callable[[], dict[str, float]] | None) -> None:
        """Train to the run's last step, or for `train.patience` epochs without a better `train.metric` (collective).

        Args:
            validate: returns the validation figures by name, and the model's repeat bias (`repeat_bias`), the
                same on all ranks (collective); None: the whole run is trained, and no checkpoint is best.

        Raises:
            Stopped: a rank received a stop signal; everything is saved.
            InputError: a loss or gradient was not finite and may not be skipped; or something cannot be written.
        """
        progress, length = self.progress, self.length
        self.saver.prepare(state_of(self.model, self.optimizer))
        log = RunLog(
            self.checkpoints.output,
            length.total,
            length.done(progress),
            START if self._begins else progress.position.epoch,
            progress.step,
            progress.validated,
            unit=length.unit,
        )
        with signals.handle_stop_signals(), self.saver, log, self.trace:
            try:
                if self.train.validate_start and validate is not None and self._begins:
                    self._validate_start(log, validate)
                while not progress.finished:
                    self._run_epoch(log, validate)
            except Stopped:
                self._save_within_epoch()
                self.saver.finish()
                log_message(
                    f"Stopped after step {progress.step}: a rank received a stop signal. Everything is saved in "
                    f"{self.checkpoints.latest()}; the same command resumes from it"
                )
                raise

    @property
    def _begins(self) -> bool:
        """Whether nothing was done yet, not even the validation of the start."""
        progress = self.progress
        return progress.step == 0 and progress.position.epoch == 0 and progress.best_step is None

    def _validate_start(self, log: RunLog, validate: Callable[[], dict[str, float]]) -> None:
        """Validate and save the model before its first step; in history.jsonl it is epoch 0."""
        log.log_epoch({"epoch": 0, "step": 0, **self._validate(validate, START)}, None, 0)
        self.save()

    def _run_epoch(self, log: RunLog, validate: Callable[[], dict[str, float]] | None) -> None:
        """Train the rest of an epoch, or as much of it as the run has; validate within it and at its end, and save."""
        progress, train = self.progress, self.train
        epoch, started = progress.position.epoch, time.perf_counter()
        lockstep, validate_s = self._open_epoch(), 0.0
        while True:
            with self.execution.applied():
                self._train_steps(lockstep, self._steps_ahead(validate is not None), log)
            if self.length.has_all_steps(progress) or not lockstep.has_next():
                break
            assert validate is not None
            with self.meter.paused():
                record = {"epoch": epoch + 1, "step": progress.step, PARTIAL: True, "loss": progress.mean_loss}
                record |= self._validate(validate, epoch)
                validate_s += record["validate_s"]
                log.log_epoch(record, None, progress.step)
                self._save_within_epoch()
        partial = lockstep.has_next()
        lockstep.close()
        speed, train_s = self.meter.epoch(), time.perf_counter() - started - validate_s
        last = self.length.has_all_steps(progress) or self.length.is_last_epoch(epoch)
        record = {"epoch": epoch + 1, "step": progress.step, **({PARTIAL: True} if partial else {})}
        record |= {"loss": progress.mean_loss, "data_wait": lockstep.waited_s / train_s, "train_s": train_s}
        record |= speed.record()
        on_step = train.validate_steps > 0 and progress.step % train.validate_steps == 0
        validated = last or on_step or (epoch + 1) % train.validate_every == 0
        if validate is not None and validated:
            record |= self._validate(validate, epoch)
        idle = epoch - progress.best_epoch
        # Stop after a validation only: patience may be shorter than the time between two.
        progress.finished = last or bool(
            validated and train.patience and progress.best_step is not None and idle >= train.patience
        )
        log.log_epoch(record, speed, progress.step)
        if partial:
            return self._save_within_epoch()
        progress.position, progress.loss, progress.targets = Position(epoch + 1), 0.0, 0.0
        self.save()

    def _open_epoch(self) -> Lockstep:
        """The batches of the rest of the epoch."""
        position, first, maker = self.progress.position, self.progress.step, self.stream.maker
        self._share = share = self.stream.batches(position.epoch, position, dist.get_rank(), dist.get_world_size())
        self.meter.start_epoch()
        lockstep = Lockstep(
            self.meter.watch(iter(share)),
            lambda: maker.empty(position.epoch, first + lockstep.fetched),
            self.saver.requests_checkpoint,
        )
        return lockstep

    def _steps_ahead(self, validates: bool) -> int | None:
        """Steps until a validation within the epoch is due, or the run ends; None: neither comes before its end."""
        progress, every, ahead = self.progress, self.train.validate_steps, []
        if validates and every:
            since = progress.step % every
            # A run that was stopped within a validation resumes with it.
            is_due = since == 0 and progress.step > 0 and progress.validated != progress.step
            ahead.append(0 if is_due else every - since)
        if self.length.steps:
            ahead.append(max(0, self.length.steps - progress.step))
        return min(ahead, default=None)

    def _validate(self, validate: Callable[[], dict[str, float]], epoch: int) -> dict[str, Any]:
        """Validate, and note it if the figure is the best so far; returns what history.jsonl records (collective).

        `epoch` is counted from 0, or `START`.
        """
        progress, started = self.progress, time.perf_counter()
        self.pipeline.detach()  # `_train_steps` left it empty
        self._average_replicas()
        with watchdog.phase("validating"):
            figures = validate()
        progress.validated = progress.step
        progress.repeat_bias = figures.pop(REPEAT_BIAS, progress.repeat_bias)
        if (value := figures[self.train.metric]) > progress.best_value:
            progress.best_value, progress.best_step = value, progress.step
            progress.best_epoch = epoch
        return {**figures, "validate_s": time.perf_counter() - started}

    def _train_steps(self, lockstep: Lockstep, steps: int | None, log: RunLog) -> None:
        """Train `steps` steps, or the rest of the epoch if it is shorter (None: it).

        The pipeline, which takes batches two steps ahead, gets no batch beyond and so ends empty: each batch is trained
        once, wherever validations come between.
        """
        progress, epoch, rank = self.progress, self.progress.position.epoch, dist.get_rank()
        batches = lockstep if steps is None else itertools.islice(lockstep, steps)
        self.model.train()
        logged_at, logged_wait = time.perf_counter(), lockstep.waited_s
        logged, first = (progress.loss, progress.targets), progress.step
        while True:
            # Dropout depends on the step only: a resumed run computes what an uninterrupted one would.
            seed_device((self.seed * 1_000_003 + progress.step) * 4099 + rank, self.device)
            lr_share = self.learning_rate.set_rates(progress.step, self.length.share(progress))
            watchdog.report_phase("a training step", progress.step)
            self.trace.begin(progress.step + 1)
            self.meter.begin(progress.step)
            try:
                loss, _ = self.pipeline.progress(batches)
            except StopIteration:
                break
            if progress.step == first:
                self._check_pipelined()
            step = lockstep.handed_out.popleft()
            self._count(step, self._share, loss)
            if self.replicas is not None:
                self.replicas.after_step(progress.step)
            self.meter.end(step.targets)
            log.advance(1 if self.length.steps else step.entries, epoch)
            if progress.step % LOG_EVERY == 0:
                self._sum_losses()
                now = time.perf_counter()
                mean = (progress.loss - logged[0]) / max(progress.targets - logged[1], 1)
                wait = (lockstep.waited_s - logged_wait) / (now - logged_at)
                log.log_step(progress.step, loss=mean, lr=lr_share, waited=wait, speed=self.meter.newest())
                logged_at, logged_wait = now, lockstep.waited_s
                logged = progress.loss, progress.targets
            at_end = progress.step - first == steps  # where a validation comes, or the run ends, and then a checkpoint
            if not at_end and self.saver.is_due(progress.step, step.checkpoint_requested):
                self._save_within_epoch()
        self.trace.end_epoch()
        self._sum_losses()

    def _count(self, step: Step, share: Share | None, loss: torch.Tensor) -> None:
        """Count a step as done; whether it was finite may be read later."""
        progress, queue = self.progress, None
        if step.cursor is not None:
            assert share is not None
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
        self.progress.position = Position(self.progress.position.epoch, queues or None)
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
        await_checkpoint(checkpoint)
        self.progress = run_on_first_rank(lambda: Progress.of_checkpoint(checkpoint))
        restore(self.model, self.optimizer, checkpoint, self.progress.before + self.progress.step)
        self.saver.saved_step = self.progress.step

    def begin_from(self, checkpoint: str, initialise: Callable[[Mapping[str, int]], None]) -> None:
        """Start from the model, its repeat bias and the optimizer state of another run's checkpoint (collective).

        Progress and the learning-rate schedule start at 0.

        Args:
            checkpoint: its folder.
            initialise: fills the table rows that it does not hold, see `restore`.

        Raises:
            InputError: the checkpoint cannot be read.
        """
        earlier = run_on_first_rank(lambda: Progress.of_checkpoint(checkpoint))
        self.progress.before, self.progress.repeat_bias = earlier.before + earlier.step, earlier.repeat_bias
        restore(self.model, self.optimizer, checkpoint, self.progress.before, initialise)
