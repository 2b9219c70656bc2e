"""An export and the deltas after it: checks that they fit, and reads the state that they lead to."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.ragged import Float32, Int64
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.retrieval.exports.lookup import Cache, Lookup
from recgpt_torchrec.retrieval.exports.reading import ROWS, Delta, Export, open_delta, open_export
from recgpt_torchrec.storage.parts import Part

SHOWN = 12
"""Number of digits of a fingerprint in messages."""


class Chain:
    """An export and the deltas after it, in order.

    Example: `vectors, is_there = open_chain(["exports/monday", "exports/tuesday"]).vectors_of("items", ids)`
    """

    def __init__(self, export: Export, deltas: list[Delta]) -> None:
        """
        Raises:
            InputError: a delta does not fit the state before it.
        """
        self.export, self.deltas = export, deltas
        self._lookups: dict[tuple[int, str, bool, bool], Lookup] = {}
        self._cache = Cache()
        before: Export | Delta = export
        for delta in deltas:
            if delta.manifest.base != before.state:
                fitting = next((each.path for each in deltas if each.manifest.base == before.state), None)
                raise InputError(
                    f"{delta.path} changes the state {delta.manifest.base[:SHOWN]}, but {before.path} leads to "
                    f"{before.state[:SHOWN]}. "
                    + (
                        f"Give {fitting} after it: it changes that state"
                        if fitting
                        else f"No given delta changes that state; {delta.path} was made with --since "
                        + " ".join(delta.manifest.since)
                    )
                )
            _check_alike(before, delta)
            before = delta

    @property
    def folders(self) -> list[Export | Delta]:
        """The export, and the deltas in order."""
        return [self.export, *self.deltas]

    @property
    def paths(self) -> list[str]:
        """The paths of `folders`."""
        return [folder.path for folder in self.folders]

    @property
    def last(self) -> Export | Delta:
        """The newest folder; its manifest counts the items and users of the state."""
        return self.folders[-1]

    @property
    def state(self) -> str:
        """The state that the chain leads to."""
        return self.last.state

    def check_fits(self, dataset: Dataset, **form: Any) -> None:
        """Check that new vectors can be compared with those of the chain.

        Args:
            dataset: of the new vectors.
            form: values that must be the same: `dtype`, `interests`, `dim`, `metric`, `history`, ...

        Raises:
            InputError: ids mean other items, or the vectors are of another form.
        """
        manifest = self.last.manifest
        if dataset.manifest.extends(manifest.vocabulary) is None:
            raise InputError(
                f"{self.last.path} was made from another dataset than {dataset.path}: its ids mean other items "
                f"(vocabulary {manifest.vocabulary[:SHOWN]}, not extended by {dataset.manifest.vocabulary[:SHOWN]}). "
                f"Prepare the dataset with --vocabulary {manifest.dataset}, or export without --since"
            )
        if changed := dataset.manifest.reassigned_since(manifest.vocabulary):
            kinds = " and ".join(f"{entity}s" for entity in changed)
            raise InputError(
                f"in {dataset.path} some ids of {kinds} belong to other keys than in {self.last.path}, which a delta "
                "cannot say; export without --since"
            )
        earlier = _form_of(manifest)
        for name, value in form.items():
            if earlier[name] != value:
                raise InputError(
                    f"{self.last.path} has {name} {earlier[name]}, but the delta would have {value}. A delta has what "
                    "its export has: give the same options, or export without --since"
                )

    def vectors_of(self, kind: str, ids: Int64) -> tuple[Float32, npt.NDArray[np.bool_]]:
        """The vectors that the state holds for some ids.

        Args:
            kind: `items` or `users`.
            ids: [n] int64, in any order.

        Returns:
            vectors: [n, dim] or [n, interests, dim] float32; 0 where there is none.
            is_there: [n] bool.

        Raises:
            InputError: a part is damaged.
        """
        manifest = self.last.manifest
        shape = (manifest.interests, manifest.dim) if kind == "users" and manifest.interests > 1 else (manifest.dim,)
        vectors, is_there = np.zeros((ids.size, *shape), np.float32), np.zeros(ids.size, bool)
        left = np.arange(ids.size)  # places whose newest folder is not found yet
        for number in range(len(self.deltas), -1, -1):
            is_found = np.zeros(left.size, bool)
            for places, values in self._lookup(number, kind).find(ids[left]):
                vectors[left[places]], is_there[left[places]], is_found[places] = values, True, True
            if number:
                is_found |= self._lookup(number, kind, removed=True).contains(ids[left])
            left = left[~is_found]
            if not left.size:
                break
        return vectors, is_there

    def rows(
        self, kind: str, columns: list[str], rows: int = ROWS, rank: int = 0, world_size: int = 1
    ) -> Iterator[pa.RecordBatch]:
        """Yield the rows of the state, in no particular order; a rank reads every `world_size`-th row group.

        A row of a folder belongs to the state unless a later folder has its id.

        Args:
            kind: `items` or `users`.
            columns: the first is the id.
            rows: maximum number of rows per batch.
        """
        for number, folder in enumerate(self.folders):
            later = [
                self._lookup(each, kind, removed, vectors=False)
                for each in range(number + 1, len(self.folders))
                for removed in (False, True)
            ]
            parts = _parts_of(folder, kind)
            for batch in folder.batches(parts, columns, rows, rank=rank, world_size=world_size):
                ids = batch[columns[0]].to_numpy()
                stays = np.ones(ids.size, bool)
                for lookup in later:
                    stays &= ~lookup.contains(ids)
                if stays.any():
                    yield batch if stays.all() else batch.filter(pa.array(stays))

    def _lookup(self, number: int, kind: str, removed: bool = False, vectors: bool = True) -> Lookup:
        key = (number, kind, removed, vectors)
        if key not in self._lookups:
            folder = self.folders[number]
            parts = _parts_of(folder, kind, removed)
            self._lookups[key] = Lookup(folder, parts, kind, self._cache, vectors and not removed)
        return self._lookups[key]


def open_chain(paths: list[str]) -> Chain:
    """Open an export and the deltas after it, in order.

    Raises:
        InputError: one of them cannot be used, or a delta does not fit the state before it.
    """
    return Chain(open_export(paths[0]), [open_delta(path) for path in paths[1:]])


def _parts_of(folder: Export | Delta, kind: str, removed: bool = False) -> list[Part]:
    parts: list[Part] = getattr(folder.manifest, f"removed_{kind[:-1]}_parts" if removed else f"{kind[:-1]}_parts")
    return parts


def _form_of(manifest: Any) -> dict[str, Any]:
    """What is the same in an export and all deltas after it."""
    hold_out = manifest.settings.get("hold_out", "last")
    form = {name: getattr(manifest, name) for name in ("dtype", "interests", "dim", "metric")}
    asked = {"history": manifest.settings.get("history", "all"), "event": manifest.settings.get("event")}
    return {**form, **asked, "hold_out": hold_out}


def _check_alike(before: Export | Delta, delta: Delta) -> None:
    """
    Raises:
        InputError: the delta has other vectors than the folder before it.
    """
    earlier, later = _form_of(before.manifest), _form_of(delta.manifest)
    for name, value in later.items():
        if earlier[name] != value:
            raise InputError(
                f"{delta.path} has {name} {value}, but {before.path} has {earlier[name]}: it is not a delta of it; "
                "restore its manifest.json or export again"
            )
