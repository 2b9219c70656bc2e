"""Numbers by item, each rank holding those of its id range, and what asks the holders for some items' numbers."""

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from recgpt_torchrec.data.candidates import id_range
from recgpt_torchrec.data.ragged import Int64
from recgpt_torchrec.distributed.processes import gather_objects, rank, world_size

NONE = -(2**63)
"""What no held number may be."""


def ask_holders(items: Int64, held: npt.NDArray[np.integer], count: int) -> Int64:
    """The numbers of this rank's `items`, which travel to all ranks: the holder of each answers (collective).

    Args:
        items: [n] int64 item ids.
        held: [own items] numbers of the items of this rank's id range.
        count: number of all items.

    Returns:
        [n] int64.
    """
    if world_size() == 1:
        return held[items].astype(np.int64)
    first, stop = id_range(count, rank(), world_size())
    asked: list[Int64] = gather_objects(items)
    joined = np.concatenate(asked)
    own = (joined >= first) & (joined < stop)
    answers = torch.full((joined.size,), NONE, dtype=torch.int64)
    answers[torch.from_numpy(own)] = torch.from_numpy(held[joined[own] - first].astype(np.int64))
    dist.all_reduce(answers, op=dist.ReduceOp.MAX)
    start = sum(each.size for each in asked[: rank()])
    return answers[start : start + items.size].numpy()
