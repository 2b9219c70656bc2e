"""Item-item co-occurrence: how much an item of a history says for each other item.

    weight(i -> j) = sum over users, i at position p and j at position q, of |p - q|^-0.5 where q > p, a quarter of it
                     where q < p; at most a window of positions apart
    score(i -> j) = weight(i -> j) count(i)^-0.5 count(j)^-0.15

The window keeps memory linear in interactions, however long histories are. An item does not predict itself.

The constants were chosen on the validation split of Beauty and Toys together, for the score of a history that is the
sum over its items of 0.7^age times theirs (masked NDCG@10 .0682 and .0776). The optimum is flat: windows of 10 to 50
and a recency of .7, .8 or 1 / age differ by about .001. Without distance (power 0) .0636 and .0722, with both
directions alike .0605 and .0704, without the source's count .0665 and .0779.

Two users of it: the baseline co-occurrence (`evaluation.baselines`) and the stage find_neighbours.
"""

from collections.abc import Iterator

import numpy as np

from recgpt_torchrec.data.ragged import Int64, Ragged

WINDOW = 20
"""Maximum distance of a pair, in positions."""
DISTANCE_POWER = 0.5
BACKWARD = 0.25
SOURCE_POWER = 0.5
ITEM_POWER = 0.15
RECENCY = 0.7
"""Weight of an item of a history, as a share of that of the item after it."""


def forward_pairs(lists: Ragged, window: int = WINDOW) -> Iterator[tuple[int, Int64, Int64]]:
    """The pairs of items of each list, by their distance: that, the earlier items and the later ones, [pairs] int64.

    Args:
        lists: of items.
        window: the largest distance.
    """
    owner = np.repeat(np.arange(lists.rows), lists.lengths)
    longest = int(lists.lengths.max(initial=0))
    for distance in range(1, min(window, longest - 1) + 1):
        together = owner[:-distance] == owner[distance:]
        yield distance, lists.values[:-distance][together], lists.values[distance:][together]
