"""Builds the FAISS index of an export, one shard after another on each rank, measures it, and commits it.

`exports.additions` says how files and manifest are replaced.
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import faiss
import numpy as np

from recgpt_torchrec.catalogue.rounds import Rounds
from recgpt_torchrec.config import Index, Retrieve
from recgpt_torchrec.data.candidates import id_range
from recgpt_torchrec.data.ragged import Float32
from recgpt_torchrec.distributed.lockstep import raise_first_error
from recgpt_torchrec.distributed.processes import (
    gather_objects,
    log_message,
    rank,
    run_on_first_rank,
    world_size,
)
from recgpt_torchrec.distributed.watchdog import phase
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.progress import progress_bar
from recgpt_torchrec.retrieval.exports.additions import commit_addition, new_folder
from recgpt_torchrec.retrieval.exports.index_manifest import IndexManifest, IndexShard, vectors_fingerprint
from recgpt_torchrec.retrieval.exports.manifest import ExportManifest
from recgpt_torchrec.retrieval.exports.reading import Export
from recgpt_torchrec.retrieval.exports.vectors import vectors_of
from recgpt_torchrec.retrieval.search import choosing
from recgpt_torchrec.retrieval.search.index import Shard, build
from recgpt_torchrec.retrieval.search.index_files import open_shards, write_shard
from recgpt_torchrec.retrieval.search.sharded_index import ShardedIndex
from recgpt_torchrec.retrieval.search.stored import StoredExactSearch, vector_blocks
from recgpt_torchrec.storage import find_storage_failure
from recgpt_torchrec.texts.commands import command

DEPTHS = (10, 50)
"""List lengths k of the measured recall@k."""
WARM_UP = 100
"""Number of queries searched before the measurement."""


def build_own_shard(config: Retrieve, export: Export) -> list[Shard]:
    """Build an index over this rank's share of the items, which is not kept (collective).

    Raises:
        InputError: on every rank, where the export or the options of the index are wrong for one.
    """
    manifest, kind = export.manifest, config.index
    shards = min(world_size(), manifest.items)
    parameters = choosing.choose_parameters(kind, config, manifest.items, manifest.dim, shards)
    log_message(
        f"{export.path} holds no {kind} index: it is built now and not kept. To keep one: "
        f"{command('index', {'export': export.path, 'index.kind': kind})}"
    )
    own: list[Shard] = []
    failure = None
    try:
        if rank() < shards:
            first, stop = id_range(manifest.items, rank(), shards)
            with phase("building the index", computes=True):
                built = build(kind, partial(vector_blocks, export, first, stop), stop - first, manifest.dim, parameters)
            own = [Shard(built, kind, parameters, first)]
    except Exception as error:
        failure = error
    raise_first_error(failure)
    return own


def open_own_shards(export: Export, index: IndexManifest, config: Retrieve | None = None) -> list[Shard]:
    """Open this rank's shards of the index in an export, whatever number of ranks wrote them (collective).

    Args:
        export: that holds the index.
        index: to open.
        config: whose options of the search count; None: those that the index was measured with.

    Raises:
        InputError: on every rank, where a file is missing or damaged, or the index was replaced meanwhile.
    """
    own: list[Shard] = []
    failure = None
    try:
        own = open_shards(export.path, index, index.shards[rank() :: world_size()], export.manifest.dim)
    except Exception as error:
        failure = error
    try:
        raise_first_error(failure)
    except Exception:
        held, now = export.manifest.index, run_on_first_rank(lambda: ExportManifest.read(export.path).index)
        if held is not None and (now is None or now.shards != held.shards):
            raise InputError(
                f"{export.path}: its index was replaced while it was opened; run the same command again"
            ) from None
        raise
    if config is not None:
        for shard in own:
            shard.parameters = {**index.parameters, **choosing.search_options(index.kind, config)}
    return own


def add_index(export: Export, settings: Index) -> tuple[IndexManifest, bool]:
    """Add an index to an export, in place of one that it holds (collective).

    Args:
        export: opened; its manifest names the index afterwards.
        settings: which index; the kind is not none.

    Returns:
        What the manifest says of the index, and whether it was there already.

    Raises:
        InputError: on every rank, where the export cannot be read or written, or the options do not fit it.
    """
    manifest, there = export.manifest, export.manifest.index
    kind, vectors = choosing.choose_kind(settings.kind, manifest.items, manifest.dim), vectors_fingerprint(manifest)

    if there is not None and there.kind == kind and there.vectors == vectors:
        shards = min(settings.shards or len(there.shards), manifest.items)
        try:
            parameters = choosing.choose_parameters(
                kind, settings, manifest.items, manifest.dim, shards, there.parameters
            )
        except InputError:
            parameters = None  # they fit no shards of this size, but may fit new ones
        if parameters is not None and shards == len(there.shards) and choosing.is_same_build(there, kind, parameters):
            index = replace(there, parameters=parameters)
            try:
                own = open_own_shards(export, index)
            except InputError as error:
                log_message(f"The index is built anew: {error}")
            else:
                if there.parameters == parameters and settings.sample in (0, there.sample):
                    return there, True
                index = replace(index, sample=settings.sample, measured=_measure(export, own, settings.sample))
                return commit_addition(export, "index", index), False
    shards = min(settings.shards or world_size(), manifest.items)
    parameters = choosing.choose_parameters(kind, settings, manifest.items, manifest.dim, shards)
    folder = new_folder("index")
    log_message(f"{export.path}: {kind} index of {manifest.items:,} items, {_describe(parameters, shards)}")
    since = time.perf_counter()
    written: list[IndexShard] = []
    failure: Exception | None = None
    try:
        with phase("building the index", computes=True):
            written = _write_own_shards(export, kind, parameters, shards, folder)
    except InputError as error:
        failure = error
    except (OSError, RuntimeError, MemoryError) as error:  # of FAISS, or of its file
        failure = find_storage_failure(error, f"the index of {export.path}", "write") or InputError(
            f"the index of {export.path} cannot be built: {' '.join(str(error).split())}"
        )
    raise_first_error(failure)
    entries = sorted((shard for each in gather_objects(written) for shard in each), key=lambda shard: shard.first)
    index = IndexManifest(
        kind=kind,
        parameters=parameters,
        vectors=vectors,
        faiss=faiss.__version__,
        build_seconds=max(gather_objects(time.perf_counter() - since)),
        sample=settings.sample,
        shards=entries,
    )
    with phase("measuring the index", computes=True):
        index.measured = _measure(export, open_own_shards(export, index), settings.sample)
    return commit_addition(export, "index", index), False


def _write_own_shards(
    export: Export, kind: str, parameters: Mapping[str, int], shards: int, folder: str
) -> list[IndexShard]:
    """Build and write every `world_size`-th shard."""
    manifest, numbers = export.manifest, range(rank(), shards, world_size())
    ranges = [id_range(manifest.items, number, shards) for number in numbers]
    written = []
    total = sum(stop - first for first, stop in ranges)
    with progress_bar(total, "items", active=rank() == 0) as bar:
        for number, (first, stop) in zip(numbers, ranges, strict=True):
            built = build(
                kind,
                partial(vector_blocks, export, first, stop),
                stop - first,
                manifest.dim,
                parameters,
                added=bar.update,
            )
            written.append(write_shard(export.path, f"{folder}/shard-{number:05d}.faiss", built, first))
            del built  # before the next one is built
    return written


def _measure(export: Export, own: list[Shard], sample: int) -> dict[str, float]:
    """Recall and speed for a sample of user vectors, through the same search as retrieve's (collective)."""
    if not sample:
        return {}
    manifest, rounds = export.manifest, Rounds()
    index = ShardedIndex(own, manifest.items, manifest.dim, rounds)
    exact = StoredExactSearch(export, rounds, hold=False)
    queries = _draw_queries(export, -(-sample // world_size()))
    depths = {f"recall@{k}": min(k, manifest.items) for k in DEPTHS}
    k = max(depths.values())
    index.search(queries[:WARM_UP], k)
    gather_objects(None)
    since = time.perf_counter()
    index.search(queries, k)
    seconds = time.perf_counter() - since
    best = exact.lists(queries[:, None], k, None).items[:, 0].numpy()
    hits = []
    for depth in depths.values():  # a deeper search examines more
        found, _ = index.search(queries, depth)
        hits.append(int((found[:, None, :] == best[:, :depth, None]).any(axis=2).sum()) / depth)
    rounds.finish()
    totals = np.array(gather_objects([len(queries), *hits])).sum(axis=0)
    recalls = dict(zip(depths, (totals[1:] / totals[0]).tolist(), strict=True))
    slowest = max(gather_objects(seconds))
    return {
        **recalls,
        "queries": int(totals[0]),
        "queries_per_second": float(totals[0]) / slowest,
        "threads": faiss.omp_get_max_threads(),
        "ranks": world_size(),
    }


def _draw_queries(export: Export, count: int) -> Float32:
    """Up to `count` user vectors [n, dim], evenly spaced in the first batches of this rank that hold as many."""
    failure = None
    parts = [np.zeros((0, export.manifest.dim), np.float32)]
    try:
        for batch in export.users(rank=rank(), world_size=world_size()):
            parts.append(vectors_of(batch).reshape(-1, export.manifest.dim))
            if sum(map(len, parts)) >= count:
                break
    except InputError as error:
        failure = error
    raise_first_error(failure)
    vectors = np.concatenate(parts)
    return vectors[np.linspace(0, len(vectors) - 1, min(count, len(vectors))).astype(np.int64)]


def summary(index: IndexManifest) -> str:
    """What an index is, and how good and fast it is."""
    lines = [
        f"index       {index.kind}, {_describe(index.parameters, len(index.shards))}, {index.bytes / 2**20:,.1f} MiB, "
        f"built in {index.build_seconds:,.1f} s"
    ]
    if measured := index.measured:
        recalls = "  ".join(f"{name} {measured[name]:.4f}" for name in measured if name.startswith("recall"))
        ranks, threads = int(measured["ranks"]), int(measured["threads"])
        lines.append(
            f"measured    {recalls} of the exact lists of {int(measured['queries']):,} user vectors; "
            f"{measured['queries_per_second']:,.0f} queries/s ({ranks} rank{'s' * (ranks > 1)}, "
            f"{threads} thread{'s' * (threads > 1)} each)"
        )
    return "\n".join(lines)


def _describe(parameters: Mapping[str, int], shards: int) -> str:
    options = [f"{name} {value}" for name, value in parameters.items()]
    return ", ".join([*options, f"{shards} shard{'s' * (shards > 1)}"])
