"""The vectors of the items of one rank's id range: held, or looked up anew for each pass over them."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from recgpt_torchrec.data.ragged import Int64

BLOCK_BYTES = 2**24
"""Bytes of vectors that one look-up makes: 65,536 items at dimension 64."""

LookUp = Callable[[Int64, int], Tensor]
"""Vectors [n, dim] float32 of item ids [n] int64, in a collective look-up with room for the given number of ids."""


class HeldVectors:
    """Vectors [items, dim] float32 that a rank holds, from the id `first` on; one block."""

    def __init__(self, vectors: Tensor, first: int) -> None:
        self.vectors, self.first, self.stop = vectors, first, first + len(vectors)
        self.device = vectors.device

    @classmethod
    def read(cls, vectors: "StreamedVectors", dim: int) -> "HeldVectors":
        """Hold all that `vectors` looks up, without a second copy (collective)."""
        held = torch.empty(vectors.stop - vectors.first, dim, device=vectors.device)
        for first, block in vectors.blocks():
            held[first - vectors.first : first - vectors.first + len(block)] = block
        return cls(held, vectors.first)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield blocks of vectors [n, dim] float32 with the id of their first item, with rising ids."""
        yield self.first, self.vectors


class StreamedVectors:
    """Vectors that each pass looks up anew; at most one block exists at a time.

    Args:
        look_up: see `LookUp`.
        id_ranges: first and stop of the ids of every rank; all ranks look up as often as the one with the most items.
        rank: of this process.
        rows: number of items of a block.
        device: of the vectors.
    """

    def __init__(
        self, look_up: LookUp, id_ranges: list[tuple[int, int]], rank: int, rows: int, device: torch.device
    ) -> None:
        self.look_up, self.rows, self.device = look_up, rows, device
        self.first, self.stop = id_ranges[rank]
        self.most = max(stop - first for first, stop in id_ranges)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """See `HeldVectors.blocks`; every rank has to read all of its blocks, at the same time as the others."""
        for place in range(0, self.most, self.rows):
            first = min(self.first + place, self.stop)
            ids = np.arange(first, min(first + self.rows, self.stop))
            yield first, self.look_up(ids, min(self.rows, self.most - place))

    def of(self, ids: Int64, most: int) -> Iterator[Tensor]:
        """Yield the vectors of `ids` [n], of any rank's items, block by block; no rank asks for more than `most`."""
        for place in range(0, most, self.rows):
            yield self.look_up(ids[place : place + self.rows], min(self.rows, most - place))
