"""Exports and deltas in real vector stores: what is refused, interrupted and kept; skipped like test_stores.py."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from recgpt_torchrec.errors import InputError
from tests.tools.store_helpers import (
    DIM,
    Where,
    chain,
    check_lists,
    decoded,
    fail_at,
    random_vectors,
    write_delta_folder,
    write_export_folder,
)
from tools.stores import comparing, loading
from tools.stores.store import Items, Store, open_store

pytestmark = pytest.mark.filterwarnings("ignore")  # of the stores' clients


def test_a_delta_is_refused_where_it_does_not_fit(where, export, tmp_path):
    (first, second), _ = chain(tmp_path, export)
    other = write_delta_folder(tmp_path / "other", "0" * 32, {0: np.ones(DIM, np.float32)}, [], 600)
    with open_store(*where) as store:
        with pytest.raises(InputError, match="holds no export"):
            loading.apply(store, first)
        loading.load(store, export)
        for delta in (second, other):
            with pytest.raises(InputError, match=f"is for the state {delta.manifest.base[:12]}, but .* holds .*export"):
                loading.apply(store, delta)
        loading.apply(store, first)
        with pytest.raises(InputError, match="applied already"):
            loading.apply(store, first)
        loading.apply(store, second)
        with pytest.raises(InputError, match="is for the state"):
            loading.apply(store, first)


@contextmanager
def small_batches(where: Where) -> Iterator[Store]:
    with open_store(*where) as store:
        store.batch_bytes = 4 * DIM * 25
        yield store


@pytest.mark.parametrize("method, call", [("insert", 2), ("build_index", 1), ("write_record", 2)])
def test_an_interrupted_load_is_not_taken_for_whole(where, export, tmp_path, monkeypatch, method, call):
    (first, _), _ = chain(tmp_path, export)
    with small_batches(where) as store:
        fail_at(store, monkeypatch, method, call)
        with pytest.raises(KeyboardInterrupt):
            loading.load(store, export)
    with small_batches(where) as store:
        with pytest.raises(InputError, match="holds a part of .*export"):
            comparing.check_comparable(store, export)
        with pytest.raises(InputError, match="was interrupted; run that load again"):
            loading.apply(store, first)
        assert loading.load(store, export)
        check_lists(store, decoded(export), np.stack(list(random_vectors(5, DIM, seed=2).values())))


@pytest.mark.parametrize("method, call", [("upsert", 2), ("delete", 1), ("write_record", 2)])
def test_an_interrupted_delta_can_be_applied_again_but_no_other(where, export, tmp_path, monkeypatch, method, call):
    (first, second), items = chain(tmp_path, export)
    other = write_delta_folder(tmp_path / "other", export.state, {0: np.ones(DIM, np.float32)}, [], 600)
    with small_batches(where) as store:
        loading.load(store, export)
        fail_at(store, monkeypatch, method, call)
        with pytest.raises(KeyboardInterrupt):
            loading.apply(store, first)
    with small_batches(where) as store:
        with pytest.raises(InputError, match="was applied to .* in part"):
            loading.apply(store, other)
        with pytest.raises(InputError, match="and a part of .*first"):
            comparing.check_comparable(store, export)
        loading.apply(store, first)
        loading.apply(store, second)
        check_lists(store, items, np.stack(list(random_vectors(5, DIM, seed=2).values())))


def test_a_file_of_duckdb_is_there_whole_or_not_at_all(export, tmp_path, monkeypatch):
    pytest.importorskip("duckdb_extension_vss", reason="make stores installs it")
    path = tmp_path / "new" / "items.duckdb"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("tools.stores.duckdb_store.os.replace", _interrupt)
        open_store("duckdb", str(path))
    assert not path.exists()
    with open_store("duckdb", str(path)) as store:
        loading.load(store, export)
        assert store.count() == 600


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_what_a_table_holds_is_not_dropped_unasked(where, export, tmp_path):
    other = write_export_folder(tmp_path / "other", random_vectors(50, DIM + 1, seed=9), random_vectors(2, DIM + 1))
    queries = np.stack(list(random_vectors(3, DIM + 1, seed=2).values()))
    with open_store(*where) as store:
        store.create(3)  # a table of somebody else's
        with pytest.raises(InputError, match="was not loaded from an export; give another --table"):
            loading.load(store, export)
        assert store.count() == 0 and store.read_record() is None
    with open_store(where[0], where[1], where[2] + "_too") as store:
        loading.load(store, export)
        with pytest.raises(InputError, match="holds .*export .*--replace to drop it"):
            loading.load(store, other)
        assert store.count() == 600
        assert loading.load(store, other, replaces=True)
        check_lists(store, decoded(other), queries)


def test_a_table_whose_name_differs_in_case_is_not_dropped(where, export):
    ones = Items(np.array([1]), ["1"], np.ones((1, DIM), np.float32))
    with open_store(*where) as store:
        store.create(DIM)  # somebody else's, and the store may take both names for one
        store.insert(ones)
    with open_store(where[0], where[1], where[2].upper()) as store:
        if where[0] == "pgvector":
            assert loading.load(store, export)
        else:
            with pytest.raises(InputError, match="that was not loaded from an export"):
                loading.load(store, export)
    with open_store(*where) as store:
        assert store.count() == 1


def test_a_table_of_another_schema_of_duckdb_is_no_hindrance(export, tmp_path):
    pytest.importorskip("duckdb_extension_vss", reason="make stores installs it")
    with open_store("duckdb", str(tmp_path / "items.duckdb")) as store:
        native: Any = store
        native.connection.execute("CREATE SCHEMA other; CREATE TABLE other.items AS SELECT 1 AS own")
        assert loading.load(store, export)
        assert native.connection.execute("SELECT own FROM other.items").fetchall() == [(1,)]


def test_a_table_that_something_else_changed_is_found(where, export, tmp_path):
    (first, _), _ = chain(tmp_path, export)
    with open_store(*where) as store:
        loading.load(store, export)
        store.upsert(Items(np.array([5000]), ["5000"], np.ones((1, DIM), np.float32)))
        with pytest.raises(InputError, match="has 599 items .* but should have 598"):
            loading.apply(store, first)


def test_a_store_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    monkeypatch.delitem(sys.modules, "tools.stores.milvus_store", raising=False)
    with pytest.raises(InputError, match="needs the package pymilvus, which is not installed; run make stores"):
        open_store("milvus", "nowhere.db")
