"""Lists of a sample of users: how much of the catalogue they cover, how novel they are, and some of them to read.

The sample is that of the users with the smallest hashes, the same on any number of ranks, so that memory is bounded and
evaluations of the same users can be compared. Coverage grows with the number of users: it is told beside it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from recgpt_torchrec.data.candidates import id_range
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.histories import Histories, join
from recgpt_torchrec.data.ragged import Int64, Ragged
from recgpt_torchrec.data.reading.counts import read_counts
from recgpt_torchrec.data.reading.hashing import hash_numbers
from recgpt_torchrec.distributed.lockstep import raise_first_error
from recgpt_torchrec.distributed.processes import gather_objects, rank, world_size
from recgpt_torchrec.evaluation.holders import ask_holders

USERS = 8192
"""Maximum number of users whose lists are kept."""
EXAMPLES = 8
"""Number of users whose histories are kept too."""
NEWEST = 30
"""Maximum number of entries kept of these histories."""


class ListSample:
    """Keeps the masked lists of a sample of users, by recall path.

    Example: `sample.add(histories, {"pretrain": items})` per batch, `sample.settle()`, then `sample.add_chosen(...)`
    for paths that make lists of these users alone, and `sample.result(dataset, paths)`
    """

    def __init__(self, users: int = USERS, seed: int = 0) -> None:
        self.users, self.seed = users, seed
        self._hashes: npt.NDArray[np.uint64] = np.zeros(0, np.uint64)
        self._ids: Int64 = np.zeros(0, np.int64)
        self._lists: dict[str, Int64] = {}
        self._examples: list[tuple[int, dict[str, Any]]] = []
        self._chosen: dict[str, list[tuple[Int64, Int64]]] = {}
        self._largest = np.uint64(2**64 - 1)

    def add(self, batches: Sequence[Histories], lists: Mapping[str, torch.Tensor]) -> None:
        """Add the lists of some users.

        Args:
            batches: their histories, end to end, with held-out items.
            lists: [users, k] int64 items by path, best first; -1 fills up short lists.
        """
        batches = [batch for batch in batches if batch.users.size]  # a rank that has run out has none
        if not batches:
            return
        histories = join(batches)
        hashes = hash_numbers(histories.users, self.seed)
        self._keep_examples(histories, hashes)
        rows = np.flatnonzero(hashes <= self._largest)
        joined = np.concatenate([self._hashes, hashes[rows]])
        order = np.argsort(joined)[: self.users]
        ids = np.concatenate([self._ids, histories.users[rows]])[order]
        for path, items in lists.items():
            new = items.cpu().numpy()[rows]
            self._lists[path] = np.concatenate([self._lists.get(path, new[:0]), new])[order]
        self._hashes, self._ids = joined[order], ids
        if order.size == self.users:
            self._largest = self._hashes[-1]

    def _keep_examples(self, histories: Histories, hashes: npt.NDArray[np.uint64]) -> None:
        assert histories.held_out is not None
        for row in np.argsort(hashes)[:EXAMPLES].tolist():
            one = histories.part(row, row + 1)
            example: dict[str, Any] = {"user": int(one.users[0]), "history": one.items[-NEWEST:].tolist()}
            if one.segments is not None:
                example["segments"] = one.segments[-NEWEST:].tolist()
            example["held_out"] = int(histories.held_out[row])
            self._examples.append((int(hashes[row]), example))
        self._examples = sorted(self._examples, key=lambda each: each[0])[:EXAMPLES]

    def settle(self) -> None:
        """Agree with the other ranks on the sample (collective)."""
        hashes = np.sort(np.concatenate(gather_objects(self._hashes)))[: self.users]
        self._largest = hashes[-1] if hashes.size else np.uint64(0)
        kept = self._hashes <= self._largest
        self._chosen = {path: [(self._ids[kept], items[kept])] for path, items in self._lists.items()}
        self._examples = sorted(
            (each for share in gather_objects(self._examples) for each in share), key=lambda each: each[0]
        )[:EXAMPLES]
        self._lists, self._hashes, self._ids = {}, np.zeros(0, np.uint64), np.zeros(0, np.int64)

    def find_chosen(self, users: Int64) -> Int64:
        """Indices of the users [users] that are in the sample; after `settle`."""
        return np.flatnonzero(hash_numbers(users, self.seed) <= self._largest)

    def add_chosen(self, path: str, users: Int64, items: Int64) -> None:
        """Add lists [users, k] of users of the sample."""
        self._chosen.setdefault(path, []).append((users, items))

    def result(self, dataset: Dataset, paths: Sequence[str]) -> dict[str, Any]:
        """Coverage and novelty by path, and examples (collective).

        Returns:
            {"lists": {"users": 8192, "k": 10, "paths": {PATH: {"coverage": ..., "novelty": ...}}}, "examples": [...]}.
            coverage: share of the catalogue's items that are in a list. novelty: mean of -log2 of the items' shares of
            the training interactions, in bits; an item without any counts as one with one.

        Raises:
            InputError: the counts of items cannot be read.
        """
        items = dataset.manifest.items
        error, counts = None, np.zeros(0, np.int64)
        try:
            counts = read_counts(dataset, *id_range(items, rank(), world_size()))
        except Exception as caught:  # raised here, it would leave the other ranks waiting for this one
            error = caught
        raise_first_error(error)
        total = max(1, sum(gather_objects(int(counts.sum()))))
        examples = [example for _, example in self._examples]
        by_user: dict[int, dict[str, list[int]]] = {example["user"]: {} for example in examples}
        told: dict[str, Any] = {}
        users = k = 0
        for path in paths:
            shares = [each for share in gather_objects(self._chosen.get(path, [])) for each in share]
            if not shares:
                continue
            ids, lists = (np.concatenate(parts) for parts in zip(*shares, strict=True))
            users, k = max(users, ids.size), max(k, lists.shape[1])
            listed, often = np.unique(lists[lists >= 0], return_counts=True)
            shares_of = np.maximum(ask_holders(listed, counts, items), 1) / total
            novelty = float(often @ -np.log2(shares_of) / max(1, often.sum()))
            told[path] = {"coverage": listed.size / items, "novelty": novelty}
            for row in np.flatnonzero(np.isin(ids, list(by_user))).tolist():
                by_user[int(ids[row])][path] = [item for item in lists[row].tolist() if item >= 0]
        for example in examples:
            example["lists"] = by_user[example["user"]]
        return {"lists": {"users": users, "k": k, "paths": told}, "examples": examples}


def best_unseen(scores: torch.Tensor, history: Ragged, k: int) -> Int64:
    """[users, k] int64 items with the highest positive scores that are not in the history; -1 fills up short lists.

    Args:
        scores: [users, items] float32; overwritten.
        history: items of each user.
        k: length of the lists.
    """
    scores[torch.from_numpy(history.owners), torch.from_numpy(history.values.astype(np.int64))] = -np.inf
    best = scores.topk(min(k, scores.shape[1]), dim=1)
    found = best.indices.where(best.values > 0, -1).numpy()
    return np.pad(found, ((0, 0), (0, k - found.shape[1])), constant_values=-1)
