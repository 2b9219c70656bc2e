"""Item vectors of an export in id order, and the exact search that reads them only when it is first needed."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from recgpt_torchrec.catalogue.catalogue import HELD_SHARE, Catalogue
from recgpt_torchrec.catalogue.rounds import Rounds
from recgpt_torchrec.catalogue.vectors import HeldVectors, StreamedVectors
from recgpt_torchrec.data.candidates import id_range
from recgpt_torchrec.data.ragged import Float32, Int64, Ragged
from recgpt_torchrec.distributed.lockstep import raise_first_error
from recgpt_torchrec.distributed.memory import available_bytes
from recgpt_torchrec.distributed.processes import gather_objects, rank, world_size
from recgpt_torchrec.retrieval.exports.reading import Export
from recgpt_torchrec.retrieval.merging import Lists
from recgpt_torchrec.retrieval.search.restricted import Bool, RestrictedSearch, compact_ids
from recgpt_torchrec.retrieval.search.retriever import ExactSearch, Search
from recgpt_torchrec.retrieval.weighed import Weighed

CPU = torch.device("cpu")
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

    A rank holds its vectors if they fit into half of the memory that is left, on every rank; otherwise each pass over
    them reads them anew. Searching is collective: it takes place in rounds.

    Example: `StoredExactSearch(export, Rounds()).lists(vectors, 50, seen)`
    """

    def __init__(self, export: Export, rounds: Rounds, allowed: Bool | None = None, hold: bool = True) -> None:
        """
        Args:
            export: to be searched.
            rounds: in which ranks search; every rank calls its `finish` after its last search.
            allowed: [items] bool by id, the same on every rank: which items may be found; None: all.
            hold: False: vectors are never held, for one pass over them.
        """
        self.export, self.rounds, self.allowed, self.hold = export, rounds, allowed, hold
        self.search: Search | None = None
        self._ask_to_read = rounds.add(lambda sizes, question: self.read())

    def lists(self, vectors: Float32, k: int, left_out: Ragged | None, weighed: Weighed | None = None) -> Lists:
        """See `Search`."""
        if self.search is None:
            self._ask_to_read(None)
        assert self.search is not None
        return self.search.lists(vectors, k, left_out, weighed)

    def read(self) -> None:
        """Read this rank's vectors, unless they are there; every rank calls this at the same time.

        Raises:
            InputError: on every rank, where a file of the export cannot be read.
        """
        if self.search is not None:
            return
        ids, dim, device = None if self.allowed is None else compact_ids(self.allowed), self.export.manifest.dim, CPU
        searched = self.export.manifest.items if ids is None else len(ids)
        id_ranges = [id_range(searched, each, world_size()) for each in range(world_size())]

        def look_up(places: Int64, room: int) -> Tensor:
            failure, vectors = None, np.zeros((0, dim), np.float32)
            try:
                if places.size:
                    first, last = (int(place if ids is None else ids[place]) for place in places[[0, -1]])
                    _, vectors = self.export.item_vectors(first, last + 1, self.allowed)
            except Exception as error:
                failure = error
            raise_first_error(failure)
            return torch.from_numpy(vectors)

        own, own_stop = id_ranges[rank()]
        fits = self.hold and 4 * dim * (own_stop - own) <= HELD_SHARE * available_bytes(device)
        if all(gather_objects(fits)):
            vectors: HeldVectors | StreamedVectors = HeldVectors(look_up(np.arange(own, own_stop), 0), own)
        else:
            vectors = StreamedVectors(look_up, id_ranges, rank(), max(1, BLOCK_BYTES // (4 * dim)), device)
        exact = ExactSearch(Catalogue(vectors, searched, dim, self.rounds))
        self.search = exact if ids is None else RestrictedSearch(exact, ids)
