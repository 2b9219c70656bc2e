"""Names and kinds of attributes, as options give them: NAME or NAME:KIND."""

from collections import Counter
from dataclasses import dataclass

KINDS = ("category", "list", "number", "text")
"""What a column may be taken for."""
NAME_LENGTH = 100
"""Maximum length of a name, in bytes: it becomes part of the names of files."""


@dataclass(frozen=True)
class AskedAttribute:
    """An attribute that is asked for."""

    name: str
    """Of the column."""
    kind: str | None
    """One of `KINDS`; None: what the column's type says."""

    @classmethod
    def parse(cls, text: str) -> "AskedAttribute":
        """Parse NAME or NAME:KIND; in a name a colon is allowed where a kind follows."""
        name, _, kind = text.rpartition(":")
        return cls(name.strip(), kind.strip()) if name else cls(text.strip(), None)


def parse_attributes(option: str, values: list[str]) -> list[str]:
    """Split values at commas, and check names and kinds.

    Args:
        option: for messages.
        values: as they were given; each may hold several, separated by commas.

    Returns:
        NAME or NAME:KIND of each attribute.

    Raises:
        ValueError: a name is empty, too long or given twice, or a kind is unknown.
    """
    words = [word.strip() for value in values for word in value.split(",") if word.strip()]
    asked = [AskedAttribute.parse(word) for word in words]
    for word, each in zip(words, asked, strict=True):
        if each.kind is not None and each.kind not in KINDS:
            raise ValueError(
                f"{option} {word}: {each.kind!r} is no kind; give NAME or NAME:KIND with {', '.join(KINDS)}"
            )
        if not each.name or not 1 <= len(each.name.encode()) <= NAME_LENGTH:
            raise ValueError(f"{option} {word[:60]}: names have 1 to {NAME_LENGTH} bytes; rename the column")
    for name, count in Counter(each.name for each in asked).items():
        if count > 1:
            raise ValueError(f"{option} names {name} twice; name each column once")
    return words
