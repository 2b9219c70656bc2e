"""Runs the project's own trainer over a dataset's real stream, some steps at a time, as the benchmarks need it."""

import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from recgpt_torchrec import cli
from recgpt_torchrec.checkpoints.folder import Checkpoints
from recgpt_torchrec.config import Pretrain
from recgpt_torchrec.data.batch import SequenceBatch
from recgpt_torchrec.data.inputs.choosing import choose_inputs
from recgpt_torchrec.data.stream import BatchMaker, SequenceStream
from recgpt_torchrec.data.windows import Position, Queue, Window
from recgpt_torchrec.distributed.devices import choose_device
from recgpt_torchrec.training import meter
from recgpt_torchrec.training.building import build, choose_tokens, open_dataset, training_stream
from recgpt_torchrec.training.execution import Execution
from recgpt_torchrec.training.runlog import RunLog
from recgpt_torchrec.training.trainer import Trainer
from tools.benchmarks.measuring import Figures, stopwatch

CONFIG = Path(__file__).parents[2] / "configs/beauty.yaml"
PLAIN = {"loss.candidates": "sampled", "loss.negatives": 3000, "batch.thinning": 0.0, "batch.step_tokens": "null"}
"""What benchmarks change of it: a loss whose cost does not grow with the catalogue, whole histories, as a plain loop
has them, and tokens of a step, which each benchmark gives."""


@dataclass(frozen=True, kw_only=True)
class FirstBatches(BatchMaker):
    """Makes the first batches of each queue only."""

    steps: int

    def batches(
        self, windows: list[Window], queue: Queue, worker: int, epoch: int, shuffle: bool
    ) -> Iterator[SequenceBatch]:
        """See `BatchMaker.batches`."""
        return itertools.islice(super().batches(windows, queue, worker, epoch, shuffle), self.steps)


def parse(data: str, output: str, options: dict[str, Any]) -> Pretrain:
    """The configuration of a run on a dataset: configs/beauty.yaml, `PLAIN` and options, `{"batch.tokens": 1536}`."""
    words = [word for name, value in {**PLAIN, **options}.items() for word in (f"--{name}", str(value))]
    return cli.parse(Pretrain, "tools.benchmark", ["--config", str(CONFIG), "--data", data, "--output", output, *words])


class Training:
    """The trainer, stream and model of a configuration, for turns of some steps (collective).

    Validation and checkpoints are left out; all else of a step is there: stream, lockstep, pipeline, guard, log.

    Example: `Training("runs/beauty/data", {"batch.tokens": 1536}, steps=40).turn()["targets_s"]`
    """

    def __init__(self, data: str, options: dict[str, Any], steps: int | None, warm_up: int = 5) -> None:
        """
        Args:
            data: folder of the dataset.
            options: see `parse`.
            steps: maximum number of steps in a turn; None: an epoch.
            warm_up: number of steps before the first turn.
        """
        self.folder = tempfile.TemporaryDirectory(prefix="benchmark-")
        self.config = config = parse(data, self.folder.name, options)
        self.dataset, device = open_dataset(config), choose_device(config.device)
        execution = Execution.choose(config.train, config.model, config.loss, device)
        tokens = choose_tokens(config, config.model, self.dataset, device)
        inputs = choose_inputs(config, self.dataset)
        self.whole_stream = training_stream(config, config.model, self.dataset, tokens.rank, execution, inputs=inputs)
        self.stream = self._first(steps) if steps is not None else self.whole_stream
        self.model, optimizer = build(
            config,
            config.model,
            self.dataset,
            capacity=self.stream.maker.capacity,
            device=device,
            inputs=inputs,
            attributes=self.stream.maker.attributes,
        )
        self.trainer = Trainer(
            model=self.model,
            optimizer=optimizer,
            device=device,
            execution=execution,
            stream=self.stream,
            entries=self.dataset.manifest.entries,
            # So many epochs that the learning rate hardly falls.
            train=replace(config.train, epochs=10_000),
            schedule=config.optimizer,
            saving=config.saving,
            checkpoints=Checkpoints(self.folder.name, 1),
            metadata={},
            seed=config.seed,
        )
        self.epoch = 0
        if warm_up:
            self.trainer.stream = self._first(warm_up)
            self.turn()
            self.trainer.stream = self.stream

    def _first(self, steps: int) -> SequenceStream:
        maker = self.whole_stream.maker
        values = {f.name: getattr(maker, f.name) for f in fields(maker)}
        return SequenceStream(FirstBatches(**values, steps=steps), self.whole_stream.settings)

    def turn(self) -> Figures:
        """Train the first steps of the next epoch.

        Returns:
            targets_s: targets per second, on all ranks.
            step_ms: milliseconds per step.
            data_wait: share of the time spent waiting for data.
            flops_s: operations of matrix products per second, on rank 0.
            seconds, cores: see `stopwatch`.
        """
        trainer, progress = self.trainer, self.trainer.progress
        progress.position, progress.targets, progress.loss, step = Position(self.epoch), 0.0, 0.0, progress.step
        with (
            trainer.execution.applied(),
            self._log() as log,
            stopwatch() as figures,
        ):
            lockstep = trainer._open_epoch()
            trainer._train_steps(lockstep, None, log)
            flops_s = self.trainer.meter.epoch().flops_per_s
        self.epoch += 1
        return {
            "targets_s": progress.targets / figures["seconds"],
            "step_ms": 1e3 * figures["seconds"] / max(1, progress.step - step),
            "data_wait": lockstep.waited_s / figures["seconds"],
            "flops_s": flops_s,
            **figures,
        }

    def _log(self) -> RunLog:
        return RunLog(self.folder.name, self.dataset.manifest.entries, 0.0, self.epoch, self.trainer.progress.step)

    def split(self) -> Figures:
        """A turn in which every step is split: share of the time of each part, see `meter.PARTS`."""
        with mock.patch.object(meter, "LOG_EVERY", 1):
            self.turn()
        shares = self.trainer.meter.epoch().split
        return {part: shares.get(part, 0.0) for part in meter.PARTS}

    @cached_property
    def targets(self) -> int:
        """Number of targets of this rank's share of an epoch."""
        share = self.whole_stream.batches(0, rank=dist.get_rank(), world_size=dist.get_world_size())
        return sum(batch.targets for batch in share)
