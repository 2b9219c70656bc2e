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
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.keyed import KeyedOptimizer

from recgpt_torchrec.config import CheckpointOptions, Optimizer, Train
from recgpt_torchrec.data.stream import SequenceStream
from recgpt_torchrec.data.windows import Position, Queue, deal
from recgpt_torchrec.training.checkpoint import Checkpoints, facts_of
from recgpt_torchrec.training.lockstep import Lockstep
from recgpt_torchrec.training.runlog import RunLog
from recgpt_torchrec.training.saving import Saver
from recgpt_torchrec.training.schedule import Schedule
from recgpt_torchrec.training.state import restore, state_of

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
    saving: CheckpointOptions
    checkpoints: Checkpoints
    facts: dict[str, Any]
    """What every checkpoint says of itself: configuration, vocabulary, sharding plan."""
    seed: int
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.course = Schedule(self.optimizer, self.schedule)
        self.pipeline = TrainPipelineSparseDist(self.model, self.optimizer, self.device)
        self.saver = Saver(self.checkpoints, self.saving)

    def fit(self, validate: Callable[[], dict[str, float]], metric: str) -> Progress:
        """Train until the last epoch, or until `metric` has not grown for `train.patience` epochs.

        Args:
            validate: collective; the validation figures, the same on all ranks.
            metric: the figure that decides about the best checkpoint and early stopping.
        """
        progress = self.progress
        if self.saving.asynchronous:
            self.saver.copy(state_of(self.model, self.optimizer))  # takes the memory before the first step
        log = RunLog(self.checkpoints.output, self._total(), progress.read, progress.position.epoch, progress.step)
        with self.saver, log:
            while not progress.finished:
                self._epoch(log, validate, metric)
        return progress

    def _epoch(self, log: RunLog, validate: Callable[[], dict[str, float]], metric: str) -> None:
        progress, epoch, started = self.progress, self.progress.position.epoch, time.perf_counter()
        loss, waited = self._train_epoch(epoch, log)
        progress.position = Position(epoch + 1)
        last = epoch + 1 >= self.train.epochs
        record = {"epoch": epoch + 1, "step": progress.step, "loss": loss, "data_wait": waited}
        record["train_s"] = time.perf_counter() - started
        validated = last or (epoch + 1) % self.train.validate_every == 0
        if validated:
            started = time.perf_counter()
            self.pipeline.detach()
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
        self.save()

    def _train_epoch(self, epoch: int, log: RunLog) -> tuple[float, float]:
        """Train what is left of an epoch; returns its mean loss and the share of time spent waiting for data."""
        rank, world = dist.get_rank(), dist.get_world_size()
        workers = self.stream.workers
        dealt = deal(self.stream.windows(epoch), world * workers, self.progress.position)
        mine = dealt[rank * workers : (rank + 1) * workers]
        ahead = Lockstep(self.stream.epoch(epoch, mine), self.stream.maker.empty, self.saver.wanted)
        left = list(mine)
        self.model.train()
        began = since = time.perf_counter()
        seen = epoch_sum = epoch_seen = waited = 0.0
        loss_sum = torch.zeros((), device=self.device)
        while True:
            # Dropout depends on where the run stands only: a resumed run goes on as the uninterrupted one would.
            torch.manual_seed((self.seed * 1_000_003 + self.progress.step) * 4099 + rank)
            share = self.course.set(self.progress.step, self.progress.read / self._total())
            try:
                loss, _ = self.pipeline.progress(ahead)
            except StopIteration:
                break
            self._check_pipelined()
            step = ahead.handed_out.popleft()
            if step.cursor is not None:
                left[step.cursor.worker] = mine[step.cursor.worker].after(step.cursor)
            loss_sum += loss * (step.targets / world)
            seen += step.targets
            self.progress.step += 1
            self.progress.read += step.read
            log.read(step.read)
            if self.progress.step % LOG_EVERY == 0:
                sums = self._over_ranks(loss_sum)
                now = time.perf_counter()
                wait = ahead.waited - waited
                figures = {"loss": sums / max(seen, 1), "rate": seen / (now - since), "waited": wait / (now - since)}
                log.step(self.progress.step, epoch, lr=share, **figures)
                epoch_sum, epoch_seen, since, waited, seen = epoch_sum + sums, epoch_seen + seen, now, ahead.waited, 0.0
                loss_sum.zero_()
            every = self.saving.every_steps
            if step.asked or (every and self.progress.step % every == 0):
                self.progress.position = Position(epoch, self._gather(left))
                self.save()
        epoch_sum, epoch_seen = epoch_sum + self._over_ranks(loss_sum), epoch_seen + seen
        return epoch_sum / max(epoch_seen, 1), ahead.waited / (time.perf_counter() - began)

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

    def _over_ranks(self, value: torch.Tensor) -> float:
        value = value.clone()
        dist.all_reduce(value)
        return float(value)

    def _gather(self, mine: list[Queue]) -> list[Queue]:
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        return [queue for queues in everyone for queue in queues]

    def save(self) -> None:
        """Write a checkpoint of everything a run needs to go on; training may go on at once."""
        progress = self.progress
        best = progress.best_step
        facts = {**self.facts, "progress": progress.state_dict()}
        facts["best"] = {
            "checkpoint": None if best is None else os.path.basename(self.checkpoints.path(best)),
            "epoch": progress.best_epoch + 1,
            "value": progress.best_value,
        }
        self.saver.save(progress.step, state_of(self.model, self.optimizer), facts)

    def resume(self, checkpoint: str) -> None:
        """Go on from a checkpoint, whatever number of ranks and sharding it was written with."""
        self.progress = Progress.from_state_dict(facts_of(checkpoint)["progress"])
        restore(self.model, self.optimizer, checkpoint, self.progress.step)
        self.saver.saved = self.progress.step
