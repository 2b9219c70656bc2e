"""The deltas of `daily.py`: what each sends, and whether they lead to the export of their day."""

from pathlib import Path
from typing import Any


def delta_of(tolerance: float, day: int) -> str:
    """Title of the step that writes a delta, and its folder."""
    return f"exports/tolerance_{tolerance:g}/day{day}"


def read_delta(folder: Path, tolerance: float, day: int) -> dict[str, Any]:
    """What a delta sends, and whether day 0 with all deltas applied is the export of the day; {}: unfinished."""
    from recgpt_torchrec.retrieval.exports.chain import open_chain
    from recgpt_torchrec.retrieval.exports.changes import has_moved
    from recgpt_torchrec.retrieval.exports.reading import open_delta, open_export
    from recgpt_torchrec.retrieval.exports.vectors import vectors_of

    path = folder / delta_of(tolerance, day)
    applied = path.with_name(f"{path.name}_applied")
    if not (applied / "manifest.json").exists():
        return {}
    manifest, full = open_delta(str(path)).manifest, open_export(str(folder / f"exports/day{day}"))
    chain = open_chain([str(applied)])
    found: dict[str, Any] = {"tolerance": tolerance, "bytes": manifest.size, "full_bytes": full.manifest.size}
    for name, batches in (("items", full.items()), ("users", full.users())):
        new, count = getattr(manifest, f"new_{name}"), getattr(manifest, name)
        sent = sum(part.rows for part in getattr(manifest, f"{name[:-1]}_parts"))
        gone = sum(part.rows for part in getattr(manifest, f"removed_{name[:-1]}_parts"))
        found[name] = {"new": new, "moved": sent - new, "removed": gone, "count": count}
        is_same = getattr(chain.export.manifest, name) == getattr(full.manifest, name)
        for batch in batches:
            held, is_there = chain.vectors_of(name, batch[f"{name[:-1]}_id"].to_numpy())
            is_same &= bool(is_there.all()) and not has_moved(held, vectors_of(batch), tolerance).any()
        found[f"same_{name}"] = is_same
    return found


def delta_lines(days: list[dict[str, Any]]) -> list[str]:
    """The section of the report on deltas."""
    lines = [
        "",
        "## Deltas",
        "",
        "Vectors of the first warm run, as a delta to the days before. Bytes are over those of an export of the day. "
        "Applied: whether the export of day 0 with all deltas applied is the export of the day, up to the tolerance.",
        "",
        "| day | tolerance | items: new / moved / removed | sent | users: new / moved / removed | sent | bytes "
        "| applied |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for day in days:
        for delta in day["deltas"]:
            cells = []
            for name in ("items", "users"):
                of = delta[name]
                cells.append(f"{of['new']:,} / {of['moved']:,} / {of['removed']:,}")
                cells.append(f"{(of['new'] + of['moved']) / of['count']:.1%}")
            same = "the same" if delta["same_items"] and delta["same_users"] else "ANOTHER"
            share = delta["bytes"] / delta["full_bytes"]
            lines.append(f"| {day['day']} | {delta['tolerance']:g} | {' | '.join(cells)} | {share:.1%} | {same} |")
    return lines
