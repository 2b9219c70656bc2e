"""Item vectors of an export in id order, and the exact search that reads them only when it is first needed."""

from collections.abc import Iterator

import torch

from recgpt_torchrec.catalogue.catalogue import Catalogue
from recgpt_torchrec.catalogue.rounds import Rounds
from recgpt_torchrec.data.candidates import id_range
from recgpt_torchrec.data.ragged import Float32, Ragged
from recgpt_torchrec.distributed.lockstep import raise_first_error
from recgpt_torchrec.distributed.processes import rank, world_size
from recgpt_torchrec.retrieval.exports.reading import Export
from recgpt_torchrec.retrieval.merging import Lists
from recgpt_torchrec.retrieval.search.restricted import Bool, RestrictedSearch, compact_ids
from recgpt_torchrec.retrieval.search.retriever import ExactSearch, Search

BLOCK_BYTES = 2**27
"""Maximum size of a block of vectors."""


def vector_blocks(export: Export, first: int, stop: int) -> Iterator[Float32]:
    """Yield the vectors of the items `first` to `stop` - 1, [n, dim] float32, block by block in order of their ids.

    Raises:
        InputError: a file cannot be read, an item is missing, or a vector is not finite.
    """
    rows = max(1, BLOCK_BYTES // (4 * export.manifest.dim))
    for start in range(first, stop, rows):
        yield export.item_vectors(start, min(start + rows, stop))[1]


class StoredExactSearch:
    """Scores every allowed item. Ranks have equally many of them, and read theirs before the first search of any rank.

    Searching is collective: it takes place in rounds.

    Example: `StoredExactSearch(export, Rounds()).lists(vectors, 50, seen)`
    """

    def __init__(self, export: Export, rounds: Rounds, allowed: Bool | None = None) -> None:
        """
        Args:
            export: to be searched.
            rounds: in which ranks search; every rank calls its `finish` after its last search.
            allowed: [items] bool by id, the same on every rank: which items may be found; None: all.
        """
        self.export, self.rounds, self.allowed = export, rounds, allowed
        self.search: Search | None = None
        self._ask_to_read = rounds.add(lambda sizes, question: self.read())

    def lists(self, vectors: Float32, k: int, seen: Ragged | None) -> Lists:
        """See `Search`."""
        if self.search is None:
            self._ask_to_read(None)
        assert self.search is not None
        return self.search.lists(vectors, k, seen)

    def read(self) -> None:
        """Read this rank's vectors, unless they are there; every rank calls this at the same time.

        Raises:
            InputError: on every rank, where a file of the export cannot be read.
        """
        if self.search is not None:
            return
        ids = None if self.allowed is None else compact_ids(self.allowed)
        searched = self.export.manifest.items if ids is None else len(ids)
        own, own_stop = first, stop = id_range(searched, rank(), world_size())
        if ids is not None:
            first, stop = (int(ids[own]), int(ids[own_stop - 1]) + 1) if own < own_stop else (0, 0)
        failure, vectors = None, None
        try:
            _, vectors = self.export.item_vectors(first, stop, self.allowed)
        except Exception as error:
            failure = error
        raise_first_error(failure)
        assert vectors is not None
        exact = ExactSearch(Catalogue.of_vectors(torch.from_numpy(vectors), searched, own, self.rounds))
        self.search = exact if ids is None else RestrictedSearch(exact, ids)
