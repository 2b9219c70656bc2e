"""Counted nouns."""


def count(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun: `1 item`, `1,200 items`, `1 history`.

    Args:
        number: how many.
        noun: in the singular.
        plural: None: with an s, or ies for a y after a consonant.
    """
    return f"{number:,} {noun if number == 1 else plural or pluralize(noun)}"


def pluralize(noun: str) -> str:
    """The plural of a noun: items, histories."""
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}s"
