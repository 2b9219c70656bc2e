"""How good retrieved lists are: hits of held-out items, and how much of the exact lists an approximate search found."""

import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from recgpt_torchrec.data.histories import Histories
from recgpt_torchrec.data.ragged import Int64, Ragged
from recgpt_torchrec.evaluation.metrics import RankingMetrics, list_ranks
from recgpt_torchrec.evaluation.ranking import reduce_metrics
from recgpt_torchrec.retrieval.index import Float32
from recgpt_torchrec.retrieval.merging import Merged
from recgpt_torchrec.retrieval.retriever import Retriever


class ListQuality:
    """Measures lists batch by batch, on all ranks together.

    Example: `quality.update(users, queries, history, lists)` for each batch, then `quality.result()`
    """

    def __init__(self, k: int, *, held_out: bool, exact: Retriever | None = None, every: int = 1) -> None:
        """
        Args:
            k: items of each list.
            held_out: whether histories come with an item to be hit.
            exact: makes the lists that those of an approximate search are compared with; None: they are exact.
            every: lists of each `every`-th user are compared.
        """
        self.k, self.held_out, self.exact, self.every = k, held_out, exact, every
        self._hits = RankingMetrics((k,))
        # Users compared, items of their exact lists that were found, items of their exact lists.
        self._found = torch.zeros(3, dtype=torch.float64)
        self.seconds = 0.0
        """Spent on exact lists, on this rank."""

    def update(self, users: Int64, queries: Float32, history: Histories | None, lists: Merged) -> None:
        """Take the lists of some users in.

        Args:
            users: [users] int64 ids.
            queries: [users, interests, dim] float32 that the lists were searched with.
            history: what was left out, and the held-out item; None: nothing.
            lists: of these users.
        """
        if history is not None and history.held_out is not None:
            self._hits.update(list_ranks(lists.items, torch.from_numpy(history.held_out)))
        some = np.flatnonzero(users % self.every == 0)
        if self.exact is not None and some.size:
            self._compare(self.exact, queries[some], None if history is None else history.seen, some, lists)

    def _compare(self, exact: Retriever, queries: Float32, seen: Ragged | None, some: Int64, lists: Merged) -> None:
        since = time.perf_counter()
        best = exact.lists(queries, None if seen is None else seen.take(some)).items
        found = (best[:, :, None] == lists.items[some][:, None, :]).any(dim=2) & (best >= 0)
        self._found += torch.tensor([len(some), found.sum(), (best >= 0).sum()])
        self.seconds += time.perf_counter() - since

    def result(self) -> dict[str, Any]:
        """`hits` and `recall`, where they were measured (collective)."""
        result: dict[str, Any] = {}
        if self.held_out:
            result["hits"] = reduce_metrics(self._hits).result()
        if self.exact is not None:
            dist.all_reduce(self._found)
            users, found, wanted = self._found.tolist()
            result["recall"] = {"users": int(users), f"recall@{self.k}": found / max(1.0, wanted)}
        return result
