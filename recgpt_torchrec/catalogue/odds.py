"""The odds that a query's next item is one of its history, by the softmax over all items, from blocks of vectors."""

import torch
from torch import Tensor

from recgpt_torchrec.catalogue.pairs import Pairs, TilePairs

SCORES = {"cpu": 2**20, "cuda": 2**26}
"""Number of scores held at once: 4 MiB, on a GPU 256 MiB."""
WIDTH = 4096
"""Maximum number of items of a tile."""


class OddsFinder:
    """Sums exp(score) over the items of each query's history and over all others, as logarithms.

    Example:
        finder = OddsFinder(queries, history, items=len(vectors))
        finder.update(vectors, first=0)
        seen, others = finder.log_sums
    """

    def __init__(self, queries: Tensor, history: Pairs, items: int) -> None:
        """
        Args:
            queries: [rows, dim] float32.
            history: items by row, each once.
            items: number of items that will come; decides how tiles are cut.
        """
        self.queries = queries
        self.width = min(WIDTH, max(1, items))
        self.rows = max(1, SCORES[queries.device.type] // self.width)
        self.pairs = TilePairs(history, self.rows, queries.device, whole=False)
        self.log_sums = queries.new_full((2, len(queries)), -torch.inf, dtype=torch.float64)
        """[2, rows] float64 so far: log of the sum over the history, and over the other items; -inf where empty."""

    def update(self, vectors: Tensor, first: int) -> None:
        """Add the items `first`, `first` + 1, ... with `vectors` [block, dim] float32."""
        for number, start in enumerate(range(0, len(self.queries), self.rows)):
            queries, sums = self.queries[start : start + self.rows], self.log_sums[:, start : start + self.rows]
            for place in range(0, len(vectors), self.width):
                scores = queries @ vectors[place : place + self.width].t()
                _, places = self.pairs.find(scores.shape[1], number, first + place)
                seen, owners = scores.view(-1)[places].double(), places // scores.shape[1]
                scores.view(-1).scatter_(0, places, -torch.inf)
                sums[0] = torch.logaddexp(sums[0], _sum_by_owner(seen, owners, len(queries)))
                sums[1] = torch.logaddexp(sums[1], scores.logsumexp(1).double())


def _sum_by_owner(values: Tensor, owners: Tensor, count: int) -> Tensor:
    """[count] log of the sum of exp(value) over each owner's `values` [n]; -inf for one without."""
    largest = values.new_full((count,), -torch.inf).scatter_reduce_(0, owners, values, "amax")
    shares = (values - largest[owners]).exp()
    return largest + values.new_zeros(count).index_add_(0, owners, shares).log()
