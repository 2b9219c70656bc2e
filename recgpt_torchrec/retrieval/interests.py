"""Recall over several future interests (paper, section 3.4): the model answers, hears its own answer, and answers
again.

The first interest is the output at the newest entry of a history. Its best item is appended as a generated entry, the
output there is the second interest, and so on. Each interest recalls items; `retrieval.merging` makes one list of them.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from recgpt_torchrec.data.batch import Sequences
from recgpt_torchrec.data.segments import GENERATED
from recgpt_torchrec.data.stream import BatchMaker
from recgpt_torchrec.data.windows import Cursor
from recgpt_torchrec.evaluation.metrics import Jagged
from recgpt_torchrec.retrieval.merging import Lists

SCORES = 2**24
"""Scores held at once: 64 MiB in float32."""


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
        best = best_new(vectors[-1], catalogue, sequences.seen, answered)
        answered = torch.cat([answered, best[:, None]], dim=1)
        longer = appended(sequences, best.cpu().numpy(), maker.max_len)
        sequences = Sequences(longer.users, longer.items, longer.offsets, longer.segments, seen=sequences.seen)
        _, (_, outputs) = model(maker.make(sequences, Cursor(), None, 0).to(first.device))
        vectors.append(outputs.float())
    return torch.stack(vectors, dim=1)


def best_new(vectors: Tensor, catalogue: Tensor, seen: Jagged | None, answered: Tensor) -> Tensor:
    """[rows] int64: the best item for each of `vectors` [rows, dim] that is neither seen nor answered [rows, n]."""
    best = answered.new_zeros(len(vectors))
    for first, part, history in chunks(vectors, len(catalogue), seen):
        scores = part @ catalogue.t()
        if history is not None:
            masked(scores, history)
        scores.scatter_(1, answered[first : first + len(part)], -torch.inf)
        best[first : first + len(part)] = scores.argmax(1)
    return best


def found_by(vectors: Tensor, catalogue: Tensor, n: int, seen: Jagged | None) -> Lists:
    """The `n` best items of every interest, by exact search.

    Args:
        vectors: [users, interests, dim] float32.
        catalogue: [items, dim] float32.
        n: length of each list.
        seen: items of each user that do not compete; None: all compete.
    """
    parts = []
    for _, part, history in chunks(vectors, len(catalogue), seen):
        each = []
        for i in range(vectors.shape[1]):
            scores = part[:, i] @ catalogue.t()
            if history is not None:
                masked(scores, history)
            items = top(scores, n)
            each.append((items, scores.gather(1, items.clamp(min=0)).masked_fill(items < 0, -torch.inf)))
        parts.append(Lists(*(torch.stack(tensors, dim=1) for tensors in zip(*each, strict=True))))
    return Lists(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def chunks(vectors: Tensor, items: int, seen: Jagged | None) -> Iterator[tuple[int, Tensor, Jagged | None]]:
    """Rows of `vectors` whose scores of all items fit in memory: the first row's number, the rows, their `seen`."""
    at_once = max(1, SCORES // items)
    for first in range(0, max(1, len(vectors)), at_once):  # one chunk of nothing where there are no rows
        part, history = vectors[first : first + at_once], None
        if seen is not None:
            values, offsets = seen
            ends = offsets[first : first + len(part) + 1]
            history = (values[int(ends[0]) : int(ends[-1])], ends - ends[0])
        yield first, part, history


def top(scores: Tensor, k: int) -> Tensor:
    """The `k` best items of each row, [rows, k] int64, best first; -1 where fewer have a finite score."""
    values, items = scores.topk(min(k, scores.shape[1]), dim=1)
    items = items.masked_fill(values == -torch.inf, -1)
    short = k - items.shape[1]
    return torch.nn.functional.pad(items, (0, short), value=-1) if short > 0 else items
