"""What filters of items and the choice of users did, as the manifest of lists records it."""

from dataclasses import asdict, dataclass

from recgpt_torchrec.storage.typed import check_counts


@dataclass(kw_only=True)
class FilterRecord:
    """What a list or table of keys did, as the manifest of lists records it."""

    path: str = ""
    checksum: str = ""
    """Of the content: another one makes other lists."""
    keys: int = 0
    """Number of distinct keys."""
    fits: int = 0
    """Number of items (or users) of the export that are among them, and meet the condition if there is one."""
    unknown: int = 0
    """Number of keys that are no item (or user) of the export."""
    example: str = ""
    """One of them."""
    absent: int = 0
    """Number of items of the export that a table of items lacks."""
    uncomputed: int = 0
    """Number of items of the export for which the condition cannot be computed."""
    unusable: int = 0
    """Number of rows without a key, and of malformed lines."""

    def __post_init__(self) -> None:
        check_counts({name: value for name, value in asdict(self).items() if isinstance(value, int)})

    def describe(self, option: str) -> str:
        """One line for the summary."""
        kind = {
            "allow": "items allowed",
            "deny": "items denied",
            "items": "items meet --where",
            "users": "users chosen",
        }
        words = [f"{self.fits:,} {kind.get(option, option)}"]
        if self.absent:
            words.append(f"{self.absent:,} left out, as the table lacks them")
        if self.uncomputed:
            words.append(f"{self.uncomputed:,} left out, as --where cannot be computed")
        if self.unknown:
            words.append(f"keys unknown to the export: {self.unknown:,} (such as {self.example!r})")
        if self.unusable:
            words.append(f"rows without a key: {self.unusable:,}")
        return f"--{option} {self.path}: {'; '.join(words)}"
