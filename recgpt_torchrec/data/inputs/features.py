"""Features of tokens: small numbers per entry of a history, whose embeddings are added to the decoder's input.

`FEATURES` names them all. A feature may look at the entry itself and at the *request* after it: the next interacted
entry, which the token predicts, or what was asked at inference. Of that it knows time and asked event, never the item.
Prompts beside the entry change nothing: so Algorithm 1 computes features before it has generated any.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from recgpt_torchrec.data.histories import Histories
from recgpt_torchrec.data.inputs import times
from recgpt_torchrec.data.inputs.places import places_in_lists
from recgpt_torchrec.data.inputs.spec import Inputs
from recgpt_torchrec.data.ragged import Int64
from recgpt_torchrec.data.segments import INTERACTED

UNKNOWN = 0
"""Value of every feature that is not known."""


@dataclass(frozen=True)
class Entries:
    """The entries of histories that are tokens."""

    histories: Histories
    tokens: Int64
    """[tokens] int64: entry of each token."""
    inputs: Inputs
    hidden: npt.NDArray[np.bool_] | None = None
    """[entries] bool: after which the event type asked for is hidden; None: after none."""

    @cached_property
    def sequence(self) -> Int64:
        """[tokens] int64: index of each token's history."""
        return np.searchsorted(self.histories.offsets, self.tokens, side="right") - 1

    @cached_property
    def preceding(self) -> Int64:
        """[tokens] int64: the interacted entry before, of the same history; -1: there is none."""
        segments = self.histories.segments
        start = self.histories.offsets[:-1][self.sequence]
        if segments is None:
            preceding = self.tokens - 1
        else:
            interacted = np.flatnonzero(segments == INTERACTED)
            preceding = np.append(interacted, -1)[np.searchsorted(interacted, self.tokens) - 1]
        return np.where(preceding >= start, preceding, -1)

    @cached_property
    def following(self) -> Int64:
        """[tokens] int64: the next interacted entry of the same history; -1: there is none."""
        segments = self.histories.segments
        end = self.histories.offsets[1:][self.sequence]
        if segments is None:
            following = self.tokens + 1
        else:
            interacted = np.flatnonzero(segments == INTERACTED)
            following = np.append(interacted, segments.size)[np.searchsorted(interacted, self.tokens, side="right")]
        return np.where(following < end, following, -1)

    def of_request(self, of_entries: Int64, of_sequences: Int64 | None) -> Int64:
        """[tokens] the value of the request after each token.

        Args:
            of_entries: [entries], for requests that are entries themselves.
            of_sequences: [sequences], for the request after the newest entry; None: it is not known.
        """
        inside = of_entries[np.maximum(self.following, 0)] if of_entries.size else np.zeros_like(self.tokens)
        newest = UNKNOWN if of_sequences is None else of_sequences[self.sequence]
        return np.where(self.following >= 0, inside, newest)


def event_types(entries: Entries) -> Int64:
    """The event type of each token, [tokens] int64."""
    events = entries.histories.events
    assert events is not None, "histories without events"
    return events[entries.tokens].astype(np.int64)


def asked_events(entries: Entries) -> Int64:
    """The event type of the request after each token, [tokens] int64; 0 where it is hidden."""
    histories = entries.histories
    assert histories.events is not None, "histories without events"
    newest = None if histories.asked_events is None else histories.asked_events.astype(np.int64)
    asked = entries.of_request(histories.events.astype(np.int64), newest)
    return asked if entries.hidden is None else np.where(entries.hidden[entries.tokens], UNKNOWN, asked)


FEATURES: dict[str, Callable[[Entries], Int64]] = {
    "event": event_types,
    "asked_event": asked_events,
    "past_gap": times.past_gaps,
    "next_gap": times.next_gaps,
    "hour": times.hours,
    "weekday": times.weekdays,
    "place": places_in_lists,
}
"""How each feature is computed, [tokens] int64 from 0 to its number of values - 1."""


def compute_features(
    inputs: Inputs, histories: Histories, tokens: Int64, hidden: npt.NDArray[np.bool_] | None = None
) -> Int64 | None:
    """The features of tokens, [features, tokens] int64 in the order of `inputs.features`; None: there are none.

    Args:
        inputs: of the model.
        histories: with the columns that the features read.
        tokens: [tokens] int64: entry of each token.
        hidden: [entries] bool: after which the event type asked for is hidden; None: after none.
    """
    if not inputs.features:
        return None
    entries = Entries(histories, tokens, inputs, hidden)
    return np.stack([FEATURES[each.name](entries) for each in inputs.features])
