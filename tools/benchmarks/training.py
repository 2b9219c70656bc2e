"""Runs the project's own trainer over a dataset's real stream, some steps at a time, as the benchmarks need it."""

import itertools
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property, wraps
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest import mock

import numpy as np
import torch.distributed as dist
from torch import nn

from recgpt_torchrec import cli
from recgpt_torchrec.checkpoints.folder import Checkpoints
from recgpt_torchrec.config import Pretrain
from recgpt_torchrec.data.batch import SequenceBatch
from recgpt_torchrec.data.stream import BatchMaker, SequenceStream
from recgpt_torchrec.data.windows import Position, Queue, Window
from recgpt_torchrec.distributed.devices import choose_device
from recgpt_torchrec.model.flops import Flops, attended_pairs, step_flops
from recgpt_torchrec.model.recgpt import unwrapped, unwrapped_dense
from recgpt_torchrec.training.building import build, choose_tokens, open_dataset, training_stream
from recgpt_torchrec.training.execution import Execution
from recgpt_torchrec.training.runlog import RunLog
from recgpt_torchrec.training.trainer import Trainer
from tools.benchmarks.measuring import Figures, stopwatch

CONFIG = Path(__file__).parents[2] / "configs/beauty.yaml"
PARTS = ("data wait", "lookup", "decoder", "loss", "backward", "optimizer", "communication", "other")
"""Parts of a step, see `Training.split`."""


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
    """The configuration of a run on a dataset: configs/beauty.yaml and further options, `{"batch.tokens": 1536}`."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
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
        tokens = choose_tokens(config, config.model, self.dataset, device)
        self.whole_stream = training_stream(config, config.model, self.dataset, tokens.rank)
        self.stream = self._first(steps) if steps is not None else self.whole_stream
        self.execution = Execution.choose(config.train, config.model, device)
        self.model, optimizer = build(
            config, config.model, self.dataset, batch_size=self.stream.maker.capacity.items, device=device
        )
        self.trainer = Trainer(
            model=self.model,
            optimizer=optimizer,
            device=device,
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
            seconds, cores: see `stopwatch`.
        """
        trainer, progress = self.trainer, self.trainer.progress
        progress.position, progress.targets, progress.loss, step = Position(self.epoch), 0.0, 0.0, progress.step
        with (
            self.execution.applied(),
            self._log() as log,
            stopwatch() as figures,
        ):
            waited = trainer._train_epoch(self.epoch, log)
        self.epoch += 1
        return {
            "targets_s": progress.targets / figures["seconds"],
            "step_ms": 1e3 * figures["seconds"] / max(1, progress.step - step),
            "data_wait": waited,
            **figures,
        }

    def _log(self) -> RunLog:
        return RunLog(self.folder.name, self.dataset.manifest.entries, 0.0, self.epoch, self.trainer.progress.step)

    def flops(self, epoch: int) -> Flops:
        """Operations of a turn: those of this rank's batches of an epoch."""
        total = [0.0, 0.0, 0.0]
        for batch in self.stream.batches(epoch, rank=dist.get_rank(), world_size=dist.get_world_size()):
            lengths = np.maximum(batch.histories.lengths - 1, 0)
            flops = step_flops(
                self.config.model,
                self.config.loss,
                tokens=float(lengths.sum()),
                targets=batch.targets,
                candidates=batch.candidate_bag.numel(),
                attended=attended_pairs(lengths.tolist()),
            )
            for place, value in enumerate((flops.decoder, flops.attention, flops.loss)):
                total[place] += value
        return Flops(*total)

    def split(self) -> Figures:
        """A turn with marks: share of the time of each of `PARTS`, by the host's clock (so on CPU only).

        lookup: the tables' forward. loss: forward of the loss, with its gradients where these are computed there, and
        gathering the vectors of slots. backward: everything in it, so the tables' fused update as well, but not what
        the host waits for in collectives. communication: these, and the exchange of ids. other: agreeing on steps,
        moving batches, the log.
        """
        marks = Marks()
        recgpt = unwrapped(self.model)
        dense = unwrapped_dense(recgpt)
        pipeline = self.trainer.pipeline
        with ExitStack() as stack:
            for module, name in ((recgpt, "lookup"), (dense, "loss"), (dense.decoder, "decoder")):
                stack.enter_context(marks.of_module(module, name))
            for name, part in (
                ("start_sparse_data_dist", "communication"),
                ("wait_sparse_data_dist", "communication"),
                ("_backward", "backward"),
                ("_optimizer_step", "optimizer"),
            ):
                stack.enter_context(mock.patch.object(pipeline, name, marks.around(getattr(pipeline, name), part)))
            stack.enter_context(mock.patch.object(dist, "all_reduce", marks.around(dist.all_reduce, "communication")))
            figures = self.turn()
        shares = {part: seconds / figures["seconds"] for part, seconds in marks.seconds.items()}
        shares["data wait"] = figures["data_wait"]
        shares["other"] = 1 - sum(shares.values())
        return {part: shares.get(part, 0.0) for part in PARTS}

    @cached_property
    def targets(self) -> int:
        """Number of targets of this rank's share of an epoch."""
        share = self.whole_stream.batches(0, rank=dist.get_rank(), world_size=dist.get_world_size())
        return sum(batch.targets for batch in share)


class Marks:
    """Seconds by part; time in a part within another counts for the inner one alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    def _switch(self) -> None:
        now = perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def enter(self, part: str) -> None:
        """Begin a part."""
        self._switch()
        self._open.append(part)

    def leave(self) -> None:
        """End the part that was begun last."""
        self._switch()
        self._open.pop()

    def around(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """The function, its time counted for a part."""

        @wraps(function)
        def marked(*args: Any, **options: Any) -> Any:
            self.enter(part)
            try:
                return function(*args, **options)
            finally:
                self.leave()

        return marked

    @contextmanager
    def of_module(self, module: nn.Module, part: str) -> Iterator[None]:
        """Count a module's forward for a part within the `with`."""
        hooks = [
            module.register_forward_pre_hook(lambda *_: self.enter(part), prepend=True),
            module.register_forward_hook(lambda *_: self.leave(), always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
