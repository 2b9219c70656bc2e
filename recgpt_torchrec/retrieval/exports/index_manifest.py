"""What the manifest of an export says of its FAISS index: kind, options, files with their id ranges, measurements.

The files lie in the export's folder, in `index/`. The index is no part of the export's fingerprint: it can be added and
replaced while lists and deltas of the export stay valid.
"""

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from recgpt_torchrec.storage.parts import check_path
from recgpt_torchrec.storage.typed import SHOWN, check_counts, check_finite

if TYPE_CHECKING:
    from recgpt_torchrec.retrieval.exports.manifest import ExportManifest

FOLDER = "index"
"""Name of the folder below the export's."""
PARAMETERS: dict[str, tuple[str, ...]] = {
    "flat": (),
    "ivf": ("ivf.clusters", "ivf.probes"),
    "ivf_pq": ("ivf.clusters", "ivf.probes", "pq.m", "pq.bits", "pq.refine"),
    "hnsw": ("hnsw.neighbours", "hnsw.build", "hnsw.search"),
}
"""Options of each kind of index, by dotted name."""
KINDS = tuple(PARAMETERS)
MEASURED = ("recall@10", "recall@50", "queries", "queries_per_second", "threads", "ranks")
MAX_PARAMETER = 2**31 - 1
"""Largest number that FAISS takes."""
BLOCK_BYTES = 2**24
"""Bytes of a file per checksum."""


@dataclass(kw_only=True)
class IndexShard:
    """One file of an index; its row r is the item `first` + r."""

    path: str
    """Relative to the export's folder."""
    first: int
    stop: int
    """Its items have the ids `first` to `stop` - 1."""
    bytes: int
    checksums: list[str]
    """crc32 of each `BLOCK_BYTES` of the file, as eight hex digits."""


@dataclass(kw_only=True)
class IndexManifest:
    """A FAISS index of an export's item vectors."""

    kind: str
    """One of `KINDS`."""
    parameters: dict[str, int] = field(default_factory=dict)
    """Options by name, for example `ivf.clusters`; those of the search are the ones it was measured with."""
    vectors: str = ""
    """Fingerprint of the vectors that it was made of, see `vectors_fingerprint`."""
    faiss: str = ""
    """Version of FAISS that wrote it."""
    build_seconds: float = 0.0
    """Time to read the vectors, train, add and write, on the slowest rank."""
    measured: dict[str, float] = field(default_factory=dict)
    """`recall@10` and `recall@50` (share of the exact lists found) for `queries` user vectors, and
    `queries_per_second` at depth 50 with `ranks` processes of `threads` threads each; empty: it was not measured."""
    sample: int = 0
    """Number of user vectors that were asked to be measured; there may be fewer."""
    shards: list[IndexShard] = field(default_factory=list)
    """In order of their ids."""

    @property
    def paths(self) -> list[str]:
        """Of its files, relative to the export's folder."""
        return [shard.path for shard in self.shards]

    @property
    def bytes(self) -> int:
        """Total size of its files."""
        return sum(shard.bytes for shard in self.shards)

    def check(self, items: int) -> None:
        """Check what the manifest of an export of `items` items promises.

        Raises:
            ValueError: names what is impossible.
        """
        if self.kind not in KINDS:
            raise ValueError(f"index.kind is {self.kind[:SHOWN]!r}, it must be one of {', '.join(KINDS)}")
        for name, given, expected in (
            ("parameters", self.parameters, PARAMETERS[self.kind]),
            ("measured", self.measured, MEASURED if self.measured else ()),
        ):
            if given.keys() != {*expected}:
                raise ValueError(f"index.{name} has {', '.join(given)[:SHOWN]}, it must have {', '.join(expected)}")
        for name, value in self.parameters.items():
            if not 0 < value <= MAX_PARAMETER:
                raise ValueError(f"index.parameters.{name} is {value}, it must be from 1 to {MAX_PARAMETER}")
        check_finite({f"index.measured.{name}": value for name, value in self.measured.items()})
        check_finite({"index.build_seconds": self.build_seconds})
        stop = 0
        for shard in self.shards:
            check_path(shard.path)
            check_counts({f"bytes of {shard.path}": shard.bytes})
            if shard.first != stop or not shard.first < shard.stop:
                raise ValueError(f"{shard.path} has the items {shard.first} to {shard.stop - 1}, after {stop} others")
            if len(shard.checksums) != -(-shard.bytes // BLOCK_BYTES):
                raise ValueError(f"it lists {len(shard.checksums)} checksums of {shard.path}, a file of {shard.bytes}")
            stop = shard.stop
        if stop != items:
            raise ValueError(f"its index has {stop:,} items, but the export {items:,}")


def vectors_fingerprint(manifest: "ExportManifest") -> str:
    """Fingerprint of an export's item vectors, 32 hex digits, from the checksums of their files."""
    values: list[Any] = [manifest.items, manifest.dim, manifest.dtype, manifest.metric]
    values += [(part.rows, part.checksum) for part in manifest.item_parts]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]
