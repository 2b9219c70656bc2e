"""Recall over several future interests (paper, section 3.4): the model answers, hears its own answer, and answers
again.

The first interest is the output at the newest entry of a history. Its best item is appended as a generated entry, the
output there is the second interest, and so on. Each interest recalls items; the lists are merged into one of the same
final length.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from recgpt_torchrec.data.batch import Sequences
from recgpt_torchrec.data.stream import BatchMaker
from recgpt_torchrec.data.windows import Cursor
from recgpt_torchrec.retrieval.metrics import Jagged

GENERATED = 1
"""Segment id of an entry that the model made itself."""


def masked(scores: Tensor, history: Jagged) -> Tensor:
    """`scores` [sequences, items] with -inf at the items of each history; changed in place."""
    values, offsets = (torch.as_tensor(part).to(scores.device) for part in history)
    rows = torch.repeat_interleave(torch.arange(scores.shape[0], device=scores.device), offsets.diff())
    scores[rows, values] = -torch.inf
    return scores


def appended(sequences: Sequences, items: np.ndarray, max_len: int) -> Sequences:
    """Each history with one generated entry `items` [sequences] at its end, the newest `max_len` entries kept."""
    start, stop = sequences.offsets[:-1], sequences.offsets[1:]
    start = np.maximum(start, stop - (max_len - 1))
    lengths = stop - start + 1
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ends = offsets[1:] - 1
    old = np.ones(int(offsets[-1]), dtype=bool)
    old[ends] = False
    where = np.arange(int(offsets[-1])) + np.repeat(start - offsets[:-1], lengths)
    segments = sequences.segments if sequences.segments is not None else np.zeros(sequences.items.size, dtype=np.int8)

    def with_last(values: np.ndarray, last: np.ndarray | int) -> np.ndarray:
        out = np.empty(old.size, dtype=values.dtype)
        out[old] = values[where[old]]
        out[ends] = last
        return out

    return Sequences(
        users=sequences.users,
        items=with_last(sequences.items, items),
        offsets=offsets,
        segments=with_last(segments, GENERATED),
    )


@torch.no_grad()
def interests(
    model: nn.Module,
    maker: BatchMaker,
    sequences: Sequences,
    first: Tensor,
    catalogue: Tensor,
    count: int,
) -> Tensor:
    """`count` interest vectors of each history by autoregressive steps (collective: every rank, also with no history).

    Args:
        model: in evaluation mode.
        maker: makes the batches of the histories that go on.
        sequences: histories, with `seen`: no item of them is appended.
        first: [sequences, dim] the first interest.
        catalogue: [items, dim] vectors that interests are scored against.
        count: interests of each history.

    Returns:
        [sequences, count, dim] float32.
    """
    vectors = [first]
    answered = torch.zeros(len(first), 0, dtype=torch.int64, device=first.device)
    for _ in range(count - 1):
        scores = vectors[-1] @ catalogue.t()
        if sequences.seen is not None and len(first):
            masked(scores, sequences.seen)
        scores.scatter_(1, answered, -torch.inf)
        best = scores.argmax(1) if len(first) else scores.new_zeros(0, dtype=torch.int64)
        answered = torch.cat([answered, best[:, None]], dim=1)
        longer = appended(sequences, best.cpu().numpy(), maker.max_len)
        sequences = Sequences(longer.users, longer.items, longer.offsets, longer.segments, seen=sequences.seen)
        _, (_, outputs) = model(maker.make(sequences, Cursor(), None, 0).to(first.device))
        vectors.append(outputs.float())
    return torch.stack(vectors, dim=1)


def top(scores: Tensor, k: int) -> Tensor:
    """The `k` best items of each row, [rows, k] int64, best first; -1 where fewer have a finite score."""
    values, items = scores.topk(min(k, scores.shape[1]), dim=1)
    items = items.masked_fill(values == -torch.inf, -1)
    short = k - items.shape[1]
    return torch.nn.functional.pad(items, (0, short), value=-1) if short > 0 else items


def merge_quota(lists: Sequence[Tensor], quotas: Sequence[int]) -> Tensor:
    """The first `quotas[i]` items of list i that no list before gave, list after list (the paper's m_n for two).

    Args:
        lists: [users, n] int64 each, best first, -1 where short; long enough to fill its quota with new items.
        quotas: items taken of each list.

    Returns:
        [users, sum of quotas] int64, all different, -1 where the lists run out.
    """
    merged = lists[0][:, : quotas[0]]
    for items, quota in zip(lists[1:], quotas[1:], strict=True):
        new = (items[:, :, None] != merged[:, None, :]).all(2) & (items >= 0)
        merged = torch.cat([merged, _first(items, new, quota)], dim=1)
    return merged


def merge_by_score(lists: Sequence[Tensor], scores: Sequence[Tensor], length: int) -> Tensor:
    """The `length` items with the best score in any list, each once, [users, length] int64, -1 where the lists run out.

    Args:
        lists: [users, n] int64 each.
        scores: [users, n] float32 each, the scores of the lists' items.
        length: of the merged list.
    """
    items, values = torch.cat(list(lists), dim=1), torch.cat(list(scores), dim=1)
    order = values.argsort(dim=1, descending=True, stable=True)
    items = items.gather(1, order)
    again = torch.tril(items[:, :, None] == items[:, None, :], diagonal=-1).any(2)
    return _first(items, ~again & (items >= 0), length)


def _first(items: Tensor, wanted: Tensor, count: int) -> Tensor:
    """The first `count` wanted items of each row, in order, filled up with -1."""
    place = torch.where(wanted, wanted.cumsum(1) - 1, count)
    out = items.new_full((items.shape[0], count + 1), -1)
    out.scatter_(1, place.clamp(max=count), items)
    return out[:, :count]
