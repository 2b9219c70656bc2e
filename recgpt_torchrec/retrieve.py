"""Stage `retrieve`: an export -> a list of items for each user, by an exact or an approximate index; needs no model."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from recgpt_torchrec import cli
from recgpt_torchrec.config import Retrieve
from recgpt_torchrec.errors import InputError

if TYPE_CHECKING:
    from recgpt_torchrec.retrieval.export_folder import Export
    from recgpt_torchrec.retrieval.list_folder import ListManifest
    from recgpt_torchrec.retrieval.merging import Lists, Merged

CANDIDATES = 2**22
"""Items that all interests of the users searched at once find together, at most."""
USERS = 4096
"""Users searched at once, at most."""


def main(config: Retrieve) -> None:
    """Search for every user, and write the lists."""
    from recgpt_torchrec.data.dataset import Dataset, fingerprint_of
    from recgpt_torchrec.distributed.processes import process_group, show
    from recgpt_torchrec.retrieval.export_folder import open_export
    from recgpt_torchrec.retrieval.list_folder import ListManifest

    with process_group():
        export = open_export(config.export)
        dataset = Dataset.open(config.data) if config.data is not None else None
        merge, interests = check(config, export, dataset)
        manifest = ListManifest(
            k=config.k,
            export=config.export,
            export_fingerprint=export.fingerprint,
            vocabulary=export.manifest.vocabulary,
            dataset_fingerprint="" if dataset is None else fingerprint_of(dataset),
            settings=asdict(config),
        )
        made = finished(config.output, manifest)
        if made is None:
            manifest = retrieve(config, export, dataset, merge, interests, manifest)
        show(summary(config, export, made or manifest, merge, interests))
        show(f"{'Already there' if made else 'Written'}: {config.output}")
        show(f"Look:    python -c \"import pyarrow.parquet as pq; print(pq.read_table('{config.output}/lists')[:5])\"")


def check(config: Retrieve, export: "Export", dataset: Any) -> tuple[str, int]:
    """How interests are merged and how many are used, once the options fit the export and the dataset."""
    manifest = export.manifest
    if config.k > manifest.items:
        raise InputError(
            f"--k is {config.k}, but {config.export} has {manifest.items} items; ask for at most that many"
        )
    merge, interests = config.merge, config.interests or manifest.interests
    if merge == "auto":
        merge = "two_step" if interests > 1 else "score"
    if merge == "two_step":
        interests = 2
    if interests > manifest.interests:
        raise InputError(
            f"{'two steps take 2 interests' if merge == 'two_step' else f'--interests is {interests}'}, but "
            f"{config.export} has {manifest.interests} a user; export again with --interests {interests}"
        )
    if config.m and merge != "two_step":
        raise InputError(f"--m is {config.m}, but {config.export} has one interest a user; export again with more")
    if dataset is not None and dataset.manifest.vocabulary != manifest.vocabulary:
        raise InputError(
            f"{config.export} was made from another dataset than {config.data} (vocabulary "
            f"{manifest.vocabulary[:12]}, the dataset has {dataset.manifest.vocabulary[:12]}): its ids mean other "
            f"items. It was made from {manifest.dataset}"
        )
    return merge, interests


def finished(path: str, manifest: "ListManifest") -> "ListManifest | None":
    """The manifest of the lists in `path`, if they are those of the same export, dataset and options."""
    from recgpt_torchrec.retrieval.list_folder import check_free, open_lists

    there = open_lists(path)
    if there is None:
        check_free(path)  # before an index is built in vain
        return None
    for name in ("settings", "export_fingerprint", "dataset_fingerprint"):
        if getattr(there.manifest, name) != getattr(manifest, name):
            raise InputError(
                f"{path} holds lists of other options, or of another state of the export or the dataset "
                f"({there.manifest.export}); choose another --output"
            )
    return there.manifest


def merging(config: Retrieve, merge: str, interests: int) -> "Callable[[Lists], Merged]":
    """How lists of several interests become one."""
    from recgpt_torchrec.retrieval.merging import even_quotas, merge_by_score, merge_quota

    if merge == "score":
        return lambda lists: merge_by_score(lists, config.k)
    m = m_of(config)
    quotas = [m, config.k - m] if merge == "two_step" else even_quotas(config.k, interests)
    return lambda lists: merge_quota(lists, quotas)


def m_of(config: Retrieve) -> int:
    """Items of the first interest in two steps."""
    return config.m or max(1, round(0.9 * config.k))


def retrieve(
    config: Retrieve, export: "Export", dataset: Any, merge: str, interests: int, manifest: "ListManifest"
) -> "ListManifest":
    """Build the index, search, and write (collective: ranks share the users out, each with the whole index)."""
    import numpy as np
    import torch
    import torch.distributed as dist

    from recgpt_torchrec.distributed.processes import rank, say, world_size
    from recgpt_torchrec.evaluation.metrics import RankingMetrics, list_ranks
    from recgpt_torchrec.evaluation.ranking import reduced
    from recgpt_torchrec.progress import bar
    from recgpt_torchrec.retrieval import index as indexes
    from recgpt_torchrec.retrieval.export_folder import to_numpy
    from recgpt_torchrec.retrieval.list_folder import ListBatch, write_lists
    from recgpt_torchrec.retrieval.retriever import Retriever
    from recgpt_torchrec.retrieval.user_histories import Histories

    merged, total = merging(config, merge, interests), export.manifest.users
    count = export.manifest.interests
    each = f"{count} interest{'s' * (count > 1)} each"
    say(f"{config.export}: {export.manifest.items:,} items, {total:,} users, {each}")
    _, vectors = export.item_vectors()
    since = time.perf_counter()
    whole = indexes.Index(indexes.exact(vectors), exact=True)
    exact = searcher = Retriever(whole, config.k, merged)
    if config.index != "exact":
        made = indexes.hnsw(vectors, config.hnsw) if config.index == "hnsw" else indexes.ivf(vectors, config.ivf)
        searcher = Retriever(indexes.Index(made, exact=False), config.k, merged, whole)
    built = time.perf_counter() - since
    del vectors
    histories = Histories(dataset, export.manifest.settings["history"]) if dataset is not None else None
    hits = RankingMetrics((config.k,))
    # Of rank's users: how many were compared, what of their exact lists was found, what there was to find, seconds.
    compared = torch.zeros(4, dtype=torch.float64)
    every = max(1, total // config.sample) if config.sample and searcher is not exact else 0

    def batches() -> Iterator[ListBatch]:
        rows = max(1, min(USERS, CANDIDATES // (interests * config.k)))
        mine = export.users(rows=rows, rank=rank(), world_size=world_size())
        with bar(total if rank() == 0 else None, "users", active=rank() == 0) as shown:
            for batch in mine:
                users = batch["user_id"].to_numpy()
                queries = to_numpy(batch[export.user_column]).reshape(len(users), -1, export.manifest.dim)
                queries = queries[:, :interests]
                history = histories.of(users) if histories is not None else None
                seen = history.seen if history is not None else None
                lists = searcher.lists(queries, seen)
                if history is not None and history.held_out is not None:
                    hits.update(list_ranks(lists.items, torch.from_numpy(history.held_out)))
                if every and (some := np.flatnonzero(users % every == 0)).size:
                    compare(exact, queries, seen, some, lists, compared)
                shown.update(min(len(users) * world_size(), total - shown.n))
                yield ListBatch(users, batch["key"], lists)

    since = time.perf_counter()

    def measured() -> dict[str, Any]:
        seconds = time.perf_counter() - since - compared[3].item()
        found: dict[str, Any] = {"index_seconds": built, "users_per_second": total / seconds}
        if histories is not None and export.manifest.settings["history"] != "all":
            found["hits"] = reduced(hits).result()
        if every:
            dist.all_reduce(compared)
            users, there, wanted, _ = compared.tolist()
            found["recall"] = {"users": int(users), f"recall@{config.k}": there / max(1.0, wanted)}
        return found

    return write_lists(config.output, manifest, batches(), export.item_keys(), measured)


def compare(exact: Any, queries: Any, seen: Any, some: Any, lists: "Merged", compared: Any) -> None:
    """Add to `compared` how much of the exact lists of `some` users (rows) stands in their lists."""
    import torch

    from recgpt_torchrec.retrieval.retriever import rows_of

    since = time.perf_counter()
    best = exact.lists(queries[some], None if seen is None else rows_of(seen, some)).items
    found = (best[:, :, None] == lists.items[some][:, None, :]).any(dim=2) & (best >= 0)
    compared += torch.tensor([len(some), found.sum(), (best >= 0).sum(), time.perf_counter() - since])


def summary(config: Retrieve, export: "Export", manifest: "ListManifest", merge: str, interests: int) -> str:
    """What was made and how good it is."""
    how = {
        "score": f"likeliest items of {interests} interests",
        "quota": f"equal shares of {interests} interests",
        "two_step": f"{m_of(config)} items of the first interest and {config.k - m_of(config)} of the second",
    }[merge]
    history = export.manifest.settings.get("history", "all")
    measured = manifest.measured
    items, least = sum(part.items for part in manifest.parts), manifest.users * config.k
    lines = [
        f"lists       {manifest.users:,} users, {config.k} items each"
        + (f" ({least - items:,} places stay empty: no more items are left)" if items < least else ""),
        f"from        {how if interests > 1 else 'one vector a user'}, "
        + ("items of the history left out" if config.data else "items of the history among them (no --data)"),
        f"index       {config.index}, built in {measured['index_seconds']:.1f} s; "
        f"{measured['users_per_second']:,.0f} users/s",
    ]
    if "recall" in measured:
        found = measured["recall"]
        lines.append(f"recall      {found[f'recall@{config.k}']:.4f} of the exact lists of {found['users']:,} users")
    if "hits" in measured:
        figures = "  ".join(f"{name} {value:.4f}" for name, value in measured["hits"].items())
        lines.append(f"hits        {figures} (the {history} item of each user, history masked)")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(Retrieve, main, "recgpt_torchrec.retrieve")
