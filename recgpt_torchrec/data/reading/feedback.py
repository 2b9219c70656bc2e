"""Which feedback (shown, disliked or skipped items) was known at a request, and so may be read to answer it."""

import numpy as np
import numpy.typing as npt

from recgpt_torchrec.data.ragged import Int64
from recgpt_torchrec.data.segments import EXPOSED, Interacted


def find_known(
    segments: npt.NDArray[np.int8], times: Int64 | None, interacted: Interacted, offsets: Int64
) -> npt.NDArray[np.bool_]:
    """[entries] bool: whether an entry was known at the next request, that of the user's next interaction.

    Feedback with the time of the next interaction is of the same request: what was shown beside the item that was
    chosen. It is known only afterwards.

    Args:
        segments: [entries] int8.
        times: [entries] int64 timestamps; None: there are none, and the order alone says what came first.
        interacted: the interacted entries among them.
        offsets: [users + 1] int64 offsets of the users' lists of entries.
    """
    known = np.ones(segments.size, dtype=bool)
    if times is None:
        return known
    feedback = np.flatnonzero(segments >= EXPOSED)
    following = np.searchsorted(interacted.places, feedback, side="right")
    end = offsets[np.searchsorted(offsets, feedback, side="right")]
    of_user = np.append(interacted.places, segments.size)[following] < end
    feedback, following = feedback[of_user], following[of_user]
    known[feedback] = times[feedback] < times[interacted.places[following]]
    return known


def extend_by_feedback(stop: Int64, end: Int64, segments: npt.NDArray[np.int8], known: npt.NDArray[np.bool_]) -> Int64:
    """Where histories end that hold the feedback after their newest interaction, [n] int64.

    Args:
        stop: [n] int64: where they end without it.
        end: [n] int64: where the lists of entries end.
        segments, known: [entries], see `find_known`. The held-out item is interacted, so nothing from it on is read.
    """
    others = np.append(np.flatnonzero(~((segments >= EXPOSED) & known)), segments.size)
    return np.minimum(others[np.searchsorted(others, stop)], end)
