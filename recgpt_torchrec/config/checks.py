"""Range checks of options, whose messages name the option, its value and the values it may have; and lists of words."""

from collections.abc import Sequence

MAX_SEED = 2**32 - 1
"""Largest seed: each step makes seeds of 64 bits of it."""


def at_least(option: str, value: float, minimum: float) -> None:
    """Check that an option is finite and not below a minimum.

    Args:
        option: its name on the command line.
        value: its value.
        minimum: the smallest value allowed.

    Raises:
        ValueError: "--batch.tokens is 0; it must be at least 1".
    """
    if not minimum <= value < float("inf"):
        finite = " and finite" if value == float("inf") else ""
        raise ValueError(f"{option} is {value}; it must be at least {minimum}{finite}")


def within(option: str, value: float, minimum: float, maximum: float, note: str = "") -> None:
    """Check that an option lies in a range.

    Args:
        option: its name on the command line.
        value: its value.
        minimum: the smallest value allowed.
        maximum: the largest value allowed.
        note: end of the message, for example what a limit comes from.

    Raises:
        ValueError: "--interests is 99; it must be from 1 to 32".
    """
    if not minimum <= value <= maximum:
        raise ValueError(f"{option} is {value}; it must be from {minimum} to {maximum}{note}")


def split_words(given: Sequence[str]) -> list[str]:
    """Words that may be given as `a,b`, as `a b` or as a list, each once."""
    words = [word.strip() for value in given for word in value.split(",")]
    return list(dict.fromkeys(word for word in words if word))


def check_ids(
    ids: str, user_rows: int | None, item_rows: int | None, eviction_step: int, need_rows: bool = True
) -> None:
    """Check that the options of `prepare` about ids fit together; without `need_rows` they may lack numbers of rows.

    Raises:
        ValueError: they do not.
    """
    rows = {"user_rows": user_rows, "item_rows": item_rows}
    given = [f"--{name} {value}" for name, value in rows.items() if value is not None]
    if ids == "vocabulary" and given:
        raise ValueError(f"{given[0]} belongs to --ids hash or managed; give one of them, or leave it out")
    if ids != "vocabulary" and not given and need_rows:
        raise ValueError(f"--ids {ids} needs the size of a table; give --item_rows, --user_rows or both")
    for name, value in rows.items():
        if value is not None and not 1 <= value < 2**31:
            raise ValueError(f"--{name} is {value}; it must be from 1 to {2**31 - 1}")
    at_least("--eviction_step", eviction_step, 1)
