"""Exchanges between ranks: rows that travel to all ranks and answers that return, values that go to chosen ranks.

With one rank nothing is copied. Everything here is collective.
"""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from recgpt_torchrec.data.ragged import Int64
from recgpt_torchrec.distributed.processes import rank, world_size


def gather_rows(rows: Tensor, counts: Int64) -> Tensor:
    """The rows of all ranks in order of rank, [sum of counts, ...].

    Args:
        rows: [n, ...] of this rank.
        counts: [ranks] int64 rows of each rank; all ranks know them.
    """
    if world_size() == 1:
        return rows
    room = int(counts.max())
    padded = rows.new_zeros(room, *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:count] for part, count in zip(gathered, counts.tolist(), strict=True)])


def return_rows(values: Tensor, counts: Int64) -> Tensor:
    """Each rank's answers to this rank's rows, [ranks, n, ...].

    Args:
        values: [sum of counts, ...] this rank's answers to the rows of all ranks.
        counts: [ranks] int64 rows of each rank.
    """
    if world_size() == 1:
        return values[None]
    own = int(counts[rank()])
    received = values.new_empty(world_size() * own, *values.shape[1:])
    dist.all_to_all_single(received, values.contiguous(), [own] * world_size(), counts.tolist())
    return received.view(world_size(), own, *values.shape[1:])


def send(values: Tensor, counts: Int64) -> tuple[Tensor, Int64]:
    """Send rows to chosen ranks.

    Args:
        values: [n, ...] in order of the rank they go to.
        counts: [ranks] int64 rows for each rank.

    Returns:
        The rows received, in order of the rank they come from, and [ranks] int64 how many come from each.
    """
    arriving = torch.empty(world_size(), dtype=torch.int64)
    dist.all_to_all_single(arriving, torch.from_numpy(counts))
    received = values.new_empty(int(arriving.sum()), *values.shape[1:])
    dist.all_to_all_single(received, values.contiguous(), arriving.tolist(), counts.tolist())
    return received, arriving.numpy()


def sort_by_rank(owners: Int64) -> tuple[Int64, Int64]:
    """The stable order [n] int64 of values by the rank they go to, and [ranks] int64 how many go to each."""
    return np.argsort(owners, kind="stable"), np.bincount(owners, minlength=world_size()).astype(np.int64)
