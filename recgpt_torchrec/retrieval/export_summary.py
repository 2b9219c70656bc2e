"""The text of an export: what is in it, for which request, what changed in a delta, and what to do with it."""

from recgpt_torchrec.checkpoints.repeat_bias import describe_bias
from recgpt_torchrec.config import Export
from recgpt_torchrec.data.dataset import Dataset, Manifest
from recgpt_torchrec.data.inputs.request import Request
from recgpt_torchrec.data.inputs.spec import Inputs
from recgpt_torchrec.data.inputs.time_units import describe_time
from recgpt_torchrec.data.reading.footers import time_range
from recgpt_torchrec.retrieval.exports.chain import Chain
from recgpt_torchrec.retrieval.exports.manifest import DeltaManifest, ExportManifest
from recgpt_torchrec.texts.commands import next_line
from recgpt_torchrec.texts.words import count


def describe_contents(config: Export, manifest: ExportManifest | DeltaManifest, dataset: Dataset, reason: str) -> str:
    """What an export holds; `reason` says why users are left out."""
    vectors_each = f", {manifest.interests} vectors each" if manifest.interests > 1 else ""
    left_out = dataset.manifest.users - manifest.users
    note = f"; {count(left_out, 'user')} left out: {reason}" if left_out else ""
    return f"{config.output} ({count(manifest.items, 'item')}, {count(manifest.users, 'user')}{vectors_each}{note})"


def explain_shared(manifest: Manifest, data: str) -> list[str]:
    """Which vectors belong to several keys, where ids are hashes of keys."""
    tables = manifest.preparation.get("ids", {}).get("tables", [])
    return [
        f"Note:    {table['shared']:,} {table['entity']} vectors belong to several keys each ({table['keys']:,} keys, "
        f"{getattr(manifest, table['entity'] + 's'):,} vectors). The key beside a vector is the most frequent of its "
        f"keys; {data}/{table['entity']}_keys lists all"
        for table in tables
        if table["shared"]
    ]


def describe_request(request: Request, inputs: Inputs, dataset: Dataset, chain: Chain | None) -> list[str]:
    """The event type and the time of the request that vectors are made for, and what the time means for a delta."""
    lines = [f"event    asked for: {inputs.events[request.event - 1]}"] if request.event else []
    if request.time is None:
        return lines
    newest = (time_range(dataset) or (0, request.time))[1]
    which = "the newest time of the dataset" if newest == request.time else "given with --time"
    lines += [f"time     of the request: {describe_time(request.time, inputs.time_unit)} ({which})"]
    if newest > request.time:
        lines.append(
            f"note     the dataset has interactions up to {describe_time(newest, inputs.time_unit)}; a user whose last "
            "one is after the request counts as active at that moment"
        )
    earlier = None if chain is None else chain.last.manifest.settings.get("time")
    if chain is not None and earlier != request.time:
        lines.append(
            f"note     {chain.last.path} is for another time: vectors of all users move with it. For deltas of those "
            "with new interactions alone, export each of them with the same --time"
        )
    return lines


def describe_following(config: Export, manifest: ExportManifest | DeltaManifest, chain: Chain | None) -> list[str]:
    """What a delta holds, and what to do with it or with an export."""
    if chain is not None and isinstance(manifest, DeltaManifest):
        return changes(config, manifest, chain)
    return next_steps(config, manifest.repeat_bias)


def next_steps(config: Export, repeat_bias: float) -> list[str]:
    """What to do with an export."""
    repeats = [f"repeat   {describe_bias(repeat_bias)} (retrieve --seen weigh)"] if repeat_bias else []
    return [
        "A user's score for an item is the inner product of their vectors: index items/*.parquet for maximum inner "
        "product and query it with users/*.parquet, or let retrieve do both",
        *repeats,
        next_line("retrieve", {"export": config.output, "data": config.data, "output": "LISTS_FOLDER"}),
    ]


def changes(config: Export, manifest: DeltaManifest, chain: Chain) -> list[str]:
    """What a delta holds, and what to do with it."""
    lines = []
    for name in ("items", "users"):
        whole, new = getattr(manifest, name), getattr(manifest, f"new_{name}")
        sent = sum(part.rows for part in getattr(manifest, f"{name[:-1]}_parts"))
        gone = sum(part.rows for part in getattr(manifest, f"removed_{name[:-1]}_parts"))
        lines.append(
            f"{name:<9}{new:,} new, {sent - new:,} moved, {gone:,} removed: {sent:,} of {whole:,} sent "
            f"({sent / whole:.2%})"
        )
    share = manifest.size / chain.export.manifest.size
    return [
        *lines,
        f"size     {manifest.size:,} bytes, {share:.2%} of {chain.export.path}",
        "A vector store that holds the state of --since takes it as it is: upsert items/ and users/, delete removed_*/",
        next_line(
            "apply",
            {"export": chain.export.path, "deltas": [*chain.paths[1:], config.output], "output": "NEW_EXPORT"},
        ),
    ]
