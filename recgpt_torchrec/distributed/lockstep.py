"""Ranks in step: the same number of batches on each, and the number of targets of every step known to all."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from recgpt_torchrec.data.batch import SequenceBatch
from recgpt_torchrec.data.windows import Cursor
from recgpt_torchrec.distributed import signals, watchdog
from recgpt_torchrec.distributed.processes import gather_objects
from recgpt_torchrec.distributed.signals import Stopped
from recgpt_torchrec.errors import InputError


class Step(NamedTuple):
    """What all ranks know of one step."""

    cursor: Cursor | None
    """Where this rank stands in its queue after it; None: it had an empty batch."""
    targets: float
    """Positions predicted, on all ranks together."""
    read: float
    """Interactions of the dataset accounted for, on all ranks together."""
    asked: bool = False
    """Whether a rank asked for a checkpoint when it fetched the batch."""
    users: np.ndarray | None = None
    """[sequences] int64: whose histories this rank's batch was made of; None: it had an empty batch."""


class Lockstep:
    """This rank's batches, going on with empty ones until every rank has run out.

    The agreement is one all-reduce of six numbers a step on the host, started one batch ahead, so that no step waits
    for it: targets of the step, interactions it read, how many ranks still had a batch, how many ask for a checkpoint,
    how many failed to make a batch: then all of them end, with the error of the first; and how many were asked to end
    by a signal: then all of them end with `Stopped`.

    Example: `for batch in Lockstep(iter(share), maker.empty): ...`
    """

    def __init__(
        self,
        batches: Iterator[SequenceBatch],
        empty: Callable[[], SequenceBatch],
        asks: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            batches: this rank's.
            empty: makes a batch of nothing.
            asks: whether this rank wants all of them to make a checkpoint.
        """
        self.batches, self.empty, self.asks = batches, empty, asks
        self.handed_out: deque[Step] = deque()
        """What is known of the batches that were taken; the trainer pops them as it trains them."""
        self.waited = 0.0
        """Seconds spent waiting for this rank's own batches."""
        self._failure: Exception | None = None
        self._ahead: deque[tuple[SequenceBatch, bool, torch.Tensor, dist.Work]] = deque()

    def _fetch(self) -> None:
        since = time.perf_counter()
        batch = None
        try:
            with watchdog.phase("reading data"):
                batch = next(self.batches, None)
        except Exception as error:  # raised here it would leave the others waiting for this rank
            self._failure = error
        self.waited += time.perf_counter() - since
        agreed = torch.zeros(6, dtype=torch.float64)
        agreed[3], agreed[4], agreed[5] = self.asks(), self._failure is not None, signals.received_signal() is not None
        if batch is not None:
            read = batch.histories.read
            agreed[0], agreed[1], agreed[2] = batch.target_slot.numel(), 0.0 if read is None else read.sum(), 1.0
        work = dist.all_reduce(agreed, async_op=True)
        self._ahead.append((batch or self.empty(), batch is not None, agreed, work))

    def __iter__(self) -> Iterator[SequenceBatch]:
        return self

    def __next__(self) -> SequenceBatch:
        """The next batch, with `global_targets` set.

        Raises:
            StopIteration: on every rank at the same step, once all have run out.
            Exception: on every rank at the same step, what kept one of them from making its batch.
            Stopped: on every rank at the same step, once one of them was asked to end by a signal.
        """
        while len(self._ahead) < 2:
            self._fetch()
        batch, real, agreed, work = self._ahead.popleft()
        work.wait()
        targets, read, ranks, asked, failed, stopped = agreed.tolist()
        if failed or stopped or not ranks:
            while self._ahead:  # the other ranks have the same collectives under way
                self._ahead.popleft()[3].wait()
            if failed:
                raise_first_error(self._failure)
            if stopped and ranks:
                raise Stopped
            raise StopIteration
        # Gradients are averaged over ranks, so each rank divides by the mean number of targets a rank.
        batch.global_targets = torch.tensor(targets / dist.get_world_size())
        mine = (batch.cursor, batch.histories.users) if real else (None, None)
        self.handed_out.append(Step(mine[0], targets, read, asked > 0, mine[1]))
        return batch


def raise_first_error(mine: Exception | None) -> None:
    """Raise the first failed rank's error on every rank; `mine` is this rank's, None: it has none (collective)."""
    users = isinstance(mine, InputError)
    failures = gather_objects(None if mine is None else (users, str(mine) if users else repr(mine)))
    if mine is not None:
        raise mine
    for rank, failure in enumerate(failures):
        if failure is not None:
            users, text = failure
            raise InputError(text) if users else RuntimeError(f"rank {rank} failed: {text}")
