"""Segment ids: what an entry of a history is; and the interacted entries among all."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from recgpt_torchrec.data.ragged import Int64, offsets_of

INTERACTED = 0
"""The user did it; only these are targets."""
GENERATED = 1
"""The model answered it there (Algorithm 1 of the paper)."""
EXPOSED = 2
"""It was shown to the user, who did not click."""
SEGMENTS = 3
"""Segment ids are 0 to 2."""


class Interacted(NamedTuple):
    """The interacted entries (segment 0) among all entries of some users, so that a split can count them alone."""

    places: Int64
    """[interacted] where each lies among all entries."""
    offsets: Int64
    """[users + 1] of the users' lists of interacted entries."""

    @classmethod
    def among(cls, offsets: npt.ArrayLike, segments: npt.NDArray[Any] | None) -> "Interacted":
        """Find them; `segments` [entries], None: all entries were interacted with."""
        offsets = np.asarray(offsets, np.int64)
        if segments is None:
            return cls(np.arange(offsets[-1], dtype=np.int64), offsets)
        real = segments == INTERACTED
        return cls(np.flatnonzero(real), offsets_of(real)[offsets])

    def entries(self, stop: Int64) -> Int64:
        """The end, among all entries, of the history that ends before interacted entry `stop` [n]: its last one + 1."""
        return self.places[stop - 1] + 1
