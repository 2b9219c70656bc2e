"""Quality of retrieved lists: hits of held-out items, and recall of the exact lists by an approximate search."""

import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from recgpt_torchrec.data.histories import Histories
from recgpt_torchrec.data.ragged import Float32, Int64, Ragged
from recgpt_torchrec.evaluation.metrics import RankingMetrics, list_ranks, reduce_metrics
from recgpt_torchrec.retrieval.merging import Merged
from recgpt_torchrec.retrieval.search.retriever import Retriever


class ListQuality:
    """Hits and recall of lists, batch by batch, over all ranks.

    Example: `quality.update(users, queries, history, lists)` for each batch, then `quality.result()`
    """

    def __init__(
        self, k: int, *, held_out: bool, exact: Retriever | None = None, every: int = 1, by_place: bool = False
    ) -> None:
        """
        Args:
            k: items of each list.
            held_out: whether histories have a held-out item.
            exact: finds the exact lists to compare with; None: the lists are exact already.
            every: compare the lists of every `every`-th user.
            by_place: count users as they come, on each rank, and not by their ids: these may be any.
        """
        self.k, self.held_out, self.exact, self.every = k, held_out, exact, every
        self._by_place, self._users = by_place, 0
        self._hits = RankingMetrics((k,))
        # Users compared, items of their exact lists that were found, items of their exact lists.
        self._counts = torch.zeros(3, dtype=torch.float64)
        self.seconds = 0.0
        """Time spent on exact lists, on this rank."""

    def update(self, users: Int64, queries: Float32, history: Histories | None, lists: Merged) -> None:
        """Add the lists of some users.

        Args:
            users: [users] int64 ids.
            queries: [users, interests, dim] float32 interest vectors of the lists.
            history: items left out or weighed, and the held-out item; None: none are known or held out.
            lists: [users, k].
        """
        if history is not None and history.held_out is not None:
            self._hits.update(list_ranks(lists.items, torch.from_numpy(history.held_out)))
        counted = np.arange(self._users, self._users + len(users)) if self._by_place else users
        self._users += len(users)
        sampled = np.flatnonzero(counted % self.every == 0)
        if self.exact is not None and sampled.size:
            self._compare(self.exact, queries[sampled], None if history is None else history.seen, sampled, lists)

    def _compare(self, exact: Retriever, queries: Float32, seen: Ragged | None, sampled: Int64, lists: Merged) -> None:
        since = time.perf_counter()
        best = exact.lists(queries, None if seen is None else seen.take(sampled)).items
        in_lists = (best[:, :, None] == lists.items[sampled][:, None, :]).any(dim=2) & (best >= 0)
        self._counts += torch.tensor([len(sampled), in_lists.sum(), (best >= 0).sum()])
        self.seconds += time.perf_counter() - since

    def result(self) -> dict[str, Any]:
        """`hits` (HR and NDCG at k) and `recall`, where they were measured (collective)."""
        result: dict[str, Any] = {}
        if self.held_out:
            result["hits"] = reduce_metrics(self._hits).result()
        if self.exact is not None:
            dist.all_reduce(self._counts)
            users, recalled, wanted = self._counts.tolist()
            if users:
                result["recall"] = {"users": int(users), f"recall@{self.k}": recalled / max(1.0, wanted)}
        return result
