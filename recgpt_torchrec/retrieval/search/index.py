"""FAISS indexes of one shard of the items: builds them, and searches them with some items left out.

Maximum inner product search. Knows nothing of users, ranks or files. OMP_NUM_THREADS sets FAISS's threads.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from recgpt_torchrec.data.ragged import Float32, Int64
from recgpt_torchrec.retrieval.search.restricted import Bool

FAISS: Any = faiss
"""Without its type stubs, which lack arguments and classes of its Python wrappers."""
Blocks = Callable[[], Iterator[Float32]]
"""Yields the vectors of a shard anew, [n, dim] float32, block by block in order of their ids."""

PER_CLUSTER = 64
"""Number of vectors per cluster that clusters are trained on; FAISS recommends 39 to 256."""
PER_CODE = 64
"""Number of vectors per code that codes are trained on. With FAISS's 256 it takes four times as long, most of the time
of building."""
TRAINING_BYTES = 2**28
"""Maximum size of the sample that an index is trained on, as far as there is one vector per cluster."""
FEW = 0.1
"""Up to this share of allowed items their vectors are scored one by one, where the index holds them. A graph would be
walked through items that do not count."""
ADDED = 2**14
"""Number of vectors that are added at once."""
CANDIDATES = 2**22
"""Maximum number of candidates of one call of FAISS."""


class Shard:
    """A FAISS index of the items `first` to `first` + `items` - 1.

    Example: `items, scores = Shard(build("hnsw", blocks, 64, parameters), "hnsw", parameters).search(queries, 50)`
    """

    def __init__(self, index: Any, kind: str, parameters: Mapping[str, int], first: int = 0) -> None:
        """
        Args:
            index: of FAISS; row r is the item `first` + r.
            kind: flat, ivf, ivf_pq or hnsw.
            parameters: options of the kind by their dotted names, all of them chosen (see `choosing`).
            first: id of its first item.
        """
        self.index, self.kind, self.parameters, self.first = index, kind, parameters, first

    @property
    def items(self) -> int:
        """Number of items."""
        return int(self.index.ntotal)

    def search(self, queries: Float32, k: int, allowed: Bool | None = None) -> tuple[Int64, Float32]:
        """Find the items with the largest inner product.

        Args:
            queries: [queries, dim] float32.
            k: items per query, at least 1.
            allowed: [all items] bool, which ids may be found, those of other shards included; None: all.

        Returns:
            items: [queries, k] int64 ids, best first; -1 at the end where fewer were found.
            scores: [queries, k] float32 inner products; -inf beside -1.
        """
        items = np.full((len(queries), k), -1, dtype=np.int64)
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        depth, bits, share = min(k, self.items), None, 1.0
        if allowed is not None:
            own = allowed[self.first : self.first + self.items]
            count = int(np.count_nonzero(own))
            if not count:
                return items, scores
            if count < self.items:
                bits, share, depth = np.packbits(own, bitorder="little"), count / self.items, min(depth, count)
        index, parameters = self._plan(depth, bits, share)
        rows = max(1, CANDIDATES // (depth * max(1, self.parameters.get("pq.refine", 1))))
        for start in range(0, len(queries), rows):
            part = slice(start, start + rows)
            values, found = index.search(np.ascontiguousarray(queries[part]), depth, params=parameters)
            items[part, :depth] = np.where(found < 0, -1, found + self.first)
            scores[part, :depth] = np.where(found < 0, -np.inf, values)
        return items, scores

    def _plan(self, depth: int, bits: npt.NDArray[np.uint8] | None, share: float) -> tuple[Any, Any]:
        """The FAISS index to search and its parameters; with a filter, more is examined in proportion."""
        index, stored = self.index, None
        if self.kind == "hnsw":
            stored = FAISS.downcast_index(index.storage)
        elif self.kind == "ivf_pq":
            stored = FAISS.downcast_index(index.refine_index)
        given: dict[str, Any] = {} if bits is None else {"sel": FAISS.IDSelectorBitmap(bits)}
        if self.kind == "flat" or (bits is not None and share <= FEW and stored is not None):
            return (index if stored is None else stored), FAISS.SearchParameters(**given)
        if self.kind == "hnsw":
            examined = max(self.parameters["hnsw.search"], depth)
            given["efSearch"] = min(math.ceil(examined / share), self.items)
            return index, FAISS.SearchParametersHNSW(**given)
        inner = FAISS.downcast_index(index.base_index) if stored is not None else index
        given["nprobe"] = min(math.ceil(self.parameters["ivf.probes"] / share), inner.nlist)
        if self.kind == "ivf":
            return index, FAISS.SearchParametersIVF(**given)
        factor = min(float(self.parameters["pq.refine"]), self.items / depth)
        codes = FAISS.IVFPQSearchParameters(**given)
        return index, FAISS.IndexRefineSearchParameters(k_factor=factor, base_index_params=codes)


def build(
    kind: str,
    blocks: Blocks,
    items: int,
    dim: int,
    parameters: Mapping[str, int],
    added: Callable[[int], object] = lambda _: None,
) -> Any:
    """Build the FAISS index of a shard; the whole shard is in memory then, beside one block.

    Args:
        kind: flat, ivf, ivf_pq or hnsw.
        blocks: the shard's vectors, which are read once, or twice where there is something to train.
        items: number of vectors.
        dim: length of a vector.
        parameters: options of the kind by their dotted names, all of them chosen (see `choosing`).
        added: called with the number of vectors that were added since the last call.
    """
    index = make_empty(kind, items, dim, parameters)
    if not index.is_trained:
        index.train(_draw_sample(blocks, items, _training_rows(items, dim, parameters)))
    for vectors in blocks():
        for start in range(0, len(vectors), ADDED):
            part = np.ascontiguousarray(vectors[start : start + ADDED])
            index.add(part)
            added(len(part))
    return index


def make_empty(kind: str, items: int, dim: int, parameters: Mapping[str, int]) -> Any:
    """An untrained FAISS index for `items` vectors [dim].

    HNSW uses the inner product directly: on 12,101 item vectors with norms from .46 to 1.64 that found .991 of the best
    100. The reduction to Euclidean distance (one more dimension, which makes all norms equal) found .970 with the same
    settings. k-means has FAISS's fixed seed, so clusters are the same in every run.
    """
    metric = FAISS.METRIC_INNER_PRODUCT
    if kind == "flat":
        return FAISS.IndexFlatIP(dim)
    if kind == "hnsw":
        index = FAISS.IndexHNSWFlat(dim, parameters["hnsw.neighbours"], metric)
        index.hnsw.efConstruction = parameters["hnsw.build"]
        index.hnsw.efSearch = parameters["hnsw.search"]
        return index
    clusters, quantizer = min(parameters["ivf.clusters"], items), FAISS.IndexFlatIP(dim)
    if kind == "ivf":
        index = FAISS.IndexIVFFlat(quantizer, dim, clusters, metric)
    else:
        index = FAISS.IndexIVFPQ(quantizer, dim, clusters, parameters["pq.m"], parameters["pq.bits"], metric)
        index.pq.cp.min_points_per_centroid, index.pq.cp.max_points_per_centroid = 1, PER_CODE
    # Below the minimum FAISS warns on standard error; above the maximum it draws a sample.
    index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, PER_CLUSTER
    # The vectors beside their codes: the best by codes are scored again, exactly. They are mapped, not read.
    return index if kind == "ivf" else FAISS.IndexRefineFlat(index)


def _training_rows(items: int, dim: int, parameters: Mapping[str, int]) -> int:
    clusters = parameters["ivf.clusters"]
    wanted = max(PER_CLUSTER * clusters, PER_CODE << parameters.get("pq.bits", 0))
    return min(items, max(clusters, min(wanted, TRAINING_BYTES // (4 * dim))))


def _draw_sample(blocks: Blocks, items: int, rows: int) -> Float32:
    """[rows, dim] float32 vectors, drawn with a fixed seed."""
    chosen = np.sort(np.random.default_rng(0).choice(items, rows, replace=False, shuffle=False))
    first, parts = 0, []
    for vectors in blocks():
        low, high = np.searchsorted(chosen, (first, first + len(vectors)))
        parts.append(vectors[chosen[low:high] - first])
        first += len(vectors)
    return np.concatenate(parts)
