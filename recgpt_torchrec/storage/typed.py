"""JSON that is read into values of known types: what a file holds is checked before anything uses it.

`json` alone accepts more than JSON: names that occur twice (the last one counts), and nesting and numbers that end in
errors of many kinds. And a number may be true, a list null, a count -1 or 10^300.
"""

import json
import math
import zlib
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from recgpt_torchrec.texts.words import is_encodable

T = TypeVar("T")

JSON_BYTES = 2**28
"""Maximum size of a JSON file: a manifest takes about 200 bytes per part, so a million parts."""
DEPTH = 32
"""Maximum nesting of lists and objects."""
COUNT = 2**53
"""Maximum number of anything: beyond it, floating-point numbers do not hold every whole number."""
SEAL = "checksum"
"""Name of a JSON object's checksum in it: crc32 of the rest, with sorted names, as eight hex digits."""
SHOWN = 60
"""Maximum number of characters of a wrong value in a message."""


def parse_object(text: bytes | str, sealed: bool = True) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        text: UTF-8.
        sealed: whether its checksum, if it has one (see `seal`), is checked and removed.

    Raises:
        ValueError: it is not UTF-8 or JSON, is nested too deeply, has a name twice or another checksum than it says, or
            is another value.
    """
    try:
        value = json.loads(text if isinstance(text, str) else text.decode(), object_pairs_hook=_make_object)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not an object")
    level: list[Any] = [value]
    for _ in range(DEPTH):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, str) and ("\0" in each or not each.isascii() and not is_encodable(each)):
                raise ValueError("a text in it has a character that is none")
            inner += [*each, *each.values()] if isinstance(each, dict) else each if isinstance(each, list) else []
        level = inner
    if level:
        raise ValueError("it is nested too deeply")
    return check_seal(value) if sealed else value


def seal(values: dict[str, Any]) -> dict[str, Any]:
    """Add the checksum of a JSON object's content, so that a changed digit is noticed when it is read."""
    return {**values, SEAL: _checksum(json.loads(json.dumps(values)))}  # of what is read back: all names are texts


def check_seal(values: dict[str, Any]) -> dict[str, Any]:
    """Check and remove the checksum of a JSON object; files of earlier versions have none.

    Raises:
        ValueError: it is not that of the content.
    """
    values = dict(values)
    recorded = values.pop(SEAL, None)
    if recorded is not None and recorded != (checksum := _checksum(values)):
        raise ValueError(f"its checksum is {checksum}, it promises {_show(recorded)}")
    return values


def _checksum(values: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(values, sort_keys=True).encode()):08x}"


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        twice = next(name for number, (name, _) in enumerate(pairs) if name in dict(pairs[:number]))
        raise ValueError(f"it has {twice[:SHOWN]!r} twice")
    return values


def make_typed(cls: type[T], values: Any, place: str = "", others: bool = False) -> T:
    """Make a dataclass of JSON values, each of which must be of its field's type.

    Types are those of JSON, `Literal`, unions with None, lists, dicts, and dataclasses in any of these. A float may be
    given as a whole number; whole numbers are at most `COUNT`, and true is none.

    Args:
        cls: its fields with defaults may be missing.
        values: a dict by field name.
        place: prefix of field names in messages, for example `progress.`.
        others: whether values without a field are ignored, here and in what is nested.

    Raises:
        ValueError: a field is missing, unknown, of another type, or refused by the class itself.
    """
    subject = place.removesuffix(".") or "it"
    if not isinstance(values, dict):
        raise ValueError(f"{subject} is {_show(values)}, it must be an object")
    hints, known = get_type_hints(cls), {each.name: each for each in fields(cls)}  # type: ignore[arg-type]
    if not others and (unknown := values.keys() - known.keys()):
        raise ValueError(f"{subject} has an unknown field '{min(unknown)[:SHOWN]}'")
    required = [name for name, each in known.items() if each.default is MISSING and each.default_factory is MISSING]
    if missing := [f"'{name}'" for name in required if name not in values]:
        raise ValueError(f"{subject} has no {', '.join(missing)}")
    given = {name: values[name] for name in known if name in values}
    return cls(**{name: _convert(hints[name], value, f"{place}{name}", others) for name, value in given.items()})


def _convert(kind: Any, value: Any, name: str, others: bool) -> Any:
    """`value` as one of type `kind`: itself, or the dataclasses made of it."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for member in arguments:
            if member is NoneType and value is None:
                return None
        return _convert(next(member for member in arguments if member is not NoneType), value, name, others)
    if kind is Any:
        return value
    if is_dataclass(kind):
        return make_typed(kind, value, f"{name}.", others)  # type: ignore[arg-type]
    if origin is list and isinstance(value, list):
        return [_convert(arguments[0], each, f"{name}[{number}]", others) for number, each in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: _convert(arguments[1], each, f"{name}.{key[:SHOWN]}", others) for key, each in value.items()}
    checks: dict[Any, tuple[str, Callable[[Any], bool]]] = {
        int: ("a whole number", is_count_or_negative),
        float: ("a number", lambda each: isinstance(each, int | float) and not isinstance(each, bool)),
        str: ("a text", lambda each: isinstance(each, str)),
        bool: ("true or false", lambda each: isinstance(each, bool)),
        dict: ("an object", lambda each: isinstance(each, dict)),
        list: ("a list", lambda each: isinstance(each, list)),
        Literal: (f"one of {', '.join(map(str, arguments))}", lambda each: each in arguments),
    }
    words, check = checks[origin or kind]
    if not check(value):
        raise ValueError(f"{name} is {_show(value)}, it must be {words}")
    if kind is float:
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{name} is {_show(value)}, it must be a number") from None
    return value


def is_count_or_negative(value: Any) -> bool:
    """Whether this is a whole number of at most `COUNT`, by its absolute value; true and 1.0 are none."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= COUNT


def check_counts(counts: dict[str, Any]) -> None:
    """Check that values are whole numbers from 0 to `COUNT`.

    Raises:
        ValueError: names the first that is not.
    """
    for name, count in counts.items():
        if not is_count_or_negative(count) or count < 0:
            raise ValueError(f"{name} is {_show(count)}, it must be a number of at least 0")


def check_finite(values: dict[str, Any]) -> None:
    """Check that values are finite numbers of at least 0.

    Raises:
        ValueError: names the first that is not.
    """
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is {value}, it must be a number of at least 0")


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
