"""Whether what lies at the output is the very result that was asked for: then nothing is to be done again.

A result says how it was made in values that JSON holds. Where these differ it is another one, never written over.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from recgpt_torchrec.errors import InputError
from recgpt_torchrec.storage.files import exists
from recgpt_torchrec.storage.folders import MANIFEST, check_free

T = TypeVar("T")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted names.

    Example: `flatten({"seed": 0, "model": {"dim": 64}})` is `{"seed": 0, "model.dim": 64}`.
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any], ignored: Collection[str] = ()) -> list[str]:
    """A line for each value, by its dotted name, that differs; what one side lacks is None there."""
    there, now = flatten(found), flatten(wanted)
    return [
        f"{name}: {there.get(name)} there, {now.get(name)} now"
        for name in dict.fromkeys([*now, *there])
        if name not in ignored and there.get(name) != now.get(name)
    ]


def check_same(place: str, name: str, differing: list[str], remedy: str = "choose another --output") -> None:
    """Raise an `InputError` that lists what differs, if anything does.

    Example: `check_same("--output runs/demo", "export", differences(found, wanted))`.
    """
    if differing:
        lines = "".join(f"\n  {line}" for line in differing)
        raise InputError(
            f"{place} holds another {name} of other options or inputs:{lines}\nNothing was touched; {remedy}"
        )


def find_finished(path: str, name: str, read: Callable[[str], T], compare: Callable[[T], list[str]]) -> T | None:
    """What `read` returns for the output `path`, if that is the very result asked for; None: it may be written.

    Args:
        path: folder or URI.
        name: what is to lie there, for example `dataset`.
        read: opens and checks a folder that has a manifest.
        compare: lines of `differences` between what was read and what is asked for.

    Raises:
        InputError: something else lies there, or another result.
    """
    if not exists(f"{path}/{MANIFEST}"):
        check_free(path, name)
        return None
    found = read(path)
    check_same(f"--output {path}", name, compare(found))
    return found
