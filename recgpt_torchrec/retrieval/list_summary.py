"""The summary of a set of lists: what they hold, how they were made, and how good they are."""

import json
import shlex

from recgpt_torchrec.checkpoints.repeat_bias import describe_bias
from recgpt_torchrec.config import Retrieve
from recgpt_torchrec.retrieval.exports.manifest import ExportManifest
from recgpt_torchrec.retrieval.list_folder import ListManifest
from recgpt_torchrec.retrieval.merging import MergeRule


def describe_lists(
    config: Retrieve, export: ExportManifest, manifest: ListManifest, rule: MergeRule, interests: int
) -> str:
    """The lines of the summary, each with a label.

    Args:
        config: options of the stage.
        export: that was searched.
        manifest: of the lists.
        rule: merged the interests.
        interests: number of interests used.
    """
    measured = manifest.measured
    items, places = sum(part.items for part in manifest.parts), manifest.users * config.k
    lines = [
        f"lists       {manifest.users:,} users, {config.k} items each"
        + (f" ({places - items:,} places are empty: no items are left)" if items < places else ""),
        "from        "
        + (rule.describe(interests, config.k) if interests > 1 else "one vector per user")
        + _describe_seen(config, export)
        + (f"; neighbours from {config.neighbours.path} raised" if config.neighbours.path is not None else ""),
        f"index       {manifest.settings.get('index', config.index)}, ready in {measured['index_seconds']:.1f} s; "
        f"{measured['users_per_second']:,.0f} users/s",
    ]
    for option, record in manifest.filters.items():
        lines.append(f"{'users' if option == 'users' else 'filter':<12}{record.describe(option)}")
    if (allowed := manifest.allowed) is not None:
        fewer = f", fewer than --k {config.k}: no list is longer" if allowed < config.k else ""
        lines.append(f"allowed     {allowed:,} of {export.items:,} items{fewer}")
    if manifest.empty:
        lines.append(
            f"empty       {manifest.empty:,} lists, such as that of {manifest.example!r}: the history holds every item "
            "that may be in it; allow more items"
        )
    if config.fallback == "popular":
        users = "user" if config.users is None else "chosen user"
        got = f"{manifest.popular:,} users without a vector got popular items"
        lines.append(f"fallback    {got if manifest.popular else f'not needed: every {users} of --data has a vector'}")
    history = export.settings.get("history", "all")
    if "recall" in measured:
        recall = measured["recall"]
        lines.append(f"recall      {recall[f'recall@{config.k}']:.4f} of the exact lists of {recall['users']:,} users")
    if "hits" in measured:
        figures = "  ".join(f"{name} {value:.4f}" for name, value in measured["hits"].items())
        how = "masked" if config.seen == "leave_out" else "weighed"
        lines.append(f"hits        {figures} (the {history} item of each user, history {how})")
    return "\n".join(lines)


def _describe_seen(config: Retrieve, export: ExportManifest) -> str:
    """What became of the items of the history."""
    if config.data is None:
        return ", items of the history not left out (no --data)"
    if config.seen == "leave_out":
        return ", items of the history left out"
    return f", items of the history weighed (repeat {describe_bias(export.repeat_bias)})"


def look_line(output: str) -> str:
    """A command that prints some users' lists by their raw keys."""
    table = f'pq.read_table({json.dumps(f"{output}/lists")}, columns=["key", "item_keys"])'
    code = f"import pyarrow.parquet as pq; [print(*row.values()) for row in {table}[:5].to_pylist()]"
    return f"Look:    python -c {shlex.quote(code)}"
