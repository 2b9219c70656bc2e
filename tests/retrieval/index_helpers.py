"""Exports of given vectors, indexes of them, and the lists that plain numpy finds in them."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from recgpt_torchrec.config import HNSW, IVF, PQ, Index
from recgpt_torchrec.retrieval.exports.index_manifest import IndexManifest
from recgpt_torchrec.retrieval.exports.manifest import ExportManifest
from recgpt_torchrec.retrieval.exports.reading import Export, open_export
from recgpt_torchrec.storage import filesystem, folders
from recgpt_torchrec.storage.parts import write_parts

ITEMS, USERS, DIM = 1200, 60, 16
KINDS = {
    "flat": 1.0,
    "ivf": 0.9,
    "ivf_pq": 0.9,
    "hnsw": 0.95,
}
"""Recall@10 that each kind reaches at least."""
OPTIONS = {"hnsw": HNSW(build=60), "ivf": IVF(clusters=10, probes=5), "pq": PQ(m=8, bits=5)}


def vectors(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    """[rows, dim] float32, in clusters, with unequal norms."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(12, dim))
    near = centres[rng.integers(12, size=rows)] + 0.8 * rng.normal(size=(rows, dim))
    return (near * rng.lognormal(0, 0.3, size=(rows, 1))).astype(np.float32)


def write_vectors(path: Path, items: np.ndarray, users: np.ndarray, rows: int = 150) -> Export:
    """Write an export of [items, dim] and [users, dim] float32, in row groups of `rows` rows."""
    fs, root = filesystem(str(path))

    def tables(kind: str, values: np.ndarray) -> list[pa.Table]:
        ids = np.arange(len(values))
        column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
        table = pa.table({f"{kind}_id": ids, "key": pa.array(ids).cast(pa.string()), "vector": column})
        return [table.slice(first, rows) for first in range(0, len(values), rows)]

    manifest = ExportManifest(
        items=len(items),
        users=len(users),
        dim=items.shape[1],
        vocabulary="v",
        item_parts=write_parts(fs, root, "items", tables("item", items), 2),
        user_parts=write_parts(fs, root, "users", tables("user", users), 2),
    )
    folders.write_manifest(fs, root, manifest.to_json())
    return open_export(str(path))


def plain_lists(items: np.ndarray, users: np.ndarray, k: int, allowed: np.ndarray | None = None) -> np.ndarray:
    """[users, k] the best allowed items by sorting all scores."""
    scores = users.astype(np.float64) @ items.T.astype(np.float64)
    if allowed is not None:
        scores[:, ~allowed] = -np.inf
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def recall(found: np.ndarray, expected: np.ndarray) -> float:
    """Share of the expected items that were found."""
    shared = [len(set(a) & set(b)) for a, b in zip(found.tolist(), expected.tolist(), strict=True)]
    return sum(shared) / expected.size


def settings(kind: str, **changes) -> Index:
    return Index(**{"kind": kind, "sample": 20, **OPTIONS, **changes})


def index_of(export: Export) -> IndexManifest:
    assert export.manifest.index is not None
    return export.manifest.index
