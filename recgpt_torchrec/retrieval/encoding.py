"""From histories to interest vectors: runs a model over a stream of histories, in lockstep with the other ranks."""

from collections.abc import Iterator

import torch
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
