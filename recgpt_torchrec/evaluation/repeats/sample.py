"""The users that the repeat bias is fitted on: a sample of those that are ranked, the same on any number of ranks."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from recgpt_torchrec.catalogue.catalogue import Catalogue
from recgpt_torchrec.catalogue.ranks import in_history
from recgpt_torchrec.data.ragged import Int64, Ragged, join
from recgpt_torchrec.data.reading.hashing import Hashes, hash_numbers
from recgpt_torchrec.distributed.processes import gather_objects, log_message, run_on_first_rank
from recgpt_torchrec.evaluation.metrics import RankingMetrics, reduce_metrics
from recgpt_torchrec.evaluation.repeats.fitting import fit_bias

USERS = 8192
"""Maximum number of users of the sample. The standard error of the bias is about 1 / sqrt(repeats) where repeats are
few."""


class RepeatSample:
    """Keeps the vectors, histories and held-out items of the users with the smallest hashes, then fits the bias.

    Example: `sample.add(users, vectors, held_out, seen)` per batch, then `sample.fit(catalogue)`
    """

    def __init__(self, users: int = USERS, seed: int = 0) -> None:
        self.users, self.seed = users, seed
        self.share = 0.0
        """Share of the sample's users whose held-out item is in their history; 0 before `fit`."""
        self._hashes: Hashes = np.zeros(0, np.uint64)
        self._held_out = torch.zeros(0, dtype=torch.int64)
        self._vectors: list[Tensor] = []
        self._seen: list[Ragged] = []
        self._largest = np.uint64(2**64 - 1)

    def add(self, users: Int64, vectors: Tensor, held_out: Tensor, seen: Ragged) -> None:
        """Add some users.

        Args:
            users: [users] int64 ids, each once in all calls.
            vectors: [users, dim] float32 first interests.
            held_out: [users] int64 items, on the host.
            seen: items of their whole histories.
        """
        hashes = hash_numbers(users, self.seed)
        rows = np.flatnonzero(hashes <= self._largest)
        self._hashes = np.concatenate([self._hashes, hashes[rows]])
        self._held_out = torch.cat([self._held_out, held_out[torch.from_numpy(rows)]])
        self._vectors.append(vectors[torch.from_numpy(rows).to(vectors.device)])
        self._seen.append(seen.take(rows))
        if self._hashes.size > 2 * self.users:
            self._keep(np.argsort(self._hashes)[: self.users])
            self._largest = self._hashes[-1]

    def _keep(self, rows: Int64) -> None:
        """Keep some of the users, in the order of `rows`."""
        chosen = torch.from_numpy(rows)
        self._hashes, self._held_out = self._hashes[rows], self._held_out[chosen]
        vectors = torch.cat(self._vectors)
        self._vectors = [vectors[chosen.to(vectors.device)]]
        self._seen = [join(self._seen).take(rows)]

    def fit(self, catalogue: Catalogue) -> float:
        """The bias, the same on every rank (collective); 0, with a message, where no user says anything of it."""
        nobody = torch.zeros(0, catalogue.dim, device=catalogue.device)
        self.add(np.zeros(0, np.int64), nobody, torch.zeros(0, dtype=torch.int64), Ragged.from_lists([]))
        hashes = np.sort(np.concatenate(gather_objects(self._hashes)))[: self.users]
        largest = hashes[-1] if hashes.size else np.uint64(0)
        self._keep(np.flatnonzero(self._hashes <= largest))
        (vectors,), (seen,) = self._vectors, self._seen
        log_odds = catalogue.log_odds(vectors, seen).cpu().numpy()
        own = self._hashes, log_odds, in_history(self._held_out, seen).numpy()
        shares = gather_objects(own)

        def fit() -> tuple[float | None, float]:
            of_users, odds, is_repeat = (np.concatenate(parts) for parts in zip(*shares, strict=True))
            order = np.argsort(of_users)  # so that sums do not depend on the number of ranks
            return fit_bias(odds[order], is_repeat[order]), float(is_repeat.mean()) if is_repeat.size else 0.0

        bias, self.share = run_on_first_rank(fit)
        if bias is None:
            log_message("Repeat bias 0: no user with a validation item has a history to fit it on")
            return 0.0
        return bias

    def measure(self, catalogue: Catalogue, bias: float, ks: Sequence[int]) -> dict[str, float]:
        """HR and NDCG at `ks` of the sample's users, where items of the history compete (collective); after `fit`.

        Args:
            catalogue: items to rank among.
            bias: added to the scores of items of the history.
            ks: list lengths.
        """
        (vectors,), (seen,) = self._vectors, self._seen
        metrics = RankingMetrics(ks)
        metrics.update(catalogue.ranks(vectors, self._held_out, seen, bias)[1].cpu())
        return reduce_metrics(metrics).result()
