"""The export folder: vectors of items and users in Parquet, for an ANN index or a serving system.

    manifest.json      counts, dimensions, fingerprints, and per file: rows, bytes, checksum
    items/*.parquet    item_id int64, key string, vector fixed_size_list<float>[dim]
    users/*.parquet    user_id int64, key string, vector fixed_size_list<float>[dim]; with several interests
                       vectors fixed_size_list<fixed_size_list<float>[dim]>[interests] instead
    index/*/*.faiss    FAISS index of the item vectors, if there is one, see `index_manifest`
    encoder/*/*        the model as a program, if it is there, see `encoder_manifest`

A score is the inner product of a user vector and an item vector; for an item of the user's history that competes, plus
the manifest's `repeat_bias`. Every item appears once, and every user with an encoded history; rows are in no particular
order (each process writes its share). Of several interests the first is that of one-step recall; each further one is
the output after the best new item of the one before joins the history:

    vectors = pq.read_table("users")["vectors"].combine_chunks()
    vectors.flatten().flatten().to_numpy().reshape(len(vectors), interests, dim)

With `--dtype float16` and `int8` the lists hold such numbers, see `vectors`.

A delta folder holds what changes from one export to the next, see `DeltaManifest`:

    manifest.json              as above, and the state that it is applied to
    items/, users/             rows that are new or have moved, as in an export
    removed_items/*.parquet    item_id int64, key string
    removed_users/*.parquet    user_id int64, key string

The manifest is written last: a folder without one is not an export. `writing` writes it, `reading` reads it; neither
knows models: vectors are numpy arrays, batch by batch.
"""

from dataclasses import dataclass, field
from typing import Any, Self

from recgpt_torchrec.checkpoints.repeat_bias import check_bias
from recgpt_torchrec.config.retrieval import INTERESTS
from recgpt_torchrec.data.split import EVALUATION
from recgpt_torchrec.retrieval.exports.encoder_manifest import EncoderManifest
from recgpt_torchrec.retrieval.exports.index_manifest import IndexManifest
from recgpt_torchrec.storage.manifests import FolderManifest, Kind
from recgpt_torchrec.storage.parts import VALUES_PER_BYTE, Part
from recgpt_torchrec.storage.typed import SHOWN, check_counts, check_finite

MAX_DIM = 2**16
"""Maximum length of a vector."""
DTYPES = ("float32", "float16", "int8")
"""Values of `--dtype`."""
METRICS = ("inner_product",)
"""How a user's score for an item can be made of their vectors."""
HISTORIES = ("all", *EVALUATION)
"""Values of `--history`."""
LATER = "later"
"""Key in the metadata of fields that version 1 did not have at first: at their default, the fingerprint of an export is
that of an export without them."""


@dataclass(kw_only=True)
class ExportManifest(FolderManifest):
    """Contents of `manifest.json`."""

    KIND = Kind(
        name="export",
        stage="export",
        version_field="export_version",
        version=1,
        parts=("item_parts", "user_parts"),
        use="name a delta, which export --since writes",
    )
    export_version: int = KIND.version
    items: int = 0
    users: int = 0
    dim: int = 0
    interests: int = 1
    """Number of vectors per user."""
    dtype: str = field(default="float32", metadata={LATER: True})
    """Type of the stored numbers, one of `DTYPES`, see `vectors`."""
    metric: str = field(default="inner_product", metadata={LATER: True})
    """How a user's score for an item is made of their vectors."""
    repeat_bias: float = field(default=0.0, metadata={LATER: True})
    """Of the model, see `checkpoints.repeat_bias`: what a score has beside the inner product where an item of the
    user's history competes."""
    state: str = field(default="", metadata={LATER: True})
    """Where deltas were applied: the fingerprint of the last one, see `DeltaManifest`; empty: this export's own."""
    dataset: str = ""
    """Folder of the dataset."""
    vocabulary: str = ""
    """Fingerprint of the dataset's ids; exports are comparable when these are equal."""
    dataset_fingerprint: str = ""
    """Fingerprint of the dataset's histories, which may grow while its ids stay."""
    checkpoint: str = ""
    """Folder of the checkpoint."""
    checkpoint_fingerprint: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    """The options of the stage that wrote the export."""
    item_parts: list[Part] = field(default_factory=list)
    user_parts: list[Part] = field(default_factory=list)
    index: IndexManifest | None = None
    """The FAISS index that it holds; no part of the fingerprint."""
    encoder: EncoderManifest | None = None
    """The program of the model that it holds; no part of the fingerprint."""

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Self:
        """Make a manifest of the values of `manifest.json`, and check what it promises.

        Raises:
            ValueError: a field is missing, unknown or invalid.
        """
        manifest = super().from_values(values)
        if manifest.index is not None:
            manifest.index.check(manifest.items)
        if manifest.encoder is not None:
            manifest.encoder.check(manifest.dim, manifest.items)
        check_counts({name: getattr(manifest, name) for name in ("items", "users", "dim", "interests")})
        for name, parts in (("items", manifest.item_parts), ("users", manifest.user_parts)):
            count, rows = getattr(manifest, name), sum(part.rows for part in parts)
            if not count or count != rows:
                raise ValueError(f"it promises {count:,} {name}, but {rows:,} rows in {name}/")
        _check_vectors(manifest)
        if manifest.items * manifest.dim > VALUES_PER_BYTE * sum(part.bytes for part in manifest.item_parts):
            raise ValueError(f"it promises {manifest.items:,} vectors of {manifest.dim:,} numbers in too few bytes")
        return manifest


@dataclass(kw_only=True)
class DeltaManifest(FolderManifest):
    """Contents of `manifest.json` of a delta: what is new, moved or gone since another export.

    A vector store holds a *state*: that of the export it was loaded from, or of the last delta applied to it. A delta
    fits the state `base` and leads to the state of its own fingerprint. So deltas form a chain, as commits do.
    """

    KIND = Kind(
        name="delta",
        stage="export",
        version_field="delta_version",
        version=1,
        parts=("item_parts", "user_parts", "removed_item_parts", "removed_user_parts"),
        use="name the export that is whole after it, which the stage apply writes from --export and --deltas",
    )
    delta_version: int = KIND.version
    base: str = ""
    """State to which it is applied: fingerprint of an export, or of the delta before."""
    since: list[str] = field(default_factory=list)
    """Folders that it was compared with: an export, and the deltas after it, in order."""
    tolerance: float = 0.0
    items: int = 0
    """Number of items after it is applied."""
    users: int = 0
    """Number of users after it is applied."""
    new_items: int = 0
    """Number of items in it that were not there before; the others have moved."""
    new_users: int = 0
    dim: int = 0
    interests: int = 1
    dtype: str = "float32"
    metric: str = "inner_product"
    repeat_bias: float = field(default=0.0, metadata={LATER: True})
    """Of the model that the moved vectors are of."""
    dataset: str = ""
    vocabulary: str = ""
    dataset_fingerprint: str = ""
    checkpoint: str = ""
    checkpoint_fingerprint: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    item_parts: list[Part] = field(default_factory=list)
    """Items that are new or have moved, as in an export."""
    user_parts: list[Part] = field(default_factory=list)
    removed_item_parts: list[Part] = field(default_factory=list)
    """item_id and key of the items that are gone: none, as a dataset's vocabulary only grows."""
    removed_user_parts: list[Part] = field(default_factory=list)

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Self:
        """Make a manifest of the values of `manifest.json`, and check what it promises.

        Raises:
            ValueError: a field is missing, unknown or invalid.
        """
        manifest = super().from_values(values)
        counts = ("items", "users", "new_items", "new_users", "dim", "interests")
        check_counts({name: getattr(manifest, name) for name in counts})
        check_finite({"tolerance": manifest.tolerance})
        _check_vectors(manifest)
        for name, parts in (("items", manifest.item_parts), ("users", manifest.user_parts)):
            count, new = getattr(manifest, name), getattr(manifest, f"new_{name}")
            if not new <= (rows := sum(part.rows for part in parts)) <= count:
                raise ValueError(f"it promises {new:,} new of {count:,} {name}, but {rows:,} rows in {name}/")
        if not (manifest.base and manifest.since):
            raise ValueError("it does not say which state it is applied to")
        return manifest


def _check_vectors(manifest: ExportManifest | DeltaManifest) -> None:
    """Check what a manifest says of its vectors.

    Raises:
        ValueError: names what is impossible.
    """
    check_bias(manifest.repeat_bias)
    if not (0 < manifest.dim <= MAX_DIM and 0 < manifest.interests <= INTERESTS):
        raise ValueError(f"it promises {manifest.interests:,} vectors of {manifest.dim:,} numbers per user")
    for name, value, allowed in (
        ("dtype", manifest.dtype, DTYPES),
        ("metric", manifest.metric, METRICS),
        ("settings.history", manifest.settings.get("history", "all"), HISTORIES),
    ):
        if value not in allowed:
            raise ValueError(f"{name} is {str(value)[:SHOWN]!r}, it must be one of {', '.join(allowed)}")
