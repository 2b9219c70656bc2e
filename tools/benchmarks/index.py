"""Builds each kind of FAISS index in an export, opens it in new processes, and measures time, memory, speed and recall.

    OMP_NUM_THREADS=2 python -m tools.benchmarks.index --items 1e6 --output index.json
    OMP_NUM_THREADS=2 python -m tools.benchmarks.index --export vectors/mine --output index.json

Without `--export` the vectors are drawn: items around `--groups` centres that lie around fewer ones in turn, with
log-normal norms; a user is the mean of a few like items, with noise. The stage `index` builds, on one rank with all
threads (OMP_NUM_THREADS). Each index is then opened by new processes: with its files dropped from the page cache, and
again with one thread and with all; checking the files' checksums is part of it. "MiB open" is what the process holds
more than before once the index is open, and "MiB searched" once it has searched (what is mapped counts as soon as it is
touched; "own" is what the process allocated). Recall is that of the exact lists. `exact` is the search without an
index, as `retrieve --index exact` does it. The JSON file is written after every kind.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from recgpt_torchrec.data.ragged import Float32
from recgpt_torchrec.retrieval.exports.index_manifest import KINDS, PARAMETERS
from recgpt_torchrec.retrieval.exports.manifest import ExportManifest
from recgpt_torchrec.retrieval.exports.reading import open_export
from recgpt_torchrec.retrieval.exports.vectors import vectors_of
from recgpt_torchrec.storage import filesystem, folders
from recgpt_torchrec.storage.parts import write_parts
from tools.benchmarks.processes import run_stage_measured
from tools.write_dataset import whole

MIB = 2**20
ROWS = 65536
"""Rows per row group."""
USERS = 20_000
K = 50


def draw_items(items: int, dim: int, groups: int) -> Iterator[Float32]:
    """Item vectors [n, dim] float32, in groups within groups, block by block."""
    rng = np.random.default_rng(0)
    above = rng.normal(size=(max(1, groups // 30), dim))
    centres = above[rng.integers(len(above), size=groups)] + 0.7 * rng.normal(size=(groups, dim))
    shares = rng.dirichlet(np.full(groups, 0.5))
    for first in range(0, items, ROWS):
        rows = min(ROWS, items - first)
        vectors = centres[rng.choice(groups, size=rows, p=shares)] + 0.6 * rng.normal(size=(rows, dim))
        yield (vectors * rng.lognormal(-0.5 * np.log(dim), 0.25, size=(rows, 1))).astype(np.float32)


def draw_users(items: Float32, users: int) -> Float32:
    """User vectors [users, dim] float32: three items in the direction of a first one, averaged, with noise."""
    rng = np.random.default_rng(1)
    seeds = items[rng.integers(len(items), size=users)]
    pool = items[rng.integers(len(items), size=2000)]
    near = np.argsort(-(seeds @ pool.T), axis=1)[:, :3]
    mean = (seeds + pool[near].sum(axis=1)) / 4
    return (mean + 0.3 * mean.std() * rng.normal(size=mean.shape)).astype(np.float32)


def write_vectors(path: str, blocks: Iterator[Float32], items: int, dim: int) -> None:
    """Write an export of drawn vectors."""
    fs, root = filesystem(path)
    sample: list[Float32] = []

    def table(kind: str, first: int, vectors: Float32) -> pa.Table:
        ids = np.arange(first, first + len(vectors))
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), dim)
        return pa.table({f"{kind}_id": ids, "key": pa.array(ids).cast(pa.string()), "vector": column})

    def item_tables() -> Iterator[pa.Table]:
        first = 0
        for vectors in blocks:
            sample.append(vectors[:: max(1, items // 100_000)].copy())
            yield table("item", first, vectors)
            first += len(vectors)

    item_parts = write_parts(fs, root, "items", item_tables(), 16)
    users = draw_users(np.concatenate(sample), USERS)
    user_parts = write_parts(fs, root, "users", iter([table("user", 0, users)]), 16)
    manifest = ExportManifest(
        items=items, users=USERS, dim=dim, item_parts=item_parts, user_parts=user_parts, vocabulary="drawn"
    )
    folders.write_manifest(fs, root, manifest.to_json())


def open_and_search(path: str, queries: int, exact: bool) -> dict[str, float]:
    """Open an export's index in this process, or read its vectors, and search; figures of time and memory."""
    import faiss
    import torch

    from recgpt_torchrec.catalogue.rounds import Rounds
    from recgpt_torchrec.retrieval.search.indexing import open_own_shards
    from recgpt_torchrec.retrieval.search.sharded_index import ShardedIndex
    from recgpt_torchrec.retrieval.search.stored import StoredExactSearch

    torch.set_num_threads(faiss.omp_get_max_threads())
    export = open_export(path)
    users = np.concatenate([vectors_of(batch).reshape(-1, export.manifest.dim) for batch in export.users()])
    users = users[np.linspace(0, len(users) - 1, min(queries, len(users))).astype(np.int64)]
    before, rounds = memory(), Rounds()
    since = time.perf_counter()
    index = None
    if exact:
        search = StoredExactSearch(export, rounds)
        search.read()
    else:
        assert export.manifest.index is not None
        index = ShardedIndex(
            open_own_shards(export, export.manifest.index), export.manifest.items, export.manifest.dim, rounds
        )
    opened = time.perf_counter() - since
    held = memory()

    def find(vectors: Float32) -> object:
        return search.lists(vectors[:, None], K, None) if index is None else index.search(vectors, K)

    find(users[: max(1, len(users) // 10)])
    since = time.perf_counter()
    find(users)
    seconds = time.perf_counter() - since
    after = memory()
    return {
        "open_seconds": opened,
        "open_bytes": held["VmRSS"] - before["VmRSS"],
        "open_own_bytes": held["RssAnon"] - before["RssAnon"],
        "searched_bytes": after["VmRSS"] - before["VmRSS"],
        "searched_own_bytes": after["RssAnon"] - before["RssAnon"],
        "queries_per_second": len(users) / seconds,
        "threads": faiss.omp_get_max_threads(),
    }


def memory() -> dict[str, int]:
    """Resident memory of this process, all of it and what is no file's, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "RssAnon"))}
    return {name: 1024 * int(value) for name, value in values.items()}


def drop_from_cache(folder: Path) -> None:
    """Drop the files below a folder from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_opening(path: str, queries: int, threads: int, exact: bool = False) -> dict[str, float]:
    """`open_and_search` in a process of its own."""
    words = [sys.executable, "-m", "tools.benchmarks.index", "--open", path, "--queries", str(queries)]
    done = subprocess.run(
        [*words, *(["--exact"] if exact else [])],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"opening {path} failed:\n{done.stderr[-2000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure_kind(path: str, kind: str, options: argparse.Namespace, threads: int) -> dict[str, Any]:
    """Build an index of a kind, and open it cold and warm."""
    words: dict[str, object] = {"--export": path, "--index.kind": kind, "--index.sample": options.queries}
    for name, _, value in (word.partition("=") for word in options.set):
        if name in PARAMETERS[kind]:
            words[f"--index.{name}"] = value
    environment = {"OMP_NUM_THREADS": str(threads)}
    ended = run_stage_measured("index", words, 1, timeout=options.timeout, environment=environment)
    if ended.status:
        return {"failed": ended.last_lines}
    index = open_export(path).manifest.index
    assert index is not None
    drop_from_cache(Path(path) / "index")
    cold = run_opening(path, min(100, options.queries), threads)
    one, many = (run_opening(path, options.queries, number) for number in (1, threads))
    return {
        "parameters": index.parameters,
        "build_seconds": index.build_seconds,
        "build_peak_bytes": ended.peaks.get(0, 0),
        "bytes": index.bytes,
        "measured": index.measured,
        "cold": cold,
        "one_thread": one,
        "all_threads": many,
    }


def table(figures: dict[str, Any]) -> str:
    """The figures as text, a line per kind."""
    heading: tuple[str, ...] = (
        "kind",
        "build s",
        "MiB",
        "recall@10",
        "recall@50",
        "q/s 1 thr",
        f"q/s {figures['threads']} thr",
    )
    heading += ("open cold s", "open warm s", "MiB open (own)", "MiB searched (own)")
    rows: list[Sequence[str]] = [heading]
    for kind, values in figures["kinds"].items():
        if "failed" in values:
            rows.append((kind, "FAILED", *[""] * (len(heading) - 2)))
            continue
        one, many = values["one_thread"], values["all_threads"]
        measured = values.get("measured", {"recall@10": 1.0, "recall@50": 1.0})
        rows.append(
            (
                kind,
                f"{values['build_seconds']:,.1f}" if "build_seconds" in values else "",
                f"{values['bytes'] / MIB:,.0f}" if "bytes" in values else "",
                f"{measured['recall@10']:.4f}",
                f"{measured['recall@50']:.4f}",
                f"{one['queries_per_second']:,.0f}",
                f"{many['queries_per_second']:,.0f}",
                f"{values['cold']['open_seconds']:.2f}",
                f"{many['open_seconds']:.2f}",
                f"{one['open_bytes'] / MIB:,.0f} ({one['open_own_bytes'] / MIB:,.0f})",
                f"{one['searched_bytes'] / MIB:,.0f} ({one['searched_own_bytes'] / MIB:,.0f})",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main(arguments: list[str] | None = None) -> int:
    """Measure the kinds and print the table; returns 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=whole, default=10**6, help="number of items drawn (default: 1,000,000)")
    parser.add_argument("--dim", type=int, default=64, help="length of the vectors drawn (default: 64)")
    parser.add_argument("--groups", type=int, default=3000, help="number of groups of items drawn (default: 3,000)")
    parser.add_argument("--export", help="folder of an export, which is copied; its vectors instead of drawn ones")
    parser.add_argument("--kinds", nargs="+", default=["exact", *KINDS], choices=["exact", *KINDS])
    parser.add_argument("--set", nargs="+", default=[], help="further options of the index, hnsw.build=100 ...")
    parser.add_argument("--queries", type=int, default=2000, help="number of queries (default: 2,000)")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for one build (default: 3,600)")
    parser.add_argument("--folder", help="where a temporary folder for the export is made")
    parser.add_argument("--output", help="JSON file for the figures")
    parser.add_argument("--open", help=argparse.SUPPRESS)
    parser.add_argument("--exact", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.open:
        print(json.dumps(open_and_search(options.open, options.queries, options.exact)))
        return 0
    threads = int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0))))
    with tempfile.TemporaryDirectory(prefix="index-", dir=options.folder) as folder:
        path = f"{folder}/vectors"
        if options.export:
            shutil.copytree(options.export, path, ignore=shutil.ignore_patterns("index"))
        else:
            write_vectors(path, draw_items(options.items, options.dim, options.groups), options.items, options.dim)
        manifest = open_export(path).manifest
        figures: dict[str, Any] = {"items": manifest.items, "dim": manifest.dim, "threads": threads, "kinds": {}}
        for kind in options.kinds:
            if kind == "exact":
                cold = run_opening(path, min(20, options.queries), threads, exact=True)
                few = max(1, options.queries // 10)  # slow
                one, many = (run_opening(path, few, number, exact=True) for number in (1, threads))
                figures["kinds"][kind] = {"cold": cold, "one_thread": one, "all_threads": many}
            else:
                figures["kinds"][kind] = measure_kind(path, kind, options, threads)
            if options.output:
                Path(options.output).write_text(json.dumps(figures, indent=1))
            print(f"{kind}: {figures['kinds'][kind].get('failed', 'done')}", flush=True)
    print(table(figures))
    return int(any("failed" in values for values in figures["kinds"].values()))


if __name__ == "__main__":
    sys.exit(main())
