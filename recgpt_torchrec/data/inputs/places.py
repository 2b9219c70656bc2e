"""The feature `place`: the place in the list in which an item was shown, in buckets that grow with it."""

from typing import TYPE_CHECKING

import numpy as np

from recgpt_torchrec.data.ragged import Int64

if TYPE_CHECKING:
    from recgpt_torchrec.data.inputs.features import Entries

EXACT = 8
"""Places up to this one have a bucket each; beyond it buckets are half powers of two, as interest falls by ratios."""
LAST = 128
"""From this place on all share the last bucket."""
FIRSTS = np.unique(np.append(np.arange(1, EXACT + 1), np.round(2 ** np.arange(3.5, np.log2(LAST) + 0.1, 0.5)))).astype(
    int
)
"""The first place of each bucket, ascending: 1 to 8, 11, 16, 23, 32, ... 128."""
PLACE_VALUES = FIRSTS.size + 1
"""Number of values of the feature: 0 is unknown, then a value per bucket."""


def places_in_lists(entries: "Entries") -> Int64:
    """The bucket of each token's place, [tokens] int64."""
    places = entries.histories.places
    assert places is not None, "histories without places"
    return np.searchsorted(FIRSTS, places[entries.tokens], side="right").astype(np.int64)
