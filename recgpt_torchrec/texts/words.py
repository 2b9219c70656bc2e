"""Counted nouns, numbers of bytes, and text that can be printed."""

import re

NOUNS = "users items interactions histories rows files lists deltas targets ranks steps epochs days keys places prompts"
"""What programs count in their summaries."""
ONE = re.compile(rf"(?<![\d.,/-])1((?: new| earlier| unknown)?) ({'|'.join(NOUNS.split())})\b( (?:are|have|were)\b)?")


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


def agree(text: str) -> str:
    """A summary whose nouns and verbs agree with the number 1 before them: `1 user has` for `1 users have`.

    Its lines are written for many users and items, and those of a first try have one of something now and then.
    """

    def in_singular(found: re.Match[str]) -> str:
        noun = next(each for each in (f"{found[2][:-3]}y", found[2][:-1]) if pluralize(each) == found[2])
        verb = {None: "", " are": " is", " have": " has", " were": " was"}[found[3]]
        return f"1{found[1]} {noun}{verb}"

    return ONE.sub(in_singular, text)


def format_bytes(count: float) -> str:
    """A number of bytes in readable units, such as `1.5 MB`."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("KB", "MB", "GB"):
        count /= 1000
        if count < 1000:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} TB"


def is_encodable(text: str) -> bool:
    """Whether a text has no half of a surrogate pair, which nothing can print.

    JSON can hold one, and Python keeps bytes of the command line as such that are no text in the locale's encoding.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
