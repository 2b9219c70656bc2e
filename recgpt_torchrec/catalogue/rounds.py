"""Rounds: ranks ask for collective operations, each as often as it needs them, until all ranks have finished.

Before each round the ranks tell each other what they ask for. Every operation that at least one rank asks for then runs
on all of them; ranks may ask for different ones in the same round. A rank with no more to ask calls `finish`, and takes
part in the others' rounds with nothing until all have finished. An operation raises its error on all ranks; no more
rounds follow, and `finish` returns at once.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from recgpt_torchrec.data.ragged import Int64
from recgpt_torchrec.distributed.processes import rank, world_size
from recgpt_torchrec.distributed.watchdog import beat

SIZES = 4
"""Numbers that a question may come with."""
FINISHED = -1
"""Says that a rank asks for nothing more."""

Operation = Callable[[Int64, Any], Any]
"""Called on all ranks with the sizes of each rank's question, [ranks, SIZES] int64, zeros for a rank that does not ask;
and with this rank's question, None where it does not ask. Its answer goes to the ranks that ask."""


class Rounds:
    """Serves operations to ranks that ask a different number of times. Alone, a rank just calls the operation.

    Example:
        rounds = Rounds()
        look_up = rounds.add(operation)
        vectors = [look_up(ids, ids.size) for ids in parts]  # ranks may have different numbers of parts
        rounds.finish()
    """

    def __init__(self) -> None:
        self._operations: list[Operation] = []
        self._is_over = False

    def add(self, operation: Operation) -> Callable[..., Any]:
        """Add an operation, in the same order on all ranks; the function returned asks for it (collective).

        That function takes the question, then up to `SIZES` numbers that all ranks are told before the operation runs.
        """
        number = len(self._operations)
        self._operations.append(operation)
        return lambda question, *sizes: self._ask(number, question, sizes)

    def finish(self) -> None:
        """Take part in the other ranks' rounds until all have finished (collective); a second call does nothing."""
        while world_size() > 1 and not self._is_over:
            asked, _ = self._take_part(FINISHED, None, ())
            self._is_over = bool((asked == FINISHED).all())

    def _ask(self, number: int, question: Any, sizes: tuple[int, ...]) -> Any:
        if world_size() == 1:
            return self._operations[number](_padded(sizes)[None], question)
        assert not self._is_over, "a rank asks after it has finished"
        return self._take_part(number, question, sizes)[1]

    def _take_part(self, number: int, question: Any, sizes: tuple[int, ...]) -> tuple[Int64, Any]:
        """One round: the number of each rank's operation [ranks] int64, and the answer to this rank's question."""
        beat()
        header = torch.from_numpy(np.concatenate([[number], _padded(sizes)]))
        received = [torch.empty_like(header) for _ in range(world_size())]
        dist.all_gather(received, header)  # on the host: over gloo, whatever the device
        headers = torch.stack(received).numpy()
        asked, all_sizes = headers[:, 0], headers[:, 1:]
        answer = None
        for each in np.unique(asked[asked != FINISHED]).tolist():
            asks = asked == each
            told = np.where(asks[:, None], all_sizes, 0)
            try:
                result = self._operations[each](told, question if asks[rank()] else None)
            except BaseException:
                self._is_over = True  # all ranks raise, so no rank may wait for another round
                raise
            answer = result if each == number else answer
        return asked, answer


def _padded(sizes: tuple[int, ...]) -> Int64:
    return np.array([*sizes, *[0] * (SIZES - len(sizes))], dtype=np.int64)
