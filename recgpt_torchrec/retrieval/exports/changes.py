"""What changes from the state of a chain to new vectors: which rows are new, have moved, or are gone."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.distributed as dist

from recgpt_torchrec.data.ragged import Float32, Int64
from recgpt_torchrec.distributed.processes import gather_objects, rank, world_size
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.retrieval.exports.chain import Chain

ROWS_AT_ONCE = 2**12
"""Number of rows whose distances are calculated at once, in float64."""


class Changes:
    """Selects the rows that a chain does not have, or has elsewhere, and counts them.

    Example: `Share(dataset, "items", (64,), "float32", Changes(chain, "items", items, 0.01))`
    """

    def __init__(self, chain: Chain, kind: str, count: int, tolerance: float) -> None:
        """
        Args:
            chain: what to compare with.
            kind: `items` or `users`.
            count: number of ids of the dataset. One bit is held for each.
            tolerance: a vector has moved where its distance to that of the chain is larger than this times the length
                of that of the chain; of several interests one is enough.
        """
        self.chain, self.kind, self.tolerance = chain, kind, tolerance
        self.new = 0
        """Number of rows of this process that the chain does not have."""
        self.seen = np.zeros((count + 7) // 8, np.uint8)
        """One bit per id: whether this process was asked about it."""

    def __call__(self, ids: Int64, vectors: Float32) -> npt.NDArray[np.bool_]:
        """Whether each row is new or has moved, [n] bool, by its ids [n] and vectors [n, ...] as they will be read."""
        np.bitwise_or.at(self.seen, ids >> 3, (1 << (ids & 7)).astype(np.uint8))
        earlier, is_there = self.chain.vectors_of(self.kind, ids)
        self.new += int(ids.size - is_there.sum())
        return ~is_there | has_moved(earlier, vectors, self.tolerance)

    def count_new(self) -> int:
        """Number of rows of all processes that the chain does not have (collective)."""
        return sum(gather_objects(self.new))

    def gather_seen(self) -> npt.NDArray[np.uint8]:
        """`seen` of all processes together (collective)."""
        if world_size() > 1:
            dist.all_reduce(torch.from_numpy(self.seen))  # a sum: no id is on two of them
        return self.seen


def has_moved(earlier: Float32, now: Float32, tolerance: float) -> npt.NDArray[np.bool_]:
    """Whether vectors [n, dim] or [n, interests, dim] have moved by more than `tolerance` times their length, [n]."""
    moved = np.zeros(len(now), bool)
    for start in range(0, len(now), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        old = earlier[rows].astype(np.float64)  # squares of small numbers are 0 in float32
        distance, length = np.linalg.norm(now[rows] - old, axis=-1), np.linalg.norm(old, axis=-1)
        moved[rows] = (distance > tolerance * length).reshape(len(old), -1).any(axis=1)
    return moved


def removed_users(chain: Chain, seen: npt.NDArray[np.uint8]) -> Iterator[pa.RecordBatch]:
    """Yield user_id and key of the users of a chain that are gone: this process's share.

    Args:
        chain: the state before.
        seen: one bit per id, of those that are still there.

    Raises:
        InputError: a part is damaged.
    """
    for batch in chain.rows("users", ["user_id", "key"], rank=rank(), world_size=world_size()):
        ids = batch["user_id"].to_numpy()
        if ids.max() >= 8 * seen.size:
            raise InputError(
                f"{chain.last.path} has user {ids.max()}, but the dataset has {8 * seen.size} users at most; restore "
                "the chain, or export without --since"
            )
        is_gone = (seen[ids >> 3] >> (ids & 7)) & 1 == 0
        if is_gone.any():
            yield batch.filter(pa.array(is_gone))
