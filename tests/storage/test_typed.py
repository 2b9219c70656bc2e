"""JSON values of known types: what fits is taken, everything else is refused with its name."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from recgpt_torchrec.storage.typed import check_counts, check_finite, make_typed, parse_object, seal


@dataclass(kw_only=True)
class Inner:
    size: int


@dataclass(kw_only=True)
class Outer:
    count: int
    share: float = 0.5
    name: str | None = None
    kind: Literal["a", "b"] = "a"
    on: bool = False
    inner: Inner | None = None
    inners: list[Inner] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    anything: dict[str, Any] = field(default_factory=dict)


def test_values_of_the_right_types_are_taken() -> None:
    given = {"count": -3, "share": 1, "name": None, "kind": "b", "on": True, "inner": {"size": 2}}
    more = {"inners": [{"size": 1}], "figures": {"x": 2}, "anything": {"y": [None]}}
    made = make_typed(Outer, given | more)
    assert made == Outer(
        count=-3,
        share=1.0,
        kind="b",
        on=True,
        inner=Inner(size=2),
        inners=[Inner(size=1)],
        figures={"x": 2.0},
        anything={"y": [None]},
    )
    assert isinstance(made.share, float) and isinstance(made.figures["x"], float)
    assert make_typed(Outer, {"count": 2**53}).count == 2**53


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], r"it is \[\], it must be an object"),
        ({}, "it has no 'count'"),
        ({"count": 1, "other": 2}, "it has an unknown field 'other'"),
        ({"count": True}, "count is True, it must be a whole number"),
        ({"count": 1.0}, "count is 1.0, it must be a whole number"),
        ({"count": "1"}, "count is '1', it must be a whole number"),
        ({"count": None}, "count is None, it must be a whole number"),
        ({"count": 2**53 + 1}, "count is 9007199254740993, it must be a whole number"),
        ({"count": 1, "share": "x"}, "share is 'x', it must be a number"),
        ({"count": 1, "share": False}, "share is False, it must be a number"),
        ({"count": 1, "share": 10**400}, "share is 10{59}..., it must be a number"),
        ({"count": 1, "name": 3}, "name is 3, it must be a text"),
        ({"count": 1, "kind": "c"}, "kind is 'c', it must be one of a, b"),
        ({"count": 1, "kind": ["a"]}, r"kind is \['a'\], it must be one of a, b"),
        ({"count": 1, "on": 1}, "on is 1, it must be true or false"),
        ({"count": 1, "inner": {}}, "inner has no 'size'"),
        ({"count": 1, "inner": {"size": "x" * 99}}, "inner.size is 'x{59}..., it must be a whole number"),
        ({"count": 1, "inners": {}}, "inners is {}, it must be a list"),
        ({"count": 1, "inners": [{"size": 1}, 2]}, r"inners\[1\] is 2, it must be an object"),
        ({"count": 1, "figures": {"x": "y"}}, "figures.x is 'y', it must be a number"),
        ({"count": 1, "anything": []}, r"anything is \[\], it must be an object"),
    ],
)
def test_other_values_are_refused_with_their_names(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        make_typed(Outer, values)


def test_values_without_a_field_can_be_ignored() -> None:
    assert make_typed(Outer, {"count": 1, "x": 1, "inner": {"size": 1, "y": 2}}, others=True).inner == Inner(size=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "Expecting value"),
        (b"[]", "not an object"),
        (b"1", "not an object"),
        (b'{"a": 1, "a": 2}', "it has 'a' twice"),
        (b'{"b": {"a": 1, "a": 1}}', "it has 'a' twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b'{"a": ' + b"[" * 33 + b"]" * 33 + b"}", "it is nested too deeply"),
        (b'{"a": ' + b"[" * 99_999 + b"]" * 99_999 + b"}", "it is nested too deeply"),
        (b'{"a":' * 99_999 + b"1" + b"}" * 99_999, "it is nested too deeply"),
        (b'{"a": "\xff"}', "it is not UTF-8: invalid start byte at byte 7"),
        ('{"a": 1}'.encode("utf-16"), "it is not UTF-8"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b'{"a": "\\ud800"}', "a text in it has a character that is none"),
        (b'{"a": ["\\u0000"]}', "a text in it has a character that is none"),
        (b'{"\\ud800": 1}', "a text in it has a character that is none"),
        (b'{"a": 1} {"a": 1}', "Extra data"),
    ],
)
def test_a_file_that_is_no_json_object_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_object(text)


def test_a_sealed_object_is_read_back_and_any_other_digit_is_noticed() -> None:
    values = {"a": 1, "b": [0.1, -1e300, float("-inf"), None], "c": {"ä": "é", "1": 2}}
    text = json.dumps(seal(values))
    assert parse_object(text) == values
    assert parse_object(json.dumps(values)) == values  # of an earlier version
    assert parse_object(json.dumps(seal(values), indent=1, sort_keys=True)) == values  # the layout does not matter
    assert parse_object(json.dumps(seal({1: "x"}))) == {"1": "x"}  # type: ignore[dict-item]
    for place in [place for place, character in enumerate(text) if character.isdigit()]:
        changed = text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :]
        with pytest.raises(ValueError, match="its checksum is"):
            parse_object(changed)


def test_counts_and_finite_numbers() -> None:
    check_counts({"rows": 0, "bytes": 2**53})
    check_finite({"read": 0.0, "targets": 5})
    for wrong in (-1, True, 1.0, None, "1", 2**53 + 1):
        with pytest.raises(ValueError, match="rows is .*, it must be a number of at least 0"):
            check_counts({"rows": wrong})
    for value in (float("nan"), float("inf"), -0.5):
        with pytest.raises(ValueError, match="read is .*, it must be a number of at least 0"):
            check_finite({"read": value})
