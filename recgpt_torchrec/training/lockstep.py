"""Ranks in step: the same number of batches on each, and the number of targets of every step known to all."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist

from recgpt_torchrec.data.batch import SequenceBatch
from recgpt_torchrec.data.windows import Cursor


class Step(NamedTuple):
    """What all ranks know of one step."""

    cursor: Cursor | None
    """Where this rank stands in its queue after it; None: it had an empty batch."""
    targets: float
    """Positions predicted, on all ranks together."""
    read: float
    """Interactions of the dataset accounted for, on all ranks together."""


class Lockstep:
    """This rank's batches, going on with empty ones until every rank has run out.

    The agreement is one all-reduce of two numbers a step on the host, started one batch ahead, so that no step waits
    for it: targets of the step, interactions it read, and how many ranks still had a batch.

    Example: `for batch in Lockstep(stream.epoch(0, queues), maker.empty): ...`
    """

    def __init__(self, batches: Iterator[SequenceBatch], empty: Callable[[], SequenceBatch]) -> None:
        self.batches, self.empty = batches, empty
        self.handed_out: deque[Step] = deque()
        """What is known of the batches that were taken; the trainer pops them as it trains them."""
        self.waited = 0.0
        """Seconds spent waiting for this rank's own batches."""
        self._ahead: deque[tuple[SequenceBatch, bool, torch.Tensor, dist.Work]] = deque()

    def _fetch(self) -> None:
        since = time.perf_counter()
        batch = next(self.batches, None)
        self.waited += time.perf_counter() - since
        agreed = torch.zeros(3, dtype=torch.float64)
        if batch is not None:
            read = batch.sequences.read
            agreed[0], agreed[1], agreed[2] = batch.target_slot.numel(), 0.0 if read is None else read.sum(), 1.0
        work = dist.all_reduce(agreed, async_op=True)
        self._ahead.append((batch or self.empty(), batch is not None, agreed, work))

    def __iter__(self) -> Iterator[SequenceBatch]:
        return self

    def __next__(self) -> SequenceBatch:
        """The next batch, with `global_targets` set.

        Raises:
            StopIteration: on every rank at the same step, once all have run out.
        """
        while len(self._ahead) < 2:
            self._fetch()
        batch, real, agreed, work = self._ahead.popleft()
        work.wait()
        targets, read, ranks = agreed.tolist()
        if not ranks:
            while self._ahead:  # the other ranks have the same collectives under way
                self._ahead.popleft()[3].wait()
            raise StopIteration
        # Gradients are averaged over ranks, so each rank divides by the mean number of targets a rank.
        batch.global_targets = torch.tensor(targets / dist.get_world_size())
        self.handed_out.append(Step(batch.cursor if real else None, targets, read))
        return batch
