"""The catalogue: vectors of all items, exact top-k, and ranks. The only place that scores all items.

Every rank holds all vectors, and only `gather` is collective. Once they are sharded by id range, `top_k` and `ranks`
will be: validation and the recall paths call them equally often on every rank, with no queries where a rank has run
out; prompt generation and `retrieve` do not yet.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recgpt_torchrec.catalogue.ranks import both_ranks
from recgpt_torchrec.data.ragged import Float32, Int64, Ragged
from recgpt_torchrec.model.recgpt import RecGPT

LOOKUP = 65536
"""Items looked up at once when the vectors are gathered."""
SCORES = {"cpu": 2**18, "cuda": 2**26}
"""Number of scores held at once: on CPU what fits its cache (1 MiB took half the time of 25 MiB), on a GPU 256 MiB."""
RANKED_SCORES = 2**24
"""Number of scores held at once while ranks are counted: 64 MiB; a block takes more calls than in a search."""
FEWEST_ROWS = 16
"""Minimum number of rows scored at once, so that a large catalogue is not read from memory for each row."""
FEW = 10
"""Up to this k, each item is found by an argmax over the scores: faster than torch.topk."""


class Best(NamedTuple):
    """The best items of each query, best first; among equal scores the smaller id first."""

    items: Tensor
    """[rows, k] int64; -1 where no item is left."""
    scores: Tensor
    """[rows, k] float32; -inf beside -1."""


class Catalogue:
    """Vectors of all items, with exact top-k and ranks.

    Example: `Catalogue.gather(unwrapped(model), items, device).top_k(queries, 50, seen)`
    """

    def __init__(self, vectors: Tensor) -> None:
        """
        Args:
            vectors: [items, dim] float32; row i is item i.
        """
        self.vectors = vectors

    @classmethod
    @torch.no_grad()
    def gather(cls, model: RecGPT, items: int, device: torch.device) -> "Catalogue":
        """Look up the vectors of all `items` ids that score outputs, in a sharded model (collective)."""
        blocks = (np.arange(first, min(first + LOOKUP, items)) for first in range(0, items, LOOKUP))
        return cls(torch.cat([model.look_up(device, items=block).outputs for block in blocks]))

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def device(self) -> torch.device:
        """Device of the vectors."""
        return self.vectors.device

    def is_finite(self) -> bool:
        """Whether no vector has a NaN or infinity."""
        return bool(torch.isfinite(self.vectors).all())

    def vectors_of(self, items: Tensor) -> Tensor:
        """[..., dim] float32 vectors of `items` [...] int64."""
        return self.vectors[items]

    def share(self, rank: int, world_size: int) -> tuple[Int64, Float32]:
        """Ids [n] int64 and vectors [n, dim] float32 that a rank writes; all ranks together write every item once."""
        ids = np.array_split(np.arange(len(self)), world_size)[rank]
        return ids, self.vectors[torch.from_numpy(ids)].cpu().numpy()

    def top_k(self, queries: Tensor, k: int, seen: Ragged | None = None, forbidden: Tensor | None = None) -> Best:
        """The `k` items with the largest inner product with each query, exactly.

        Args:
            queries: [rows, dim] float32.
            k: items per query.
            seen: items to leave out, by row.
            forbidden: [rows, any] int64 further items to leave out, by row.
        """
        blocks = []
        for rows, scores in self._score_blocks(queries, SCORES[queries.device.type]):
            if seen is not None:
                mask_seen(scores, seen.part(rows.start, rows.stop))
            if forbidden is not None:
                scores.scatter_(1, forbidden[rows], -torch.inf)
            blocks.append(best_items(scores, k))
        if not blocks:
            return Best(queries.new_zeros((0, k), dtype=torch.int64), queries.new_zeros((0, k)))
        return Best(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))

    def ranks(self, queries: Tensor, targets: Tensor, seen: Ragged) -> tuple[Tensor, Tensor]:
        """The masked and the unmasked rank of each row's target among all items (see `catalogue.ranks`).

        Args:
            queries: [rows, dim] float32.
            targets: [rows] int64 item ids.
            seen: items of each row's history.

        Returns:
            [rows] float32 each; inf where the target is in the history (masked).
        """
        blocks = [
            both_ranks(scores, targets[rows], seen.part(rows.start, rows.stop))
            for rows, scores in self._score_blocks(queries, RANKED_SCORES)
        ]
        if not blocks:
            return queries.new_zeros(0), queries.new_zeros(0)
        masked, unmasked = (torch.cat(parts) for parts in zip(*blocks, strict=True))
        return masked, unmasked

    def _score_blocks(self, queries: Tensor, held: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield blocks of rows with their scores of all items [rows, items], about `held` scores at once."""
        at_once = max(FEWEST_ROWS, held // max(1, len(self)))
        for start in range(0, len(queries), at_once):
            rows = slice(start, min(start + at_once, len(queries)))
            yield rows, queries[rows] @ self.vectors.t()


def mask_seen(scores: Tensor, seen: Ragged) -> None:
    """Set `scores` [rows, items] to -inf at the items of each row of `seen`, in place."""
    values, owners = (torch.from_numpy(part).to(scores.device) for part in (seen.values, seen.owners))
    scores[owners, values] = -torch.inf


def best_items(scores: Tensor, k: int) -> Best:
    """The `k` best items of each row of `scores` [rows, items] that are not -inf, as `Best`. Overwrites `scores`."""
    rows, items = scores.shape
    if k <= FEW:
        ids = torch.full((rows, k), -1, dtype=torch.int64, device=scores.device)
        values = torch.full((rows, k), -torch.inf, dtype=scores.dtype, device=scores.device)
        for place in range(min(k, items)):
            largest = _first_argmax(scores)[:, None]
            ids[:, place], values[:, place] = largest[:, 0], scores.gather(1, largest)[:, 0]
            if place + 1 < k:
                scores.scatter_(1, largest, -torch.inf)
        return Best(ids.masked_fill_(values == -torch.inf, -1), values)
    count = min(k, items)
    values, ids = scores.topk(min(k + 1, items), dim=1)
    if values.shape[1] > count:  # ids decide where the last item equals one left out
        (tied,) = torch.nonzero(
            (values[:, count - 1] == values[:, count]) & (values[:, count] != -torch.inf), as_tuple=True
        )
        values, ids = values[:, :count].contiguous(), ids[:, :count].contiguous()
        if tied.numel():
            ordered = scores[tied].sort(dim=1, descending=True, stable=True)
            values[tied], ids[tied] = ordered.values[:, :count], ordered.indices[:, :count]
    ids, order = ids.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    ids = ids.gather(1, order).masked_fill(values == -torch.inf, -1)
    missing = k - count
    if missing:
        ids = torch.nn.functional.pad(ids, (0, missing), value=-1)
        values = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
    return Best(ids, values)


def _first_argmax(scores: Tensor) -> Tensor:
    """[rows, items] -> [rows] int64, the first of equal ones. On CPU numpy takes a third of torch's time."""
    if scores.device.type == "cpu":
        return torch.from_numpy(scores.numpy().argmax(1))
    return scores.argmax(1)
