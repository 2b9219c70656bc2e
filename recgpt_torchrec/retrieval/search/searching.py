"""Searches an export: the retrievers that the options ask for, and the lists of a rank's share of the users."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pyarrow as pa

from recgpt_torchrec.catalogue.rounds import Rounds
from recgpt_torchrec.config import Retrieve
from recgpt_torchrec.data.histories import Histories
from recgpt_torchrec.data.ragged import Float32, Int64
from recgpt_torchrec.distributed.processes import rank, world_size
from recgpt_torchrec.progress import progress_bar
from recgpt_torchrec.retrieval.exports.reading import ROWS, Export
from recgpt_torchrec.retrieval.exports.vectors import vectors_of
from recgpt_torchrec.retrieval.list_folder import ListBatch
from recgpt_torchrec.retrieval.merging import Lists, Merged, MergeRule
from recgpt_torchrec.retrieval.neighbours import CANDIDATES as RAISED
from recgpt_torchrec.retrieval.neighbours import NeighbourRecall
from recgpt_torchrec.retrieval.search.choosing import held_index
from recgpt_torchrec.retrieval.search.indexing import build_own_shard, open_own_shards
from recgpt_torchrec.retrieval.search.restricted import Bool
from recgpt_torchrec.retrieval.search.retriever import ApproximateSearch, Retriever
from recgpt_torchrec.retrieval.search.sharded_index import ShardedIndex
from recgpt_torchrec.retrieval.search.stored import StoredExactSearch
from recgpt_torchrec.retrieval.user_histories import UserHistories
from recgpt_torchrec.storage.parts import regroup

if TYPE_CHECKING:  # it needs DuckDB and Ibis, whose import takes a third of a second
    from recgpt_torchrec.retrieval.chosen_users import ChosenUsers

CANDIDATES = 2**22
"""Maximum number of items that one search returns, over all its users and their interests."""
USERS = 4096
"""Maximum number of users per search."""

Measure = Callable[[Int64, Float32, Histories | None, Merged], object]
"""Called with user ids [users], queries [users, interests, dim], their histories (None: none are known) and lists."""


def build_retrievers(
    config: Retrieve,
    export: Export,
    rule: MergeRule,
    allowed: Bool | None = None,
    neighbours: NeighbourRecall | None = None,
) -> tuple[Retriever, Retriever, Callable[[], None]]:
    """Build what searches an export (collective).

    Exact search reads this rank's share of the vectors; beside an index, only when it is first needed.

    Args:
        config: of the stage, with `--index` resolved (see `choosing.resolve`).
        export: to be searched.
        rule: merges interests.
        allowed: [items] bool by id, the same on every rank: which items may be found; None: all.
        neighbours: raise scores in exact lists; None: none do.

    Returns:
        The exact retriever, the one for `--index` (the same object if the index is exact), and what each rank has to
        call after its last search.

    Raises:
        InputError: on every rank, where the export or the options of the index are wrong for one.
    """

    def merge(lists: Lists) -> Merged:
        return rule.merge(lists, config.k)

    bias = export.manifest.repeat_bias if config.seen == "weigh" else None
    rounds = Rounds()
    exact_search = StoredExactSearch(export, rounds, allowed)
    raise_scores = None if neighbours is None else neighbours.of
    exact = Retriever(exact_search, config.k, merge, bias=bias, neighbours=raise_scores)
    if config.index == "exact":
        exact_search.read()
        return exact, exact, rounds.finish
    held = held_index(config, export)
    shards = build_own_shard(config, export) if held is None else open_own_shards(export, held, config)
    index = ShardedIndex(shards, export.manifest.items, export.manifest.dim, rounds, allowed)
    approximate = Retriever(ApproximateSearch(index), config.k, merge, exact_search, bias)
    return exact, approximate, rounds.finish


def search_users(
    export: Export,
    retriever: Retriever,
    histories: UserHistories | None,
    interests: int,
    measure: Measure,
    chosen: "ChosenUsers | None" = None,
) -> Iterator[ListBatch]:
    """The lists of this rank's share of an export's users, with progress on rank 0.

    Args:
        export: whose user vectors are the queries.
        retriever: makes the lists.
        histories: whose items are left out or weighed; None: none are known.
        interests: number of interests to use, from the first on.
        measure: called with each batch.
        chosen: the users whose lists are asked for; None: all.
    """
    total = export.manifest.users
    found = max(retriever.k, RAISED) if retriever.neighbours is not None else retriever.k
    rows = max(1, min(USERS, CANDIDATES // (interests * found)))
    with progress_bar(total if rank() == 0 else None, "users", active=rank() == 0) as bar:

        def read() -> Iterator[pa.RecordBatch]:
            for batch in export.users(rows=rows if chosen is None else ROWS, rank=rank(), world_size=world_size()):
                yield batch if chosen is None else chosen.select(batch)
                bar.update(min(batch.num_rows * world_size(), total - bar.n))

        # A search is a pass over all items, so few chosen users wait for others.
        for batch in read() if chosen is None else regroup(read(), rows):
            users = batch["user_id"].to_numpy()
            queries = vectors_of(batch).reshape(len(users), -1, export.manifest.dim)[:, :interests]
            history = histories.of(users) if histories is not None else None
            lists = retriever.lists(queries, None if history is None else history.seen)
            measure(users, queries, history, lists)
            keys = batch["key"]
            yield ListBatch(users, keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys, lists)
