"""What filters of items did, as the manifest of lists records it."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class FilterRecord:
    """What a list or table of keys did, as the manifest of lists records it."""

    path: str = ""
    checksum: str = ""
    """Of the content: another one makes other lists."""
    keys: int = 0
    """Number of distinct keys."""
    fits: int = 0
    """Number of items of the export that are among them, and meet the condition if there is one."""
    unknown: int = 0
    """Number of keys that are no item of the export."""
    example: str = ""
    """One of them."""
    absent: int = 0
    """Number of items of the export that a table of items lacks."""
    uncomputed: int = 0
    """Number of items of the export for which the condition cannot be computed."""
    unusable: int = 0
    """Number of rows without a key, and of malformed lines."""

    def describe(self, option: str) -> str:
        """One line for the summary."""
        kind = {"allow": "allowed", "deny": "denied", "items": "meet --where"}[option]
        words = [f"{self.fits:,} items {kind}"]
        if self.absent:
            words.append(f"{self.absent:,} items are not in the table and left out")
        if self.uncomputed:
            words.append(f"{self.uncomputed:,} left out, as --where cannot be computed")
        if self.unknown:
            words.append(f"{self.unknown:,} keys are unknown to the export (such as {self.example!r})")
        if self.unusable:
            words.append(f"{self.unusable:,} rows have no key")
        return f"--{option} {self.path}: {'; '.join(words)}"
