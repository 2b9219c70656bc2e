"""The request that follows a history: what is asked for, and when. Needs neither torch nor Arrow."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Request:
    """The request after the newest entry of every history that is encoded.

    Example: `encoding_stream(dataset, "all", model, batch, item_keys=4, request=Request(event=2))`
    """

    event: int = 0
    """Id of the event type that is asked for; 0: any."""
    held_out_event: int = 0
    """In validation and test, only users whose held-out item is of this event type are read; 0: all."""
    time: int | None = None
    """Its time, in the dataset's unit; None: that of the held-out item, or, in whole histories, not known."""
