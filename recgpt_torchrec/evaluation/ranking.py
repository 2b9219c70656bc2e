"""Ranks of held-out items over the whole catalogue, for every user of a dataset, on all ranks together."""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recgpt_torchrec.data.batch import ITEM, SequenceBatch, Sequences
from recgpt_torchrec.data.stream import SequenceStream, part_of
from recgpt_torchrec.data.windows import deal
from recgpt_torchrec.distributed.lockstep import Lockstep
from recgpt_torchrec.evaluation.metrics import RankingMetrics, both_ranks

LOOKUP = 65536
"""Items looked up at once when the catalogue is gathered."""
SCORES = 2**24
"""Scores held at once: 64 MiB in float32."""

Results = dict[str, dict[str, float]]
"""{"masked": {"HR@5": ..., ...}, "unmasked": {...}}"""


@torch.no_grad()
def gather_table(table: nn.Module, rows: int, device: torch.device, feature: str = ITEM) -> Tensor:
    """The whole of a sharded one-id-a-bag table, [rows, dim] float32, on every rank (collective)."""
    parts = []
    for first in range(0, rows, LOOKUP):
        ids = torch.arange(first, min(first + LOOKUP, rows))
        kjt = KeyedJaggedTensor(keys=[feature], values=ids, lengths=torch.ones_like(ids, dtype=torch.int32))
        parts.append(table(kjt.to(device)).wait().values().float().clone())
    return torch.cat(parts)


def batches_of(stream: SequenceStream) -> Iterator[SequenceBatch]:
    """Every batch of an evaluation stream that this rank owns, in step with the other ranks."""
    rank, workers = dist.get_rank(), stream.workers
    queues = deal(stream.windows(0), dist.get_world_size() * workers)
    mine = queues[rank * workers : (rank + 1) * workers]
    return Lockstep(stream.epoch(0, mine), stream.maker.empty)


@torch.no_grad()
def encode(model: nn.Module, stream: SequenceStream, device: torch.device) -> Iterator[tuple[Sequences, Tensor]]:
    """Histories and the vectors [sequences, dim] the model makes of them, batch by batch (collective)."""
    was_training = model.training
    model.eval()
    for batch in batches_of(stream):
        _, (_, vectors) = model(batch.to(device))
        assert batch.sequences is not None
        yield batch.sequences, vectors.float()
    model.train(was_training)


def measure(
    batches: Iterator[tuple[Sequences, Tensor]],
    score: Callable[[Sequences, Tensor], Tensor],
    items: int,
    ks: tuple[int, ...],
) -> tuple[int, Results]:
    """HR and NDCG at `ks`, masked and unmasked, over the users of all ranks (collective at the end).

    Args:
        batches: histories with held-out items, and whatever belongs to them ([sequences, ...]).
        score: of a few sequences, [sequences, items] float32 scores over the whole catalogue.
        items: size of the catalogue.
        ks: list lengths.

    Returns:
        users: how many were ranked.
        results: the figures.
    """
    at_once = max(1, SCORES // items)
    masked, unmasked = RankingMetrics(ks), RankingMetrics(ks)
    for sequences, vectors in batches:
        for first in range(0, sequences.users.size, at_once):
            part = part_of(sequences, first, min(first + at_once, sequences.users.size))
            scores = score(part, vectors[first : first + at_once])
            assert part.held_out is not None and part.seen is not None
            targets = torch.from_numpy(part.held_out)
            for metrics, found in zip((masked, unmasked), both_ranks(scores, targets, part.seen), strict=True):
                metrics.update(found.cpu())
    results: Results = {"masked": reduced(masked).result(), "unmasked": reduced(unmasked).result()}
    return masked.users, results


def reduced(metrics: RankingMetrics) -> RankingMetrics:
    """The metrics over the users of all ranks (collective)."""
    if dist.is_initialized():
        dist.all_reduce(metrics.state())
    return metrics
