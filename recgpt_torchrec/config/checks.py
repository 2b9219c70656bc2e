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
