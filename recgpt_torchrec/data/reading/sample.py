"""A sample of users: the same users in every process, without a list of them."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from recgpt_torchrec.data.ragged import Int64
from recgpt_torchrec.data.reading.hashing import hash_numbers
from recgpt_torchrec.data.windows import RowGroup


@dataclass(frozen=True)
class UserSample:
    """Users of some row groups: those whose hash of (seed, user id) is at most `largest`.

    Only these row groups are read; `evaluation.sampling` chooses them.

    Example: `HistoryReader(dataset=dataset, split="test", max_len=50, sample=sample).read(sample.groups)`
    """

    groups: tuple[RowGroup, ...]
    """Row groups that hold the sample, in the dataset's order."""
    seed: int
    largest: int
    """Largest hash in the sample."""

    def contains(self, users: Int64) -> npt.NDArray[np.bool_]:
        """[users] bool: whether `users` [users] int64 ids of these row groups are in the sample."""
        return hash_numbers(users, self.seed) <= np.uint64(self.largest)
