"""Entries of padded histories in a program: the newest ones, their positions and features. Tensors alone.

The twin of `data.targets.positions_of` and `data.inputs.features`, which read ragged numpy arrays, in operations that
`torch.export` and ONNX have; a test holds both against each other.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from recgpt_torchrec.data.inputs import times
from recgpt_torchrec.data.inputs.features import UNKNOWN
from recgpt_torchrec.data.inputs.places import FIRSTS
from recgpt_torchrec.data.inputs.spec import EVENTS, Inputs
from recgpt_torchrec.data.segments import GENERATED, INTERACTED

Columns = dict[str, Tensor]
"""What is known of the entries of histories, [batch, length] int64 by name: `segments`, and what the model reads of
`items`, `times`, `events` and `places`."""


class Request(NamedTuple):
    """What is asked after the histories; None: the model does not read it."""

    times: Tensor | None = None
    """[batch] int64, in the unit of the entries' times."""
    events: Tensor | None = None
    """[batch] int64 ids of event types; 0: any."""


class Window(NamedTuple):
    """The newest entries of each history."""

    entries: Tensor
    """[batch, width] int64 places among the entries; any place where there is no entry."""
    valid: Tensor
    """[batch, width] bool: whether there is an entry."""
    counts: Tensor
    """[batch] int64 number of entries."""


def find_width(lengths: Tensor, max_len: int, grows: int = 0) -> Any:
    """Number of entries that the longest history has when it has grown by so many, 1 to `max_len`; for the exporter a
    size that is only known when the program runs. `lengths` are [batch] int64."""
    width: Any = (lengths.max() + grows).clamp(min=1, max=max_len).item()
    torch._check(width >= 1)
    torch._check(width <= max_len)
    return width


def find_newest(lengths: Tensor, max_len: int, width: Any, room: Any) -> Window:
    """The newest `max_len` entries of histories.

    Args:
        lengths: [batch] int64 number of entries, from 0 on.
        max_len: at least 1.
        width: number of places of the window, see `find_width`.
        room: number of places for entries, at least 1.
    """
    counts = lengths.clamp(max=max_len)
    slot = torch.arange(width, device=lengths.device)
    first = (lengths - counts)[:, None]
    return Window((first + slot).clamp(max=room - 1), slot < counts[:, None], counts)


def find_kept(columns: Columns, lengths: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The entries that the model's histories hold, by their event type (`Inputs.history_events`).

    Returns:
        Their places, [batch, length] int64, in order; any place behind the last. And how many, [batch] int64.
    """
    events, segments = columns["events"], columns["segments"]
    place = torch.arange(events.shape[1], device=events.device).expand(events.shape)
    kept = segments != INTERACTED
    for word in inputs.history_events:
        kept = kept | (events == inputs.id_of_event(word))
    kept = kept & (place < lengths[:, None])
    trash = torch.full_like(lengths, events.shape[1])[:, None]
    target = torch.where(kept, kept.long().cumsum(1) - 1, trash)
    room = torch.zeros_like(torch.cat([place, trash], dim=1))
    return room.scatter(1, target, place)[:, :-1], kept.sum(1)


def append_generated(columns: Columns, lengths: Tensor, items: Tensor, request: Request) -> Columns:
    """Append a generated entry to each history, as `retrieval.interests.append_generated` does.

    Args:
        columns: [batch, room] each, `items` among them, with room for it.
        lengths: [batch] int64 number of entries so far.
        items: [batch] int64.
        request: after each history.
    """
    newest = (lengths - 1).clamp(min=0)[:, None]
    values = {"items": items, "segments": torch.full_like(lengths, GENERATED), "places": torch.zeros_like(lengths)}
    if "times" in columns:
        values["times"] = columns["times"].gather(1, newest)[:, 0]
    if "events" in columns:
        values["events"] = torch.full_like(lengths, UNKNOWN) if request.events is None else request.events
    return {name: column.scatter(1, lengths[:, None], values[name][:, None]) for name, column in columns.items()}


class Relations:
    """Which interacted entries are beside each entry of a window.

    Args:
        segments: [batch, width] int64.
        valid: [batch, width] bool: whether there is an entry.
    """

    def __init__(self, segments: Tensor, valid: Tensor) -> None:
        interacted = (valid & (segments == INTERACTED)).long()
        self.place = torch.arange(segments.shape[1], device=segments.device).expand(segments.shape)
        self.interacted, self.counts = interacted, interacted.cumsum(1)
        """[batch, width] int64: 1 for the interacted ones; and their number up to each entry."""
        # The place of the n-th interacted entry, n from 1 on; -1 for n = 0 and beyond the last.
        room = torch.full_like(torch.cat([segments, segments[:, :1], segments[:, :1]], dim=1), -1)
        self.places = room.scatter(1, self.counts * interacted, torch.where(interacted == 1, self.place, -1))

    @property
    def preceding(self) -> Tensor:
        """[batch, width] int64: place of the interacted entry before each; -1: there is none."""
        return self.places.gather(1, self.counts - self.interacted)

    @property
    def following(self) -> Tensor:
        """[batch, width] int64: place of the next interacted entry after each; -1: there is none."""
        return self.places.gather(1, self.counts + 1)

    def positions(self, max_len: int) -> Tensor:
        """[batch, width] int64 positions, see `data.targets.positions_of`, at most `max_len` - 1."""
        # After the newest interacted entry, the k-th prompt has k more; before the first, positions count all entries.
        since = self.place - self.places.gather(1, self.counts)
        return (self.counts - 1 + since).clamp(min=0, max=max_len - 1)


def compute_features(
    inputs: Inputs, columns: Columns, relations: Relations, request: Request, valid: Tensor
) -> Tensor | None:
    """The features of a window's entries, [features, batch, width] int64; None: the model reads none.

    Args:
        inputs: of the model.
        columns: of the window, [batch, width] each.
        relations: of its entries.
        request: after each history.
        valid: [batch, width] bool: whether there is an entry.
    """
    if not inputs.features:
        return None

    def of_request(name: str, of_histories: Tensor | None) -> Tensor:
        following = relations.following
        inside = columns[name].gather(1, following.clamp(min=0))
        newest = torch.zeros_like(inside[:, 0]) if of_histories is None else of_histories
        return torch.where(following >= 0, inside, newest[:, None])

    def bucket_gaps(gaps: Tensor) -> Tensor:
        edges = torch.tensor(times.edges_of_gaps(inputs.time_unit).tolist(), device=gaps.device)
        return (gaps[..., None] >= edges).long().sum(-1) + 1

    def past_gap() -> Tensor:
        before = relations.preceding
        gaps = bucket_gaps(columns["times"] - columns["times"].gather(1, before.clamp(min=0)))
        return torch.where(before >= 0, gaps, UNKNOWN)

    day, offset = times.units_of(times.DAY, inputs), times.offset_of_zone(inputs)
    features = {
        "event": lambda: columns["events"],
        "asked_event": lambda: of_request("events", request.events),
        "past_gap": past_gap,
        "next_gap": lambda: bucket_gaps(of_request("times", request.times) - columns["times"]),
        "hour": lambda: (of_request("times", request.times) + offset) % day * 24 // day + 1,
        "weekday": lambda: ((of_request("times", request.times) + offset) // day + 3) % 7 + 1,
        "place": lambda: (columns["places"][..., None] >= torch.tensor(FIRSTS.tolist())).long().sum(-1),
    }
    return torch.stack([features[each.name]() * valid for each in inputs.features])


def hide_unknown_events(columns: Columns, inputs: Inputs) -> Columns:
    """Event types that the model was not trained with are unknown to it."""
    if not inputs.reads(*EVENTS):
        return columns
    events = columns["events"]
    return {**columns, "events": torch.where(events <= len(inputs.events), events, UNKNOWN)}
