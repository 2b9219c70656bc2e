"""Popular items for the users of a dataset that an export has no vector of (`--fallback popular`)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from recgpt_torchrec.data.candidates import id_range
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.ragged import Int64
from recgpt_torchrec.data.reading.counts import read_counts
from recgpt_torchrec.distributed.processes import rank, world_size
from recgpt_torchrec.retrieval.exports.keys import Keys
from recgpt_torchrec.retrieval.exports.reading import Export
from recgpt_torchrec.retrieval.list_folder import ListBatch
from recgpt_torchrec.retrieval.merging import Merged

if TYPE_CHECKING:  # it needs DuckDB and Ibis
    from recgpt_torchrec.retrieval.chosen_users import ChosenUsers

Bool = npt.NDArray[np.bool_]
BLOCK = 2**22
"""Number of items whose counts are held at once."""
USERS = 2**14
"""Maximum number of users per batch of lists."""
PLACES = 2**22
"""Maximum number of items per batch of lists."""


def popular_lists(
    export: Export, dataset: Dataset, k: int, allowed: Bool | None, chosen: "ChosenUsers | None" = None
) -> Iterator[ListBatch]:
    """Yield the lists of the users of this rank's id range that the export lacks: the same popular items for each.

    Holds one byte per user of the range. Interest is -1, scores are numbers of interactions.

    Args:
        export: with vectors of the other users.
        dataset: of the export, with all users.
        k: length of the lists; they are shorter where fewer items are allowed.
        allowed: [items] bool by id: which items may be in a list; None: all.
        chosen: the users whose lists are asked for; None: all.

    Raises:
        InputError: a part of either cannot be read.
    """
    users = find_absent_users(export, dataset)
    if not users.size:
        return
    column: Literal["count", "train_count"] = (
        "count" if export.manifest.settings.get("history", "all") == "all" else "train_count"
    )
    items, counts = find_popular(dataset, k, allowed, column)
    keys = Keys(dataset, "users")
    at_once = max(1, min(USERS, PLACES // k))
    for start in range(0, users.size, at_once):
        ids = users[start : start + at_once]
        batch = pa.record_batch({"user_id": ids, "key": keys.of(ids)})
        if chosen is not None:
            batch = chosen.select(batch)
        shape = (batch.num_rows, items.size)
        lists = Merged(
            torch.from_numpy(items).expand(shape),
            torch.from_numpy(counts.astype(np.float32)).expand(shape),
            torch.full(shape, -1),
        )
        yield ListBatch(batch["user_id"].to_numpy(), batch["key"], lists)


def find_absent_users(export: Export, dataset: Dataset) -> Int64:
    """The users [n] int64 of this rank's id range, rising, of which the export has no vector."""
    first, stop = id_range(dataset.manifest.users, rank(), world_size())
    is_absent = np.ones(stop - first, dtype=bool)
    for ids in export.user_ids():
        is_absent[ids[(ids >= first) & (ids < stop)] - first] = False
    return first + np.flatnonzero(is_absent)


def find_popular(
    dataset: Dataset, k: int, allowed: Bool | None, column: Literal["count", "train_count"]
) -> tuple[Int64, Int64]:
    """The `k` allowed items with the most interactions, and their numbers: [up to k] int64 each, most first.

    Of items with equally many the smaller id comes first.
    """
    best, best_counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for first in range(0, dataset.manifest.items, BLOCK):
        stop = min(first + BLOCK, dataset.manifest.items)
        ids, counts = np.arange(first, stop), read_counts(dataset, first, stop, column)
        if allowed is not None:
            ids, counts = ids[allowed[first:stop]], counts[allowed[first:stop]]
        best, best_counts = np.concatenate([best, ids]), np.concatenate([best_counts, counts])
        order = np.argsort(-best_counts, kind="stable")[:k]
        best, best_counts = best[order], best_counts[order]
    return best, best_counts
