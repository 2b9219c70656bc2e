"""Whether a dataset is what it seems, and what of it training will not see."""

import time

from recgpt_torchrec.data.dataset import Manifest
from recgpt_torchrec.diagnosis.contents import Contents
from recgpt_torchrec.diagnosis.finding import Finding, Severity

REJECTED = 0.01
"""Share of the log's rows from which on their rejection is a warning."""
DROPPED = 0.5
"""Share of the log's users or items from which on their loss to k-core is a warning."""
REPEATED = 0.2
"""Share of the interactions from which on repeats of items are worth knowing."""
IN_A_ROW = 0.1
"""Share of the interactions from which on the same item twice in a row is a warning."""
WITHOUT_TARGET = 0.2
"""Share of the items from which on it is a warning that they are never a target."""
ONE_ITEM = 0.1
"""Share of the training interactions that one item has, from which on it is a warning."""
ONE_USER = 100_000
"""Length of a history from which on a person is unlikely to have made it."""
SHORT = 5
"""Median length of a history under which there is little to learn of order."""
EARLIEST = 631_152_000
"""Seconds since 1970 until 1990: a log with older times is likely to have zeros or another unit."""
DAY = 86_400


def check_dataset(manifest: Manifest, contents: Contents, now: float) -> list[Finding]:
    """Findings about a dataset.

    Args:
        manifest: of the dataset.
        contents: as read.
        now: seconds since 1970.
    """
    findings = [
        Finding(
            "ok",
            "size",
            f"{manifest.users:,} users, {manifest.items:,} items, {manifest.interactions:,} interactions; histories of "
            f"{contents.length_at(0)}, {contents.length_at(0.5)}, {contents.length_at(1)} (min, median, max)",
        ),
        _check_damage(contents),
        _check_rejected(manifest),
        *_check_k_core(manifest),
        *_check_lengths(contents),
        *_check_held_out(manifest),
        *_check_times(manifest, contents, now),
        _check_repeats(contents),
        *_check_items(manifest, contents),
    ]
    return findings


def _check_damage(contents: Contents) -> Finding:
    if not contents.damages:
        return Finding("ok", "rows", "no nulls, all ids in range, all histories in time order")
    first = "; ".join(map(str, contents.damages[:3]))
    text = f"{len(contents.damages):,} places are damaged: {first}{'; ...' * (len(contents.damages) > 3)}"
    cure = "restore the files or prepare again; or train without them: --stream.damaged skip"
    return Finding("error", "rows", text, cure)


def _check_rejected(manifest: Manifest) -> Finding:
    rows = manifest.preparation.get("rows", 0)
    rejected = manifest.preparation.get("rejected", {})
    count = sum(rejected.values())
    if not count:
        return Finding("ok", "log", f"all {rows:,} rows were read" if rows else "not recorded")
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in rejected.items())
    severity: Severity = "warning" if count > REJECTED * max(rows, 1) else "note"
    return Finding(severity, "log", f"{count:,} of {rows:,} rows were rejected: {reasons}", "mend them at their source")


def _check_k_core(manifest: Manifest) -> list[Finding]:
    rounds = manifest.preparation.get("rounds", [])
    if not rounds:
        return []
    findings = []
    for name in ("users", "items"):
        before, lost = rounds[0][name], sum(each[f"{name}_removed"] for each in rounds)
        share = lost / max(before, 1)
        text = f"{lost:,} of {before:,} {name} were dropped by --min_count ({share:.1%})"
        if share >= DROPPED:
            cure = "they get no vectors and are in no list; prepare with a smaller --min_count"
            findings.append(Finding("warning", "k-core", text, cure))
        else:
            findings.append(Finding("note" if lost else "ok", "k-core", text))
    return findings


def _check_lengths(contents: Contents) -> list[Finding]:
    findings = []
    if (median := contents.length_at(0.5)) < SHORT:
        text = f"half of the histories have at most {median} interactions"
        findings.append(Finding("warning", "lengths", text, "take a longer log; attributes of users and items help"))
    if (longest := contents.length_at(1)) >= ONE_USER:
        text = f"one user has {longest:,} interactions: a program, or a key that stands for many"
        findings.append(Finding("warning", "lengths", text, "leave such users out of the log"))
    return findings


def _check_held_out(manifest: Manifest) -> list[Finding]:
    counts = {split: manifest.count_targets(split) for split in ("validation", "test")}
    if manifest.hold_out == "none":
        text = "nothing is held out: every interaction is trained on, nothing can be measured"
        return [Finding("note", "held out", text)]
    if not any(counts.values()) and None not in counts.values():
        text = f"no user has a held-out item (--hold_out {manifest.hold_out})"
        return [Finding("warning", "held out", text, "prepare with another --hold_out, or a longer log")]
    words = " and ".join(f"{'unknown' if n is None else f'{n:,}'} of {split}" for split, n in counts.items())
    return [Finding("ok", "held out", f"users with an item: {words}")]


def _check_times(manifest: Manifest, contents: Contents, now: float) -> list[Finding]:
    if contents.times is None:
        return [Finding("note", "times", "there are none: histories are in the order of the log's rows")]
    if (unit := manifest.time_unit) is None:
        return [Finding("note", "times", "their unit is not known", "prepare with --time_unit, to read gaps and hours")]
    oldest, newest = (each * unit for each in contents.times)
    text = f"{_date(oldest)} to {_date(newest)}"
    if newest > now + DAY:
        return [Finding("warning", "times", f"{text}: in the future", "look at --time_unit of prepare, and at the log")]
    if oldest < EARLIEST:
        cure = "look for zeros among the times, and at --time_unit of prepare"
        return [Finding("warning", "times", f"{text}: before 1990", cure)]
    return [Finding("ok", "times", text)]


def _check_repeats(contents: Contents) -> Finding:
    entries = max(contents.entries, 1)
    share, in_a_row = contents.repeats / entries, contents.repeats_in_a_row / entries
    text = f"{share:.1%} of the interactions repeat an item of the same user, {in_a_row:.1%} the one just before"
    if in_a_row >= IN_A_ROW:
        cure = "if they are one event logged twice: prepare --repeats collapse, or --duplicates"
        return Finding("warning", "repeats", text, cure)
    if share >= REPEATED:
        cure = "read the unmasked figures of evaluate, and retrieve without --data, which leaves the history out"
        return Finding("note", "repeats", text, cure)
    return Finding("ok", "repeats", text)


def _check_items(manifest: Manifest, contents: Contents) -> list[Finding]:
    findings = []
    never = contents.items[0]
    total = sum(count * number for count, number in contents.items.items())
    if never:
        described = any(each.entity == "item" for each in manifest.attributes)
        share = never / manifest.items
        text = f"{never:,} of {manifest.items:,} ({share:.1%}) have no training interaction: they are never a target"
        if described:
            findings.append(Finding("note", "items", f"{text}, and consist of their attributes"))
        else:
            cure = "give their attributes (prepare --items), or train on all rows: --hold_out none"
            findings.append(Finding("warning" if share >= WITHOUT_TARGET else "note", "items", text, cure))
    text = (
        f"half of the training interactions are with {contents.items_of_half():,} items; the most popular has "
        f"{contents.most_popular / max(total, 1):.1%}"
    )
    if contents.most_popular >= ONE_ITEM * max(total, 1) and manifest.items > 1 / ONE_ITEM:
        cure = "look whether it is an item at all (a default, a home page), and leave it out of the log"
        findings.append(Finding("warning", "skew", text, cure))
    else:
        findings.append(Finding("ok", "skew", text))
    return findings


def _date(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d", time.gmtime(seconds))
    except (OverflowError, OSError, ValueError):
        return f"{seconds:.3g} seconds after 1970"
