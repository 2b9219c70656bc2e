"""The folder of neighbours that `find_neighbours` writes.

manifest.json          format version, settings, what they were found in, and the parts
neighbours/*.parquet   one row per item: item_id int64 (dense, from 0), neighbour_ids list<int64>, best first, and
                       their scores list<float32>, see `data.neighbours.pairs`
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any, Self

from recgpt_torchrec.data.dataset import Dataset, Manifest
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.storage.manifests import FolderManifest, Kind
from recgpt_torchrec.storage.parts import Part
from recgpt_torchrec.storage.typed import check_counts
from recgpt_torchrec.texts.commands import command

FOLDER = "neighbours"
MOST = 100
"""Maximum number of neighbours per item."""


@dataclass(kw_only=True)
class NeighboursManifest(FolderManifest):
    """The contents of a neighbours folder's `manifest.json`."""

    KIND = Kind(
        name="neighbours folder",
        stage="find_neighbours",
        version_field="neighbours_version",
        version=1,
        parts=("parts",),
        use="pretrain, generate_prompts, prompt_tune, evaluate and retrieve read it with --neighbours.path",
    )
    neighbours_version: int = KIND.version
    dataset: str = ""
    """Where the dataset was."""
    histories: str = ""
    """Fingerprint of its histories, see `data.dataset.histories_fingerprint`."""
    vocabulary: str = ""
    """Fingerprint of its vocabulary."""
    hold_out: str = ""
    """What it holds out: the neighbours are of its training part."""
    interactions: int = 0
    """Its number of interactions."""
    day: int = 0
    """Number of the newest day of a folder of days; 0: it was none."""
    split: dict[str, Any] = field(default_factory=dict)
    """What its manifest records of the parts, see `data.reading.records.SplitRecord`."""
    items: int = 0
    """Its number of items."""
    pairs: int = 0
    """Number of pairs of different items that were found."""
    count: int = 0
    """Maximum number of neighbours per item."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The options of the stage."""
    parts: list[Part] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        """32 hex digits that identify the neighbours, wherever they are stored."""
        return hashlib.sha256(repr([part.checksum for part in self.parts]).encode()).hexdigest()[:32]

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Self:
        """Make a manifest of the values of `manifest.json`, and check what it promises.

        Raises:
            ValueError: a field is missing, unknown or invalid.
        """
        manifest = super().from_values(values)
        check_counts({name: getattr(manifest, name) for name in ("interactions", "items", "pairs", "count")})
        if not 1 <= manifest.count <= MOST:
            raise ValueError(f"count is {manifest.count:,}, it must be from 1 to {MOST}")
        if (rows := sum(part.rows for part in manifest.parts)) != manifest.items:
            raise ValueError(f"it promises {manifest.items:,} items, but {rows:,} rows in {FOLDER}/")
        return manifest


def open_neighbours(path: str, dataset: Dataset) -> NeighboursManifest:
    """Open and check a folder of neighbours for training on a dataset, or for lists of its users.

    Raises:
        InputError: it is none, or damaged; or its ids are not the dataset's; or it was found in another training part,
            so that it may tell what is held out.
    """
    manifest, own = NeighboursManifest.read(path), dataset.manifest
    manifest.check_parts(path)
    again = f"find them again: {command('find_neighbours', {'data': dataset.path, 'output': 'NEIGHBOURS_FOLDER'})}"
    if (known := own.extends(manifest.vocabulary)) is None or "item" in own.reassigned_since(manifest.vocabulary):
        what = "other items" if known is None else "items of which some have lost their ids since"
        raise InputError(f"--neighbours.path {path}: they are of {what} than those of {dataset.path}; {again}")
    if manifest.items != known.items:
        raise InputError(
            f"--neighbours.path {path}: they are of {manifest.items:,} items, and the vocabulary that they name has "
            f"{known.items:,}; {again}"
        )
    if differing := _find_leak(manifest, own):
        raise InputError(
            f"--neighbours.path {path}: they were found {differing}; they would tell what is held out. "
            f"{again[0].upper()}{again[1:]}"
        )
    return manifest


def _find_leak(manifest: NeighboursManifest, own: Manifest) -> str | None:
    """How the training part that neighbours were found in differs from a dataset's, so that it may hold what this one
    holds out; None: it does not.

    Of an earlier dataset, whose vocabulary this one extends, there are fewer interactions: only what is held out is
    compared, and of a folder of days, which may hold the same items, also the day.
    """
    earlier = manifest.vocabulary != own.vocabulary
    if manifest.hold_out != own.hold_out and not (earlier and own.hold_out == "none"):
        return f"with --hold_out {manifest.hold_out}, and the dataset has --hold_out {own.hold_out}"
    own_split = own.preparation.get("split", {})
    if own.hold_out == "time" and (earlier or manifest.day):
        theirs, ours = manifest.split.get("validation_from"), own_split.get("validation_from")
        if theirs is None or ours is None or theirs > ours:
            return f"in what came before {theirs}, and the dataset holds out what came from {ours} on"
    if earlier and own.hold_out in ("given", "targets"):
        return f"in another dataset with --hold_out {own.hold_out}, whose parts may be other ones"
    if manifest.day and own.day is not None:
        later = manifest.day > own.day.number and own.hold_out != "none"
        return f"up to day {manifest.day}, and the dataset ends with day {own.day.number}" if later else None
    if earlier:
        return None
    if manifest.interactions != own.interactions:
        return f"in {manifest.interactions:,} interactions, and the dataset has {own.interactions:,}"
    return None if manifest.split == own_split else "in another part of the same interactions"
