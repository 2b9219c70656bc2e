"""Requests of raw keys: what a visitor did, and what is asked for. Knows nothing of ids, files or models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from typing import Any, TypeAlias

from recgpt_torchrec.data.segments import FEEDBACK
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.serving.keys import Key

Time: TypeAlias = int | str | datetime
"""In the unit of the log's times, or an ISO date-time, UTC unless it has an offset."""


LAST_PLACE = 2**15 - 1
"""Largest place in a list that a dataset can store."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """An item that was shown and not clicked."""

    item: Key
    kind: str = "shown"
    """`shown`, `disliked` or `skipped`; the last two where the dataset tells them apart."""
    time: Time | None = None
    """None: that of the entry it came after."""
    place: int = 0
    """Place in the list in which it was shown, from 1; 0: unknown."""
    event: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in FEEDBACK:
            raise InputError(f"the kind of the shown item {self.item!r} is {self.kind!r}; give {', '.join(FEEDBACK)}")
        _check_place(self.place)


@dataclass(frozen=True, kw_only=True)
class History:
    """What a visitor did, oldest first, by raw keys, and what is asked for after it.

    Example: `History(items=["shoe", "hat"], user="ann", shown=[[], ["glove"]])`
    """

    items: Sequence[Key]
    user: Key | None = None
    """None, or one that the dataset does not know: a stranger, whose user vector is 0."""
    times: Sequence[Time] | None = None
    """When, one per item, not falling. A model that reads times needs them; another ignores them."""
    events: Sequence[str | None] | None = None
    """Event type per item, None where it is unknown. A model that reads event types needs them; another ignores
    them."""
    places: Sequence[int] | None = None
    """Place in the list in which each item was shown, from 1; 0: unknown. None: all are unknown."""
    shown: Sequence[Sequence[Key | Shown]] | None = None
    """For each item what was shown after it and not clicked, in order; the last after the newest item."""
    exclude: Sequence[Key] = ()
    """Items that no list of this visitor may hold, beside those of the history; unknown ones do no harm."""
    time: Time | None = None
    """Time of the request; None: the newest time of the dataset, as in `export`."""
    event: str | None = None
    """Event type that is asked for; None: any."""

    def __post_init__(self) -> None:
        for name in ("items", "times", "events", "places", "shown", "exclude"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, (str, bytes)) or not isinstance(value, Sequence)):
                raise InputError(f"{name} of a history is {value!r}; give a list")
        for name in ("times", "events", "places", "shown"):
            value = getattr(self, name)
            if value is not None and len(value) != len(self.items):
                raise InputError(
                    f"a history has {len(self.items)} items and {len(value)} {name}; give one of {name} per item"
                )
        for place in self.places or ():
            _check_place(place)
        for word in (self.event, *(self.events or ())):
            if word is not None and not isinstance(word, str):
                raise InputError(f"the event type {word!r} of a history is no word; give one of the dataset's")
        for after in self.shown or ():
            if isinstance(after, (str, bytes)) or not isinstance(after, Sequence):
                raise InputError(f"shown of a history has {after!r}; give a list for each item, empty where none was")

    @classmethod
    def from_json(cls, values: Any) -> "History":
        """The history in a JSON object: its fields, and shown items as keys or as objects of `Shown`'s fields.

        Raises:
            InputError: a field is unknown or malformed.
        """
        if not isinstance(values, Mapping):
            raise InputError(f'a request is {values!r}; give an object such as {{"items": ["shoe", "hat"]}}')
        _check_names(cls, values, "a request")
        given = dict(values)
        if "items" not in given:
            raise InputError('a request has no items; give an object such as {"items": ["shoe", "hat"]}')
        if isinstance(given.get("shown"), list):
            given["shown"] = [_parse_shown(after) if isinstance(after, list) else after for after in given["shown"]]
        return cls(**given)


def _check_place(place: Any) -> None:
    if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place <= LAST_PLACE:
        raise InputError(f"the place {place!r} is no whole number from 0 (unknown) to {LAST_PLACE}")


def _parse_shown(after: list[Any]) -> list[Any]:
    for each in after:
        if isinstance(each, Mapping):
            _check_names(Shown, each, "a shown item")
            if "item" not in each:
                raise InputError(f"the shown item {dict(each)!r} has no item; give its key")
    return [Shown(**each) if isinstance(each, Mapping) else each for each in after]


def _check_names(of: Any, values: Mapping[str, Any], what: str) -> None:
    names = [each.name for each in fields(of)]
    for name in values:
        if name not in names:
            raise InputError(f"{what} has a field {name!r}; it may have {', '.join(names)}")


def is_one_history(histories: Any) -> bool:
    """Whether an argument is one history, not a batch of them: a `History`, or a list that holds no lists.

    Example:
        >>> is_one_history(["shoe", "hat"]), is_one_history([["shoe"], []]), is_one_history([])
        (True, False, True)
    """
    if isinstance(histories, History):
        return True
    histories = _as_list(histories)
    if isinstance(histories, (str, bytes, Mapping)) or not isinstance(histories, Sequence):
        raise InputError(f"histories is {histories!r}; give a list of keys, or a list of such lists")
    return not any(isinstance(each, History) or _is_list(each) for each in histories)


def make_requests(histories: Any, per_history: Mapping[str, Any], for_all: Mapping[str, Any]) -> list[History]:
    """The requests of a call: one per history.

    Args:
        histories: a list of keys or a `History`, or a batch: a list of them.
        per_history: arguments by the name of `History`'s field: the value for one history, in a batch one per history;
            None: not given.
        for_all: arguments that hold for all histories without a value of their own; None: not given.

    Raises:
        InputError: an argument has another number of values than there are histories, or is malformed.
    """
    histories = _as_list(histories)
    one = is_one_history(histories)
    batch = [histories] if one else list(histories)
    requests = [each if isinstance(each, History) else History(items=_as_list(each)) for each in batch]
    for name, value in per_history.items():
        if value is None:
            continue
        values = [value] if one else value
        if isinstance(values, (str, bytes)) or not isinstance(values, Sequence) or len(values) != len(requests):
            count = len(values) if isinstance(values, Sequence) else 1
            raise InputError(f"there are {len(requests)} histories, and {name} has {count} values; give one for each")
        pairs = zip(requests, values, strict=True)
        requests = [request if of is None else replace(request, **{name: of}) for request, of in pairs]
    for name, value in for_all.items():
        if value is not None:
            requests = [
                each if getattr(each, name) is not None else replace(each, **{name: value}) for each in requests
            ]
    return requests


def _as_list(value: Any) -> Any:
    """Columns of numpy, pandas and Arrow as lists; anything else as it is."""
    for name in ("to_pylist", "tolist"):
        if hasattr(value, name):
            return getattr(value, name)()
    return value


def _is_list(value: Any) -> bool:
    return hasattr(value, "__len__") and not isinstance(value, (str, bytes))
