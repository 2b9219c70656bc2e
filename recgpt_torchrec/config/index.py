"""Options of a FAISS index: of the one in an export, and of one that retrieve builds; and of the stage index."""

from dataclasses import dataclass, field
from typing import Literal

from recgpt_torchrec.config.checks import at_least, within


@dataclass(kw_only=True)
class HNSW:
    """Graph of near neighbours (hnsw)."""

    neighbours: int = 32
    """Number of neighbours per item (M); more improve recall and take more memory, 8 bytes per neighbour and item."""
    build: int = 200
    """Number of items examined when an item is inserted (efConstruction); more make a better graph and a slower
    build."""
    search: int = 0
    """Number of items examined per search (efSearch), never fewer than the search returns; more improve recall and take
    longer. 0: as the index in the export was measured, 128 for a new one."""

    def __post_init__(self) -> None:
        for name, least in {"neighbours": 2, "build": 1, "search": 0}.items():
            at_least(f"--hnsw.{name}", getattr(self, name), least)


@dataclass(kw_only=True)
class IVF:
    """Clusters of items (ivf, ivf_pq)."""

    clusters: int = 0
    """Number of clusters per shard (nlist), at most the number of its items; 0: four times the square root of the
    number of items, but no more than one per 39 items."""
    probes: int = 0
    """Number of nearest clusters examined per search (nprobe); more improve recall and take longer. 0: as the index in
    the export was measured, 64 for a new one."""

    def __post_init__(self) -> None:
        at_least("--ivf.clusters", self.clusters, 0)
        at_least("--ivf.probes", self.probes, 0)


@dataclass(kw_only=True)
class PQ:
    """Codes of product quantization (ivf_pq)."""

    m: int = 0
    """Number of parts that a vector is cut into, each with a code of its own; must divide the vectors' length. More
    improve recall and take more memory, `bits` each per item. 0: the length over four, or the next divisor below."""
    bits: int = 8
    """Bits per code, 4 to 8; a shard needs at least 2^bits items."""
    refine: int = 0
    """Number of candidates found by their codes per item returned; they are scored again with their vectors, which lie
    in the same file and stay on disk until they are needed. More improve recall and take longer. 0: as the index in the
    export was measured, 8 for a new one."""

    def __post_init__(self) -> None:
        at_least("--pq.m", self.m, 0)
        within("--pq.bits", self.bits, 4, 8)
        at_least("--pq.refine", self.refine, 0)


@dataclass(kw_only=True)
class Index:
    """FAISS index of the item vectors, in the export."""

    kind: Literal["none", "auto", "flat", "ivf", "ivf_pq", "hnsw"] = "none"
    """none: no index is made, and one that the export holds stays. flat: every item is scored. ivf: the items of the
    nearest clusters. ivf_pq: the same by short codes, then the best again by their vectors. hnsw: a graph of near
    neighbours. auto: flat up to 100,000 items, hnsw up to 4 million, ivf_pq beyond."""
    shards: int = 0
    """Number of files, each with an id range of the items. They are dealt to the ranks that build, and to those that
    retrieve. One shard is in a rank's memory while it is built. 0: one per rank."""
    hnsw: HNSW = field(default_factory=HNSW)
    ivf: IVF = field(default_factory=IVF)
    pq: PQ = field(default_factory=PQ)
    sample: int = 1000
    """Number of user vectors with which recall and speed are measured, all of them if there are fewer; 0: none."""

    def __post_init__(self) -> None:
        at_least("--index.shards", self.shards, 0)
        at_least("--index.sample", self.sample, 0)


@dataclass(kw_only=True)
class BuildIndex:
    """Build a FAISS index of an export's item vectors and keep it in the export, in place of one that is there; the
    vectors stay as they are.

    Example: python -m recgpt_torchrec.index --export vectors/mine --index.kind hnsw
    """

    export: str
    """Folder of the export."""
    index: Index = field(default_factory=lambda: Index(kind="auto"))

    def __post_init__(self) -> None:
        if self.index.kind == "none":
            raise ValueError("--index.kind is none; name a kind, or auto")
