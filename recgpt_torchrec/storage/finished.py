"""Compares a finished output with what is asked for: the same result is not computed again, another one is kept.

A result records its options and inputs as JSON values. Where these differ it is another result, never overwritten.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from recgpt_torchrec.errors import InputError
from recgpt_torchrec.storage.files import exists
from recgpt_torchrec.storage.folders import MANIFEST, check_free

T = TypeVar("T")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested values to dotted names.

    Example: `flatten({"seed": 0, "model": {"dim": 64}})` is `{"seed": 0, "model.dim": 64}`.
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def differences(stored: Mapping[str, Any], requested: Mapping[str, Any], ignored: Collection[str] = ()) -> list[str]:
    """One line per value that differs, by its dotted name; a value that one side lacks is None."""
    old, new = flatten(stored), flatten(requested)
    return [
        f"{name}: {old.get(name)} there, {new.get(name)} now"
        for name in dict.fromkeys([*new, *old])
        if name not in ignored and old.get(name) != new.get(name)
    ]


def check_same(place: str, name: str, differing: list[str], remedy: str = "choose another --output") -> None:
    """Raise an `InputError` that lists what differs, if anything does.

    Example: `check_same("--output runs/demo", "export", differences(stored, requested))`.
    """
    if differing:
        lines = "".join(f"\n  {line}" for line in differing)
        raise InputError(
            f"{place} holds another {name}, made with other options or inputs:{lines}\nNothing was touched; {remedy}"
        )


def find_finished(path: str, name: str, read: Callable[[str], T], compare: Callable[[T], list[str]]) -> T | None:
    """What `read` returns for the output `path`, if it holds the result asked for; None: `path` may be written.

    Args:
        path: folder or URI.
        name: kind of the folder, for example `dataset`.
        read: opens and checks a folder that has a manifest.
        compare: returns the lines of `differences` between what was read and what is asked for.

    Raises:
        InputError: `path` holds something else, or another result.
    """
    if not exists(f"{path}/{MANIFEST}"):
        check_free(path, name)
        return None
    result = read(path)
    check_same(f"--output {path}", name, compare(result))
    return result
