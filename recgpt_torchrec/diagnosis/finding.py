"""A finding: what was looked at, how bad it is, and what to do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Severity = Literal["ok", "note", "warning", "error"]
"""ok: as it should be. note: worth knowing. warning: a run works, but slower or worse than it could. error: it cannot
work."""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report."""

    severity: Severity
    subject: str
    """What was looked at, in a word or two."""
    text: str
    """What was found, with its figures."""
    cure: str = ""
    """What to do; empty where there is nothing to do."""


def report(sections: dict[str, Sequence[Finding]]) -> str:
    """The findings by section, a line each, and below it what to do."""
    width = max((len(each.subject) for findings in sections.values() for each in findings), default=0)
    lines = []
    for title, findings in sections.items():
        lines.append(title)
        for each in findings:
            lines.append(f"  {each.severity:<8} {each.subject:<{width}}  {each.text}")
            if each.cure:
                lines.append(f"  {'':<8} {'':<{width}}  -> {each.cure}")
    return "\n".join(lines)


def summary(findings: Sequence[Finding]) -> str:
    """How many findings there are of each severity."""
    counts = {name: sum(each.severity == name for each in findings) for name in ("error", "warning", "note")}
    words = [f"{count} {name}{'s' * (count > 1)}" for name, count in counts.items() if count]
    return f"{len(findings)} things looked at: " + (", ".join(words) or "nothing found")
