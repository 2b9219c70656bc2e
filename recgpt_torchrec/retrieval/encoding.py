"""From histories to interest vectors: runs a model over a stream of histories, in lockstep with the other ranks."""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recgpt_torchrec.data.histories import Histories
from recgpt_torchrec.data.stream import SequenceStream
from recgpt_torchrec.distributed.lockstep import Lockstep
from recgpt_torchrec.distributed.processes import rank, world_size


@torch.no_grad()
def encode(model: nn.Module, stream: SequenceStream, device: torch.device) -> Iterator[tuple[Histories, Tensor]]:
    """Yield batches of histories with their interest vectors [sequences, dim] float32 (collective)."""
    was_training = model.training
    model.eval()
    share = stream.batches(rank=rank(), world_size=world_size())
    for batch in Lockstep(iter(share), stream.maker.empty):
        _, (_, vectors) = model(batch.to(device))
        yield batch.histories, vectors.float()
    model.train(was_training)


Encoded = tuple[Histories, Tensor]
"""Histories with their interest vectors [sequences, dim] float32."""


def collect_batches(batches: Iterable[Encoded], rows: int | None) -> Iterator[list[Encoded]]:
    """Yield lists of encoded batches that are scored together, equally many on every rank (collective).

    Args:
        batches: of this rank; all ranks have equally many.
        rows: number of histories that a list has at most, on every rank, unless one batch has more; None: each batch is
            a list of its own.
    """
    if rows is None:
        yield from ([batch] for batch in batches)
        return
    collected: list[Encoded] = []
    for batch in batches:
        collected.append(batch)
        sizes = [histories.users.size for histories, _ in collected]
        room = torch.tensor([sum(sizes), max(sizes)])  # the next batch is taken to be as large as the largest
        if world_size() > 1:
            dist.all_reduce(room, op=dist.ReduceOp.MAX)
        if room.sum() > rows:
            yield collected
            collected = []
    if collected:
        yield collected
