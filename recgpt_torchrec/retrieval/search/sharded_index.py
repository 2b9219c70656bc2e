"""An index in shards: queries travel to all ranks, each searches its shards, and the best return and merge.

Operations are rounds (see `catalogue.rounds`), so ranks may search different numbers of times.
"""

import numpy as np
import torch
from torch import Tensor

from recgpt_torchrec.catalogue.best import Best, merge_best
from recgpt_torchrec.catalogue.exchange import gather_rows, return_rows
from recgpt_torchrec.catalogue.rounds import Rounds
from recgpt_torchrec.data.ragged import Float32, Int64
from recgpt_torchrec.distributed.lockstep import raise_first_error
from recgpt_torchrec.distributed.processes import rank, world_size
from recgpt_torchrec.retrieval.search.index import Shard
from recgpt_torchrec.retrieval.search.restricted import Bool

PASS_BYTES = 2**26
"""Bytes of the queries of all ranks, and of the answers to them, that are exchanged at once."""


class ShardedIndex:
    """The shards of all ranks as one index (searching is collective).

    Example: `items, scores = ShardedIndex(own_shards, export.manifest.items, dim, rounds).search(queries, 50)`
    """

    def __init__(self, shards: list[Shard], items: int, dim: int, rounds: Rounds, allowed: Bool | None = None) -> None:
        """
        Args:
            shards: of this rank; a rank may have none.
            items: number of items in the shards of all ranks.
            dim: length of a vector.
            rounds: in which ranks search; every rank calls its `finish` after its last search.
            allowed: [items] bool, the same on all ranks, which items may be found; None: all.
        """
        self.shards, self.items, self.dim, self.allowed = shards, items, dim, allowed
        self._ask = rounds.add(self._serve)

    def search(self, queries: Float32, k: int) -> tuple[Int64, Float32]:
        """Find the items with the largest inner product.

        Args:
            queries: [queries, dim] float32, of this rank.
            k: items per query, at least 1.

        Returns:
            items: [queries, k] int64 ids, best first, of equal scores the smaller id; -1 at the end where fewer were
                found.
            scores: [queries, k] float32 inner products; -inf beside -1.
        """
        best: Best = self._ask(torch.from_numpy(np.ascontiguousarray(queries)), len(queries), k)
        return best.items.numpy(), best.scores.numpy()

    def _serve(self, sizes: Int64, queries: Tensor | None) -> Best:
        queries = torch.zeros(0, self.dim) if queries is None else queries
        rows, k, own_k = sizes[:, 0], int(sizes[:, 1].max()), int(sizes[rank(), 1])
        at_once = max(1, PASS_BYTES // (world_size() * (4 * self.dim + 24 * k)))
        answers = [Best(torch.zeros(0, own_k, dtype=torch.int64), torch.zeros(0, own_k))]
        for start in range(0, int(rows.max()), at_once):
            counts = (rows - start).clip(0, at_once)
            asked = gather_rows(queries[start : start + at_once], counts)
            found, failure = None, None
            try:
                found = self._search_shards(asked, k)
            except Exception as error:
                failure = error
            raise_first_error(failure)
            assert found is not None
            # Of each rank only the k best: [ranks, rows, k] return, and merge.
            items, scores = (return_rows(values, counts).transpose(0, 1).flatten(1) for values in found)
            answers.append(_merge(items, scores, own_k))
        return Best(*(torch.cat(parts) for parts in zip(*answers, strict=True)))

    def _search_shards(self, queries: Tensor, k: int) -> Best:
        """The `k` best items of this rank's shards."""
        found = [shard.search(queries.numpy(), k, self.allowed) for shard in self.shards]
        if not found:
            shape = (len(queries), k)
            return Best(torch.full(shape, -1, dtype=torch.int64), torch.full(shape, -torch.inf))
        items, scores = (torch.from_numpy(np.concatenate(values, axis=1)) for values in zip(*found, strict=True))
        return Best(items, scores) if len(found) == 1 else _merge(items, scores, k)


def _merge(items: Tensor, scores: Tensor, k: int) -> Best:
    """The `k` best of candidates [rows, any] in any order; -1 with -inf is none."""
    items, order = items.sort(dim=1)
    return merge_best(items, scores.gather(1, order), k)
