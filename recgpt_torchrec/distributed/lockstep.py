"""Keeps ranks in lockstep: all take the same number of steps, and each knows every step's global target count."""

import socket
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from recgpt_torchrec.data.windows import Cursor
from recgpt_torchrec.distributed import signals, watchdog
from recgpt_torchrec.distributed.processes import gather_objects
from recgpt_torchrec.distributed.signals import Stopped
from recgpt_torchrec.errors import InputError, OtherRanksError, StorageError

if TYPE_CHECKING:  # it needs torchrec, whose import takes 2.5 s: searching an export does without
    from recgpt_torchrec.data.batch import SequenceBatch


class Step(NamedTuple):
    """One step: this rank's batch, and the totals over all ranks."""

    cursor: Cursor | None
    """How far this rank's queue is read after the step; None: its batch was empty."""
    targets: float
    """Targets of the step, summed over ranks."""
    entries: float
    """Entries of the dataset that the step accounts for, summed over ranks."""
    checkpoint_requested: bool = False
    """Whether any rank requested a checkpoint when it fetched the batch."""
    users: np.ndarray | None = None
    """[sequences] int64 user ids of this rank's batch; None: its batch was empty."""


class _Totals(NamedTuple):
    """What ranks agree on per step, summed over them; the targets of each rank follow."""

    entries: float
    weight: float
    ranks_with_batch: float
    requests: float
    failed: float
    stopped: float


def _totals_of(agreed: torch.Tensor) -> tuple[_Totals, list[float]]:
    """The totals, and the targets of each rank, of what was reduced."""
    count = len(_Totals._fields)
    return _Totals(*agreed[:count].tolist()), agreed[count:].tolist()


class Lockstep:
    """Iterates over this rank's batches, then over empty ones until every rank has run out.

    Ranks agree by one all-reduce of some numbers per step on the host, started one batch ahead so that no step waits
    for it: the step's entries and the weight of its targets; the number of ranks that still had a batch, that requested
    a checkpoint, that failed to make a batch, and that received a stop signal; and the targets of each rank. After a
    failure all ranks raise the first failed rank's error; after a stop signal all raise `Stopped`.

    Example: `for batch in Lockstep(iter(share), stream.maker.empty): ...`
    """

    def __init__(
        self,
        batches: Iterator["SequenceBatch"],
        make_empty: Callable[[], "SequenceBatch"],
        requests_checkpoint: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            batches: this rank's batches.
            make_empty: makes a batch without sequences.
            requests_checkpoint: whether this rank requests a checkpoint; asked once per batch.
        """
        self.batches, self.make_empty, self.requests_checkpoint = batches, make_empty, requests_checkpoint
        self.handed_out: deque[Step] = deque()
        """Steps of the batches returned so far; the trainer pops each once it has trained it."""
        self.waited_s = 0.0
        """Seconds spent waiting for this rank's own batches."""
        self.fetched = 0
        """Number of batches that this rank has fetched or made, those without sequences included."""
        self._failure: Exception | None = None
        self._ended = False
        self._ahead: deque[tuple[SequenceBatch, bool, torch.Tensor, dist.Work | None]] = deque()

    def _fetch(self) -> None:
        since = time.perf_counter()
        batch = None
        try:
            with watchdog.phase("reading data"):
                batch = next(self.batches, None)
        except Exception as error:  # raised here, it would leave the other ranks waiting for this one
            self._failure = error
        self.waited_s += time.perf_counter() - since
        read = None if batch is None else batch.histories.read
        own = _Totals(
            entries=0.0 if read is None else float(read.sum()),
            weight=0.0 if batch is None else float(batch.global_targets),
            ranks_with_batch=batch is not None,
            requests=self.requests_checkpoint(),
            failed=self._failure is not None,
            stopped=signals.received_signal() is not None,
        )
        rank_targets = [0.0] * dist.get_world_size()
        rank_targets[dist.get_rank()] = 0.0 if batch is None else batch.targets
        agreed = torch.tensor([*own, *rank_targets], dtype=torch.float64)
        work = dist.all_reduce(agreed, async_op=True) if dist.get_world_size() > 1 else None
        self._ahead.append((batch or self.make_empty(), batch is not None, agreed, work))
        self.fetched += 1

    def __iter__(self) -> Iterator["SequenceBatch"]:
        return self

    def has_next(self) -> bool:
        """Whether `next` returns a batch or raises an error, not `StopIteration`; takes no batch (collective)."""
        if self._ended:
            return False
        self._fill()
        batch, has_batch, agreed, work = self._ahead[0]
        if work is not None:
            work.wait()
            self._ahead[0] = (batch, has_batch, agreed, None)
        totals, _ = _totals_of(agreed)
        return bool(totals.ranks_with_batch or totals.failed)

    def close(self) -> None:
        """End the iteration before its last batch, and wait for what was started with the other ranks (collective)."""
        self._ended = True
        self._wait_for_ahead()
        if isinstance(self.batches, Generator):
            self.batches.close()

    def _fill(self) -> None:
        while len(self._ahead) < 2:
            self._fetch()

    def _wait_for_ahead(self) -> None:
        """Wait for the collectives that the other ranks have started too."""
        for *_, started in self._ahead:
            if started is not None:
                started.wait()
        self._ahead.clear()

    def __next__(self) -> "SequenceBatch":
        """The next batch, with `global_targets` and `most_targets` set.

        Raises:
            StopIteration: all ranks have run out.
            Exception: a rank failed to make its batch.
            Stopped: a rank received a stop signal.
            Each is raised on every rank at the same step.
        """
        if self._ended:
            raise StopIteration
        self._fill()
        batch, has_batch, agreed, work = self._ahead.popleft()
        if work is not None:
            work.wait()
        totals, rank_targets = _totals_of(agreed)
        if totals.failed or totals.stopped or not totals.ranks_with_batch:
            self._wait_for_ahead()
            if totals.failed:
                raise_first_error(self._failure)
            if totals.stopped and totals.ranks_with_batch:
                raise Stopped
            self._ended = True
            raise StopIteration
        targets, batch.most_targets = sum(rank_targets), int(max(rank_targets))
        # Gradients are averaged over ranks, so each rank divides by the mean weight of the targets per rank.
        batch.global_targets = torch.tensor(totals.weight / dist.get_world_size())
        cursor, users = (batch.cursor, batch.histories.users) if has_batch else (None, None)
        self.handed_out.append(Step(cursor, targets, totals.entries, totals.requests > 0, users))
        return batch


def raise_first_error(error: Exception | None) -> None:
    """Raise an error on every rank if any rank has one (collective).

    Args:
        error: this rank's error, which it raises itself; None: it raises that of the first rank that has one.

    Raises:
        InputError, StorageError: the first failed rank's error is one.
        OtherRanksError: it is another error of the system.
        RuntimeError: it is any other; names the rank.
    """
    failures = gather_objects(None if error is None else _describe_error(error))
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise _make_error(rank, *failure)


def _describe_error(error: Exception) -> tuple[type[Exception], tuple[Any, ...], str]:
    """The type of an error for other ranks, what it is made of, and this node's name."""
    kind = next(each for each in (InputError, StorageError, OSError, Exception) if isinstance(error, each))
    if kind is OSError and isinstance(error, OSError) and error.errno is not None:
        return kind, (error.errno, error.strerror), socket.gethostname()
    return kind, (repr(error) if kind is Exception else str(error),), socket.gethostname()


def _make_error(rank: int, kind: type[Exception], arguments: tuple[Any, ...], host: str) -> Exception:
    if kind is Exception:
        return RuntimeError(f"rank {rank} failed: {arguments[0]}")
    if kind is not OSError:
        return kind(*arguments)
    error = OtherRanksError(*arguments)
    error.host = host
    return error
