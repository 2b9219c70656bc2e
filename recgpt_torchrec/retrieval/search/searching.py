"""Searches an export: the retrievers that the options ask for, and the lists of a rank's share of the users."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from recgpt_torchrec.catalogue.catalogue import Catalogue
from recgpt_torchrec.config import Retrieve
from recgpt_torchrec.data.candidates import id_range
from recgpt_torchrec.data.histories import Histories
from recgpt_torchrec.data.ragged import Float32, Int64
from recgpt_torchrec.distributed.lockstep import raise_first_error
from recgpt_torchrec.distributed.processes import rank, world_size
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.progress import progress_bar
from recgpt_torchrec.retrieval.exports.reading import Export
from recgpt_torchrec.retrieval.exports.vectors import vectors_of
from recgpt_torchrec.retrieval.list_folder import ListBatch
from recgpt_torchrec.retrieval.merging import Lists, Merged, MergeRule
from recgpt_torchrec.retrieval.search import index as indexes
from recgpt_torchrec.retrieval.search.restricted import Bool, RestrictedSearch, compact_ids
from recgpt_torchrec.retrieval.search.retriever import ApproximateSearch, ExactSearch, LocalSearch, Retriever, Search
from recgpt_torchrec.retrieval.user_histories import UserHistories

CANDIDATES = 2**22
"""Maximum number of items that one search returns, over all its users and their interests."""
BUILDERS: dict[str, Callable[[Float32, Any], Any]] = {"hnsw": indexes.hnsw, "ivf": indexes.ivf}
"""Builders of approximate indexes, by --index; each takes the options of its group."""
USERS = 4096
"""Maximum number of users per search."""

Measure = Callable[[Int64, Float32, Histories | None, Merged], object]
"""Called with user ids [users], queries [users, interests, dim], their histories (None: none are known) and lists."""


def build_retrievers(
    config: Retrieve, export: Export, rule: MergeRule, allowed: Bool | None = None
) -> tuple[Retriever, Retriever, Callable[[], None]]:
    """Build what searches an export (collective).

    Args:
        config: of the stage.
        export: to be searched.
        rule: merges interests.
        allowed: [items] bool by id, the same on every rank: which items may be found; None: all.

    Returns:
        The exact retriever, the one for `--index` (the same object if the index is exact), and what each rank has to
        call after its last search.

    Raises:
        InputError: on every rank, where the export or the options of the index are wrong for one.
    """

    def merge(lists: Lists) -> Merged:
        return rule.merge(lists, config.k)

    items, failure = export.manifest.items, None
    is_exact = config.index == "exact"
    ids = None if allowed is None else compact_ids(allowed)
    # An approximate index holds all items on every rank, so each rank scores them by itself where it needs to. Exact
    # search is over the allowed items alone; ranks have equally many of them.
    searched = items if ids is None or not is_exact else len(ids)
    own, own_stop = id_range(searched, rank(), world_size()) if is_exact else (0, items)
    first, stop = own, own_stop
    if is_exact and ids is not None:
        first, stop = (int(ids[own]), int(ids[own_stop - 1]) + 1) if own < own_stop else (0, 0)
    try:
        _, vectors = export.item_vectors(first, stop, allowed if is_exact else None)
        index = None if is_exact else BUILDERS[config.index](vectors, getattr(config, config.index))
    except InputError as error:
        failure = error
    raise_first_error(failure)

    def restricted(search: Search) -> Search:
        return search if ids is None else RestrictedSearch(search, ids)

    if index is None:
        catalogue = Catalogue.of_vectors(torch.from_numpy(vectors), searched, own)
        exact = Retriever(restricted(ExactSearch(catalogue)), config.k, merge)
        return exact, exact, catalogue.finish
    search = restricted(LocalSearch(vectors if allowed is None else vectors[allowed]))
    approximate = Retriever(ApproximateSearch(indexes.Index(index), allowed), config.k, merge, search)
    return Retriever(search, config.k, merge), approximate, lambda: None


def search_users(
    export: Export, retriever: Retriever, histories: UserHistories | None, interests: int, measure: Measure
) -> Iterator[ListBatch]:
    """The lists of this rank's share of an export's users, with progress on rank 0.

    Args:
        export: whose user vectors are the queries.
        retriever: makes the lists.
        histories: whose items are left out; None: nothing is.
        interests: number of interests to use, from the first on.
        measure: called with each batch.
    """
    total = export.manifest.users
    rows = max(1, min(USERS, CANDIDATES // (interests * retriever.k)))
    with progress_bar(total if rank() == 0 else None, "users", active=rank() == 0) as bar:
        for batch in export.users(rows=rows, rank=rank(), world_size=world_size()):
            users = batch["user_id"].to_numpy()
            queries = vectors_of(batch).reshape(len(users), -1, export.manifest.dim)[:, :interests]
            history = histories.of(users) if histories is not None else None
            lists = retriever.lists(queries, None if history is None else history.seen)
            measure(users, queries, history, lists)
            bar.update(min(len(users) * world_size(), total - bar.n))
            yield ListBatch(users, batch["key"], lists)
