"""Writing an export and reading it back; what is refused, and that nothing half-written stays."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.retrieval.exports import share
from recgpt_torchrec.retrieval.exports.keys import Keys
from recgpt_torchrec.retrieval.exports.reading import open_export
from recgpt_torchrec.retrieval.exports.vectors import vectors_of as stored_vectors
from recgpt_torchrec.retrieval.exports.writing import write_export
from tests.support import change_json, promise_of, walks, write_dataset
from tools.ranks import run_ranks

ITEMS, USERS, DIM = 30, 50, 4


@pytest.fixture
def dataset(tmp_path) -> Dataset:
    return write_dataset(tmp_path / "data", walks(users=USERS, items=ITEMS), items=ITEMS, vocabulary="v")


def vectors_of(ids: np.ndarray, *shape: int) -> np.ndarray:
    """Vectors that tell whose they are."""
    width = int(np.prod(shape))
    return (ids[:, None] + np.arange(width) / 100).astype(np.float32).reshape(len(ids), *shape)


def batches(count: int, size: int, *shape: int, rank: int = 0, world_size: int = 1, seed: int = 0):
    """Ids 0 to `count` in random order, in batches, dealt to processes."""
    ids = np.random.default_rng(seed).permutation(count)[rank::world_size]
    for first in range(0, len(ids), size):
        some = ids[first : first + size]
        yield some, vectors_of(some, *shape)
    yield np.zeros(0, np.int64), np.zeros((0, *shape), np.float32)


def write(path: Path, dataset: Dataset, **changes):
    given = {"items": batches(ITEMS, 7, DIM), "users": batches(USERS, 9, DIM), "dim": DIM, "interests": 1}
    given |= {"everyone": True, "checkpoint": "", "checkpoint_fingerprint": "", "settings": {}}
    return write_export(str(path), dataset, **given | changes)


def test_what_is_written_comes_back_with_its_keys(dataset, tmp_path):
    write(tmp_path / "export", dataset, checkpoint="runs/x", checkpoint_fingerprint="abc", settings={"seed": 1})
    export = open_export(str(tmp_path / "export"))
    m = export.manifest
    m.check_parts(export.path, checksums=True)
    assert (m.items, m.users, m.dim, m.interests, m.vocabulary) == (ITEMS, USERS, DIM, 1, "v")
    assert (m.dataset, m.checkpoint, m.checkpoint_fingerprint, m.settings) == (
        dataset.path,
        "runs/x",
        "abc",
        {"seed": 1},
    )
    ids, vectors = export.item_vectors()
    np.testing.assert_array_equal(vectors, vectors_of(ids, DIM))
    users = pa.Table.from_batches(export.users(rows=8))
    assert sorted(users["user_id"].to_pylist()) == list(range(USERS))
    assert users["key"].to_pylist() == [f"user {u}" for u in users["user_id"].to_pylist()]
    keys = {row["item_id"]: row["key"] for batch in export.items() for row in batch.to_pylist()}
    assert keys == {i: f"item {i}" for i in range(ITEMS)}


def test_plain_parquet_readers_see_fixed_size_float32_lists(dataset, tmp_path):
    manifest = write(tmp_path / "export", dataset)
    table = pq.read_table(tmp_path / "export" / manifest.user_parts[0].path)
    assert table.schema.names == ["user_id", "key", "vector"]
    assert table.schema.types == [pa.int64(), pa.string(), pa.list_(pa.float32(), DIM)]


def test_several_interests_are_one_row_a_user(dataset, tmp_path):
    write(tmp_path / "export", dataset, users=batches(USERS, 9, 3, DIM), interests=3)
    export = open_export(str(tmp_path / "export"))
    rows = 0
    for batch in export.users():
        ids = batch["user_id"].to_numpy()
        np.testing.assert_array_equal(stored_vectors(batch), vectors_of(ids, 3, DIM))
        rows += len(ids)
    assert rows == USERS


def test_rows_are_cut_into_row_groups_and_parts(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(share, "GROUP_BYTES", 4 * DIM * 5)
    monkeypatch.setattr(share, "GROUPS_PER_PART", 2)
    manifest = write(tmp_path / "export", dataset)
    assert [part.rows for part in manifest.item_parts] == [10, 10, 10]
    ids, vectors = open_export(str(tmp_path / "export")).item_vectors()
    np.testing.assert_array_equal(vectors, vectors_of(ids, DIM))


def test_keys_are_found_for_any_ids_in_any_order(dataset):
    ids = np.array([7, 0, 29, 7])
    assert Keys(dataset, "items").of(ids).to_pylist() == ["item 7", "item 0", "item 29", "item 7"]
    with pytest.raises(InputError, match="has 30 items"):
        Keys(dataset, "items").of(np.array([30]))


def test_keys_come_from_several_row_groups(dataset, tmp_path):
    table = pq.read_table(tmp_path / "data" / dataset.manifest.user_parts[0].path)
    path = tmp_path / "data" / dataset.manifest.user_parts[0].path
    pq.write_table(table, path, row_group_size=6)
    vars(dataset.manifest.user_parts[0]).update(promise_of(path))
    orders = [np.random.default_rng(0).permutation(USERS), np.arange(USERS), np.arange(5, 18), np.arange(6, 12)]
    for ids in [*orders, np.arange(7, 8), np.array([7, 9, 8]), np.arange(5)[::-1]]:
        assert Keys(dataset, "users").of(ids).to_pylist() == [f"user {u}" for u in ids]


def one_rank(rank: int, world_size: int, data: str, output: str, bad: bool) -> str:
    mine = {"rank": rank, "world_size": world_size}
    users = list(batches(USERS, 9, DIM, **mine))
    if bad and rank == 1:
        users[0][1][0, 0] = np.nan
    try:
        return write(Path(output), Dataset.open(data), items=batches(ITEMS, 7, DIM, **mine), users=users).to_json()
    except InputError as error:
        return str(error)


def test_two_processes_write_one_export(dataset, tmp_path):
    manifests = run_ranks(one_rank, 2, dataset.path, str(tmp_path / "export"), False)
    assert manifests[0] == manifests[1]
    export = open_export(str(tmp_path / "export"))
    assert [part.path for part in export.manifest.user_parts] == [f"users/part-{r:04d}-00000.parquet" for r in (0, 1)]
    ids, vectors = export.item_vectors()
    np.testing.assert_array_equal(vectors, vectors_of(ids, DIM))
    assert sorted(u for b in export.users() for u in b["user_id"].to_pylist()) == list(range(USERS))
    shares = [[u for b in export.users(rank=r, world_size=2) for u in b["user_id"].to_pylist()] for r in (0, 1)]
    assert sorted(shares[0] + shares[1]) == list(range(USERS)) and all(shares)


def test_a_bad_vector_in_one_process_ends_all_of_them_with_the_same_message(dataset, tmp_path):
    messages = run_ranks(one_rank, 2, dataset.path, str(tmp_path / "export"), True)
    assert messages[0] == messages[1]
    assert "is not finite" in messages[0]
    assert os.listdir(tmp_path) == ["data"]


def test_a_folder_that_is_not_free_ends_all_processes_with_the_same_message(dataset, tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "thesis.tex").write_text("mine")
    messages = run_ranks(one_rank, 2, dataset.path, str(tmp_path / "export"), False)
    assert messages[0] == messages[1] and "is not a finished export (thesis.tex)" in messages[0]


def broken():
    yield np.arange(3), vectors_of(np.arange(3), DIM)
    raise RuntimeError("the model failed")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"users": broken()}, RuntimeError, "the model failed"),
        (
            {"users": [(np.arange(USERS), np.full((USERS, DIM), np.inf, np.float32))]},
            InputError,
            "user 0 is not finite",
        ),
        ({"users": batches(USERS - 1, 9, DIM)}, ValueError, "49 vectors of users"),
        ({"items": [(np.zeros(ITEMS, np.int64), np.zeros((ITEMS, DIM), np.float32))]}, ValueError, "must come once"),
        ({"items": batches(ITEMS, 7, DIM + 1)}, ValueError, r"must be \[7, 4\] float32, not \[7, 5\]"),
    ],
)
def test_nothing_is_left_behind_after_an_error(dataset, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        write(tmp_path / "export", dataset, **changes)
    assert os.listdir(tmp_path) == ["data"]


def test_a_folder_that_holds_something_else_is_refused_and_not_touched(dataset, tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        write(tmp_path / "export", dataset)
    assert (tmp_path / "export" / "thesis.tex").read_text() == "mine"


def test_opening_names_what_is_wrong(dataset, tmp_path):
    with pytest.raises(InputError, match=r"no manifest\.json"):
        open_export(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="something other than an export"):
        open_export(dataset.path)
    manifest = write(tmp_path / "export", dataset)
    part = tmp_path / "export" / manifest.item_parts[0].path
    whole = part.read_bytes()
    part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match=rf"{manifest.item_parts[0].path} is damaged: its checksum"):
        manifest.check_parts(str(tmp_path / "export"), checksums=True)
    part.write_bytes(whole[:-1])
    with pytest.raises(InputError, match=rf"{manifest.item_parts[0].path} is damaged: it has"):
        open_export(str(tmp_path / "export"))
    part.unlink()
    with pytest.raises(InputError, match=rf"{manifest.item_parts[0].path} is missing"):
        open_export(str(tmp_path / "export"))
    text = (tmp_path / "export" / "manifest.json").read_text()
    (tmp_path / "export" / "manifest.json").write_text(text.replace('"export_version": 1', '"export_version": 9'))
    with pytest.raises(InputError, match="export format version 9, this program reads version 1"):
        open_export(str(tmp_path / "export"))


# ------------------------------------------------------------------------------- what an export says is not believed


def rewrite_items(folder: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Change the items of an export, and let its manifest promise the file as it is then."""

    def correct(manifest: dict[str, Any]) -> None:
        (part,) = manifest["item_parts"]
        pq.write_table(change(pq.read_table(folder / part["path"])), folder / part["path"])
        part.update(promise_of(folder / part["path"]))

    change_json(folder / "manifest.json", correct)


def with_column(name: str, values: Any) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.schema.get_field_index(name), name, values)


def vectors_column(width: int, value: float = 0.5) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.full(ITEMS * width, value, np.float32)), width)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop_columns("vector"), r"has a column vector of type \[\], it must be fixed_size_list"),
        (lambda table: table.append_column("item_id", table["item_id"]), r"item_id of type \['int64', 'int64'\]"),
        (with_column("vector", vectors_column(DIM + 1)), r"has a column vector of type \['fixed_size_list<.*>\[5\]'\]"),
        (with_column("item_id", pa.array(["x"] * ITEMS)), r"has a column item_id of type \['string'\]"),
        (with_column("item_id", pa.array(range(1, ITEMS + 1))), "has a item_id outside 0 to 29"),
        (with_column("item_id", pa.array([-1, *range(1, ITEMS)])), "has a item_id outside 0 to 29"),
        (with_column("item_id", pa.array([1, *range(1, ITEMS)])), "item 0 is missing, and another one is there twice"),
        (with_column("item_id", pa.array([None, *range(1, ITEMS)])), "has a null in item_id"),
        (with_column("vector", vectors_column(DIM, np.nan)), "has a vector that is not finite"),
        (lambda table: table.slice(1), "has 29 rows, the manifest promises 30"),
    ],
)
def test_items_that_are_not_as_promised_are_refused(dataset, tmp_path, change, message):
    write(tmp_path / "export", dataset)
    rewrite_items(tmp_path / "export", change)
    with pytest.raises(InputError, match=f"export: the part items/.*{message}.*; restore the file or run export again"):
        open_export(str(tmp_path / "export")).item_vectors()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dim": 2**40}, "it promises 1 vectors of 1,099,511,627,776 numbers per user"),
        ({"dim": 2**16}, "it promises 30 vectors of 65,536 numbers in too few bytes"),
        ({"interests": 0}, "it promises 0 vectors of 4 numbers per user"),
        ({"interests": 33}, "it promises 33 vectors of 4 numbers per user"),
        ({"items": 31}, "it promises 31 items, but 30 rows in items/"),
        ({"users": 2**40}, "it promises 1,099,511,627,776 users, but 50 rows in users/"),
        (
            {"settings": {"history": "tomorrow"}},
            "settings.history is 'tomorrow', it must be one of all, validation, test",
        ),
    ],
)
def test_a_manifest_that_promises_too_much_is_refused(dataset, tmp_path, values, message):
    write(tmp_path / "export", dataset)
    change_json(tmp_path / "export/manifest.json", lambda manifest: manifest.update(values))
    with pytest.raises(InputError, match=f"manifest.json is damaged: {message}; restore it or run export again"):
        open_export(str(tmp_path / "export"))


def test_keys_that_are_null_or_of_other_rows_are_refused(dataset, tmp_path):
    part = dataset.manifest.item_parts[0]
    path = tmp_path / "data" / part.path
    table = pq.read_table(path)
    for change, message in (
        (with_column("key", pa.array([None, *["x"] * (ITEMS - 1)])), "row group 0: a key is null"),
        (with_column("item_id", pa.array(range(ITEMS))[::-1]), "ids are not the dense ids from 0 to 29 in order"),
        (lambda table: table.drop_columns("key"), "cannot be read"),
        (lambda table: table.slice(1), "has 29 rows, the manifest promises 30"),
    ):
        pq.write_table(change(table), path)
        vars(part).update(promise_of(path))
        with pytest.raises(InputError, match=message):
            Keys(dataset, "items").of(np.array([1]))
