"""The catalogue: vectors of all items, exact top-k, and ranks. The only place that scores all items.

Today every rank holds all vectors. Whoever needs scores of all items asks here, so that holding them by id range on
the ranks is a matter of this package alone.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from recgpt_torchrec.catalogue.ranks import both_ranks
from recgpt_torchrec.data.bags import ITEM, bags_of
from recgpt_torchrec.data.ragged import Ragged

LOOKUP = 65536
"""Items looked up at once when the vectors are gathered."""
SCORES = {"cpu": 2**18, "cuda": 2**26}
"""Scores held at once: on CPU what its cache holds (blocks of 1 MiB took half the time of 25 MiB), on a GPU 256 MiB."""
RANKED_SCORES = 2**24
"""Scores held at once while ranks are counted: 64 MiB; a count costs more calls than a search."""
FEWEST_ROWS = 16
"""Rows scored at once however large the catalogue is, or it would be read from memory for each row."""
FEW = 10
"""So many best items are found by a pass over the scores each, which is faster than torch.topk for a few."""


class Best(NamedTuple):
    """The best items of each query, best first; of equal ones the smaller id comes first."""

    items: Tensor
    """[rows, k] int64; -1 where no item is left."""
    scores: Tensor
    """[rows, k] float32; -inf beside -1."""


class Catalogue:
    """Vectors of all items.

    Example: `Catalogue.gather(model.scoring_table, items, device).top_k(queries, 50, seen)`
    """

    def __init__(self, vectors: Tensor) -> None:
        """
        Args:
            vectors: [items, dim] float32; row i is item i.
        """
        self.vectors = vectors

    @classmethod
    @torch.no_grad()
    def gather(cls, table: nn.Module, items: int, device: torch.device) -> "Catalogue":
        """The vectors of a sharded item table, through its own lookup (collective)."""
        parts = []
        for first in range(0, items, LOOKUP):
            bags: Any = bags_of(ITEM, np.arange(first, min(first + LOOKUP, items)))
            parts.append(table(bags.to(device)).wait().values().float().clone())
        return cls(torch.cat(parts))

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def device(self) -> torch.device:
        """Where the vectors are."""
        return self.vectors.device

    def is_finite(self) -> bool:
        """Whether no vector has a NaN or infinity."""
        return bool(torch.isfinite(self.vectors).all())

    def vectors_of(self, items: Tensor) -> Tensor:
        """[..., dim] float32 vectors of `items` [...] int64."""
        return self.vectors[items]

    def share(self, rank: int, world_size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Ids [n] int64 and vectors [n, dim] float32 that a rank writes; the ranks' shares are every item once."""
        ids = np.array_split(np.arange(len(self)), world_size)[rank]
        return ids, self.vectors[torch.from_numpy(ids)].cpu().numpy()

    def top_k(self, queries: Tensor, k: int, seen: Ragged | None = None, forbidden: Tensor | None = None) -> Best:
        """The `k` items with the largest inner product with each query, exactly.

        Args:
            queries: [rows, dim] float32.
            k: items per query.
            seen: items of each row that do not compete.
            forbidden: [rows, any] int64 further items that do not compete.
        """
        found = []
        for rows, scores in self._scored(queries, SCORES[queries.device.type]):
            if seen is not None:
                mask_seen(scores, seen.part(rows.start, rows.stop))
            if forbidden is not None:
                scores.scatter_(1, forbidden[rows], -torch.inf)
            found.append(best_items(scores, k))
        if not found:
            return Best(queries.new_zeros((0, k), dtype=torch.int64), queries.new_zeros((0, k)))
        return Best(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def ranks(self, queries: Tensor, targets: Tensor, seen: Ragged) -> tuple[Tensor, Tensor]:
        """The masked and the unmasked rank of each row's target among all items (see `catalogue.ranks`).

        Args:
            queries: [rows, dim] float32.
            targets: [rows] int64 item ids.
            seen: items of each row's history.

        Returns:
            [rows] float32 each; inf where the target is in the history (masked).
        """
        found = [
            both_ranks(scores, targets[rows], seen.part(rows.start, rows.stop))
            for rows, scores in self._scored(queries, RANKED_SCORES)
        ]
        if not found:
            return queries.new_zeros(0), queries.new_zeros(0)
        masked, unmasked = (torch.cat(parts) for parts in zip(*found, strict=True))
        return masked, unmasked

    def _scored(self, queries: Tensor, held: int) -> Iterator[tuple[slice, Tensor]]:
        """Stretches of the rows, and their scores of all items [rows, items], about `held` at once."""
        at_once = max(FEWEST_ROWS, held // max(1, len(self)))
        for start in range(0, len(queries), at_once):
            rows = slice(start, min(start + at_once, len(queries)))
            yield rows, queries[rows] @ self.vectors.t()


def mask_seen(scores: Tensor, seen: Ragged) -> Tensor:
    """`scores` [rows, items] with -inf at the items of each row of `seen`; changed in place."""
    values, owners = (torch.from_numpy(part).to(scores.device) for part in (seen.values, seen.owners))
    scores[owners, values] = -torch.inf
    return scores


def best_items(scores: Tensor, k: int) -> Best:
    """The `k` best items of each row of `scores` [rows, items] that are not -inf; of equal ones the smaller id first.

    `scores` are changed in place.
    """
    rows, items = scores.shape
    if k <= FEW:
        found = torch.full((rows, k), -1, dtype=torch.int64, device=scores.device)
        best = torch.full((rows, k), -torch.inf, dtype=scores.dtype, device=scores.device)
        for place in range(min(k, items)):
            answer = _first_argmax(scores)[:, None]
            found[:, place], best[:, place] = answer[:, 0], scores.gather(1, answer)[:, 0]
            if place + 1 < k:
                scores.scatter_(1, answer, -torch.inf)
        return Best(found.masked_fill_(best == -torch.inf, -1), best)
    taken = min(k, items)
    best, found = scores.topk(min(k + 1, items), dim=1)
    if best.shape[1] > taken:  # where an item that was left out equals the last one taken, ids decide
        (tied,) = torch.nonzero((best[:, taken - 1] == best[:, taken]) & (best[:, taken] != -torch.inf), as_tuple=True)
        best, found = best[:, :taken].contiguous(), found[:, :taken].contiguous()
        if tied.numel():
            ordered = scores[tied].sort(dim=1, descending=True, stable=True)
            best[tied], found[tied] = ordered.values[:, :taken], ordered.indices[:, :taken]
    found, order = found.sort(dim=1)
    best, order = best.gather(1, order).sort(dim=1, descending=True, stable=True)
    found = found.gather(1, order).masked_fill(best == -torch.inf, -1)
    short = k - taken
    if short:
        found = torch.nn.functional.pad(found, (0, short), value=-1)
        best = torch.nn.functional.pad(best, (0, short), value=-torch.inf)
    return Best(found, best)


def _first_argmax(scores: Tensor) -> Tensor:
    """[rows, items] -> [rows] int64, of equal ones the first. On CPU numpy's takes a third of the time of torch's."""
    if scores.device.type == "cpu":
        return torch.from_numpy(scores.numpy().argmax(1))
    return scores.argmax(1)
