"""Which items may be in a list: `--allow`, `--deny`, `--items` with `--where`, against plain loops."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recgpt_torchrec.catalogue.catalogue import Catalogue
from recgpt_torchrec.config import Retrieve
from recgpt_torchrec.data.ragged import Ragged
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.engines.duckdb_engine import DuckDBEngine
from recgpt_torchrec.preparation.key_files import KeyFile
from recgpt_torchrec.retrieval.exports.reading import open_export
from recgpt_torchrec.retrieval.key_inputs import start_records
from recgpt_torchrec.retrieval.list_folder import open_lists
from recgpt_torchrec.retrieval.merging import merge_by_score, merge_rule
from recgpt_torchrec.retrieval.search.item_filter import find_allowed
from recgpt_torchrec.retrieval.search.restricted import RestrictedSearch, compact_ids
from recgpt_torchrec.retrieval.search.retriever import ExactSearch, Retriever
from recgpt_torchrec.retrieval.search.searching import build_retrievers
from tests.retrieval.filter_helpers import (
    ITEM_VECTORS,
    ITEMS,
    USER_VECTORS,
    USERS,
    WALKS,
    make_export,
    plain_list,
    retrieve,
)
from tests.support import change_json
from tools.ranks import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A dataset and its export."""
    path = tmp_path_factory.mktemp("filtered")
    make_export(path)
    return path


def keys_of(items: Any) -> str:
    return "".join(f"item {item}\n" for item in items)


def load(path: Path, **changes: Any) -> dict[str, int]:
    """The keys of a file and their states."""
    given = {"option": "--allow", "path": str(path), "column": "item_id", "output": str(path.parent / "out")}
    with DuckDBEngine(str(path.parent)) as engine:
        KeyFile(**given | changes).load(engine, "listed")
        return dict(engine.connection.execute("SELECT key, state FROM listed").fetchall())


# ------------------------------------------------------------------------------------------------ reading keys


def test_keys_are_read_from_every_format_as_prepare_spells_them(tmp_path):
    expected = {"12": 2, "a b": 2, "NA": 2}
    lines = "12\n\na b\n12\nNA\n"
    for name in ("list.txt", "list", "list.keys"):
        (tmp_path / name).write_text(lines)
        assert load(tmp_path / name) == expected, name
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbf" + lines.replace("\n", "\r\n").encode())
    assert load(tmp_path / "windows.txt") == expected
    (tmp_path / "list.txt.gz").write_bytes(gzip.compress(lines.encode()))
    assert load(tmp_path / "list.txt.gz") == expected
    (tmp_path / "odd.txt").write_text('a,b\nc\td\n"quoted"\n x \n')  # a line is a key, whatever is in it
    assert load(tmp_path / "odd.txt") == {"a,b": 2, "c\td": 2, '"quoted"': 2, " x ": 2}
    (tmp_path / "t.csv").write_text('other,item_id\n1,12\n2,"a b"\n3,NA\n')
    (tmp_path / "t.tsv").write_text("item_id\tother\n12.0\t1\na b\t2\nNA\t3\n")
    (tmp_path / "t.jsonl").write_text('{"item_id": 12}\n{"item_id": "a b"}\n{"item_id": "NA", "x": 1}\n')
    for name in ("t.csv", "t.tsv", "t.jsonl"):
        assert load(tmp_path / name) == expected, name
    for column in ([12, 7], [12.0, 7.0], ["12", "7"], ["12.0", "7.00"]):
        pq.write_table(pa.table({"item_id": column}), tmp_path / "t.parquet")
        assert load(tmp_path / "t.parquet") == {"12": 2, "7": 2}, column
    (tmp_path / "many").mkdir()
    for number in range(3):
        pq.write_table(pa.table({"sku": [number, number + 1]}), tmp_path / "many" / f"{number}.parquet")
    assert load(tmp_path / "many", column="sku") == {str(key): 2 for key in range(4)}


def test_a_key_with_several_rows_fits_if_one_of_them_does(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("item_id,price\na,5\na,50\nb,50\nb,unknown\nc,unknown\nd,50\n")
    assert load(path, where="price < 20") == {"a": 2, "b": 1, "c": 1, "d": 0}


# ------------------------------------------------------------------------------------------------ the filter


def allowed_by(folder: Path, output: Path, **options: Any) -> set[int]:
    config = Retrieve(export=str(folder / "vectors"), output=str(output), **options)
    allowed = find_allowed(config, open_export(config.export), start_records(config))
    assert allowed is not None and allowed.dtype == bool and allowed.shape == (ITEMS,)
    return set(np.flatnonzero(allowed).tolist())


ROWS = st.lists(
    st.tuples(st.integers(0, ITEMS + 5), st.sampled_from(["shoes", "hats", None]), st.sampled_from([1, 20, 300, None])),
    min_size=1,
    max_size=30,
)
KEYS = st.none() | st.lists(st.integers(0, ITEMS + 5), min_size=1, max_size=50)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(allow=KEYS, deny=KEYS, rows=st.none() | ROWS)
def test_the_filters_combine_as_in_a_plain_loop(folder, tmp_path, allow, deny, rows):
    options: dict[str, Any] = {}
    for name, keys in (("allow", allow), ("deny", deny)):
        if keys is not None:
            (tmp_path / name).write_text(keys_of(keys))
            options[name] = str(tmp_path / name)
    if rows is not None:
        items, kinds, prices = zip(*rows, strict=True)
        table = {"sku": [f"item {item}" for item in items], "kind": pa.array(kinds, pa.string())}
        pq.write_table(pa.table(table | {"price": pa.array(prices, pa.int64())}), tmp_path / "t.parquet")
        options |= {"items": str(tmp_path / "t.parquet"), "where": "kind = 'shoes' AND price < 100"}
    if not options:
        return
    options["item_column"] = "sku"
    named = [keys for keys in (allow, None if rows is None else [row[0] for row in rows]) if keys is not None]
    expected = set()
    for item in range(ITEMS):
        fits = rows is None or any(
            row == item and kind == "shoes" and price is not None and price < 100 for row, kind, price in rows
        )
        if fits and (allow is None or item in allow) and (deny is None or item not in deny):
            expected.add(item)
    if not expected or any(min(keys) >= ITEMS for keys in named):
        with pytest.raises(InputError, match="leaves no item|none of its"):
            allowed_by(folder, tmp_path / "out", **options)
    else:
        assert allowed_by(folder, tmp_path / "out", **options) == expected


# ------------------------------------------------------------------------------------------------ searching


@given(st.data())
def test_a_restricted_search_is_a_search_without_the_others(data):
    ids = sorted(data.draw(st.sets(st.integers(0, ITEMS - 1), min_size=1)))
    k, seen = (
        data.draw(st.integers(1, 12)),
        data.draw(st.lists(st.lists(st.integers(0, ITEMS - 1)), min_size=USERS // 10)),
    )
    users = range(len(seen[:USERS]))
    allowed = np.isin(np.arange(ITEMS), ids)
    search = RestrictedSearch(
        ExactSearch(Catalogue.of_vectors(torch.from_numpy(ITEM_VECTORS[allowed]))), compact_ids(allowed)
    )
    queries = USER_VECTORS[list(users)][:, None]
    lists = Retriever(search, k, lambda lists: merge_by_score(lists, k)).lists(queries, Ragged.from_lists(seen[:USERS]))
    for user in users:
        expected = plain_list(user, k, ids, seen[user])
        assert lists.items[user].tolist() == expected + [-1] * (k - len(expected))
    unseen = Retriever(search, k, lambda lists: merge_by_score(lists, k)).lists(queries)
    assert [[i for i in row if i >= 0] for row in unseen.items.tolist()] == [plain_list(u, k, ids) for u in users]


SOME = [[7], [0, 1, 38], list(range(0, ITEMS, 3))]


def searched(rank: int, world_size: int, export: str, index: str) -> list[list[list[int]]]:
    """Lists of this rank's users, for each choice of allowed items."""
    config = Retrieve(export=export, output="", k=6, index=index)  # type: ignore[arg-type]
    own = list(range(rank, USERS, world_size))
    seen = Ragged.from_lists([WALKS[user] for user in own])
    found = []
    for ids in SOME:
        allowed = np.isin(np.arange(ITEMS), ids)
        _, retriever, finish = build_retrievers(config, open_export(export), merge_rule("score"), allowed)
        lists = retriever.lists(USER_VECTORS[own][:, None], seen)
        finish()
        found.append([[item for item in row if item >= 0] for row in lists.items.tolist()])
    return found


@pytest.mark.parametrize(("index", "world_size"), [("exact", 1), ("exact", 2), ("exact", 3), ("ivf", 2)])
def test_ranks_search_the_allowed_items_alone(folder, index, world_size):
    for rank, found in enumerate(run_ranks(searched, world_size, str(folder / "vectors"), index)):
        for ids, rows in zip(SOME, found, strict=True):
            for user, row in zip(range(rank, USERS, world_size), rows, strict=True):
                expected = plain_list(user, 6, ids, WALKS[user])
                assert score(user, row) == score(user, expected) and len(row) == len(set(row)), (user, row)
                assert set(row) <= set(ids) - set(WALKS[user])
                if index == "exact":  # FAISS has an order of its own among equal scores
                    assert row == expected


def score(user: int, items: list[int]) -> list[float]:
    return (ITEM_VECTORS[items] @ USER_VECTORS[user]).tolist()


# ------------------------------------------------------------------------------------------------ the stage


def test_lists_hold_what_the_filter_leaves_and_say_so(folder, tmp_path, capfd):
    (tmp_path / "allow.txt").write_text(keys_of(range(20)) + "item 99\n")
    (tmp_path / "deny.csv").write_text("item_id\nitem 3\nitem 4\n")
    (tmp_path / "items.jsonl").write_text(
        "".join(json.dumps({"item_id": f"item {i}", "price": "?" if i == 6 else i}) + "\n" for i in range(5, 35))
        + json.dumps({"item_id": "item 4", "price": 1})
    )
    options = {"allow": tmp_path / "allow.txt", "deny": tmp_path / "deny.csv", "data": folder / "data"}
    options |= {"items": tmp_path / "items.jsonl", "where": "price != 7"}
    found = retrieve(folder, tmp_path / "lists", **options)
    left = {5, *range(8, 20)}
    assert found == {user: plain_list(user, 5, left, WALKS[user]) for user in range(USERS)}
    manifest = open_lists(str(tmp_path / "lists"))
    assert manifest.allowed == len(left) and manifest.filters["allow"].unknown == 1
    said = capfd.readouterr().out
    assert "allow.txt: 20 items allowed; keys unknown to the export: 1 (such as 'item 99')" in said
    assert "deny.csv: 2 items denied" in said
    assert "9 left out, as the table lacks them; 1 left out, as --where cannot be computed" in said
    assert f"allowed     {len(left)} of {ITEMS} items" in said

    retrieve(folder, tmp_path / "lists", **options)
    assert "Already there" in capfd.readouterr().out
    moved = (tmp_path / "allow.txt").rename(tmp_path / "moved.txt")
    retrieve(folder, tmp_path / "lists", **options | {"allow": moved})  # the same content elsewhere
    assert "Already there" in capfd.readouterr().out
    moved.write_text(keys_of(range(21)))
    retrieve(folder, tmp_path / "lists", 2, **options | {"allow": moved})
    assert "content of --allow: " in capfd.readouterr().err
    retrieve(folder, tmp_path / "lists", 2, **{name: options[name] for name in options if name != "allow"})
    assert "content of --allow: " in capfd.readouterr().err
    moved.write_text(keys_of(range(20)) + "item 99\n")
    retrieve(folder, tmp_path / "lists", 2, **options | {"allow": moved, "where": "price != 8"})
    assert "where: price != 7 there, price != 8 now" in capfd.readouterr().err


def test_lists_of_before_there_were_filters_are_there_already(folder, tmp_path, capfd):
    retrieve(folder, tmp_path / "lists")

    def drop(manifest: dict[str, Any]) -> None:
        for name in ("filters", "allowed", "popular", "empty", "example"):
            del manifest[name]
        for name in ("allow", "deny", "items", "where", "item_column", "users", "user_column", "fallback"):
            del manifest["settings"][name]

    change_json(tmp_path / "lists" / "manifest.json", drop)
    retrieve(folder, tmp_path / "lists")
    assert "Already there" in capfd.readouterr().out
    (tmp_path / "allow").write_text(keys_of([1, 2]))
    retrieve(folder, tmp_path / "lists", 2, allow=tmp_path / "allow")
    assert "content of --allow: None there" in capfd.readouterr().err


@pytest.mark.parametrize("index", ["exact", "hnsw"])
def test_a_filter_that_leaves_few_items_or_a_user_none_says_so(folder, tmp_path, capfd, index):
    left = WALKS[0][:2]
    (tmp_path / "allow.txt").write_text(keys_of(left))
    found = retrieve(folder, tmp_path / "lists", allow=tmp_path / "allow.txt", data=folder / "data", index=index)
    assert found == {user: plain_list(user, 5, left, WALKS[user]) for user in range(USERS)}
    empty = [user for user in range(USERS) if not found[user]]
    assert 0 in empty and len(empty) < USERS
    said = capfd.readouterr().out
    assert f"allowed     {len(set(left))} of {ITEMS} items, fewer than --k 5: no list is longer" in said
    assert f"empty       {len(empty)} lists, such as that of 'user {empty[0]}'" in said and "allow more items" in said


def test_a_filter_that_leaves_no_user_anything_is_an_error(tmp_path, capfd):
    make_export(tmp_path, [[1, 2, 3, user % 3] for user in range(USERS)])
    (tmp_path / "allow").write_text(keys_of([1, 2]))
    retrieve(tmp_path, tmp_path / "lists", 2, allow=tmp_path / "allow", data=tmp_path / "data")
    said = capfd.readouterr().err
    assert "every list would be empty" in said and "'user 0'" in said and not (tmp_path / "lists").exists()


REFUSED: dict[str, tuple[dict[str, str], dict[str, Any], str]] = {
    "missing": ({}, {"allow": "none.txt"}, "none.txt: no such file"),
    "empty": ({"a.txt": ""}, {"allow": "a.txt"}, "a.txt: it is empty; give a list"),
    "blank": ({"a.txt": "\n  \n"}, {"deny": "a.txt"}, "a.txt: it is empty"),
    "no keys": ({"a.csv": "item_id,b\n,1\n"}, {"deny": "a.csv"}, "a.csv: none of its 1 rows has a key (no item: ',1')"),
    "header alone": ({"a.csv": "item_id,b\n"}, {"allow": "a.csv"}, "a.csv: it is empty"),
    "unknown keys": ({"a.txt": "1\n2\n"}, {"allow": "a.txt"}, "none of its 2 keys is an item of"),
    "column": (
        {"a.csv": "sku,b\n1,2\n"},
        {"allow": "a.csv"},
        "has no column 'item_id' for the item; it has 'sku', 'b'",
    ),
    "json key": ({"a.jsonl": '{"sku": 1}\n'}, {"allow": "a.jsonl"}, "has no column 'item_id' for the item"),
    "separator": (
        {"a.csv": "item_id;b\n1;2\n"},
        {"allow": "a.csv"},
        "Is it separated otherwise?; give a list in UTF-8",
    ),
    "encoding": ({"a.txt": "i\0t\0"}, {"allow": "a.txt"}, "it is not UTF-8 text"),
    "lists": ({"a.jsonl": '{"item_id": [1, 2]}\n'}, {"allow": "a.jsonl"}, "list or object for the item"),
    "no parquet": ({"a.parquet": "x"}, {"allow": "a.parquet"}, "a.parquet"),
    "where alone": ({}, {"where": "a > 1"}, "name the table whose columns it is about with --items"),
    "items alone": ({}, {"items": "a.csv"}, "give a condition on its columns with --where"),
    "where column": (
        {"a.csv": "item_id,Price\nitem 1,2\n"},
        {"items": "a.csv", "where": "price > 1"},
        "has no column 'price'; it has 'item_id', 'Price'. Do you mean Price?",
    ),
    "where query": (
        {"a.csv": "item_id,b\nitem 1,2\n"},
        {"items": "a.csv", "where": "b > (select 1)"},
        "is no condition on a row",
    ),
    "where of a list": ({"a.txt": "item 1\n"}, {"items": "a.txt", "where": "b > 1"}, "has no columns for --where"),
    "nothing left": (
        {"a.csv": "item_id,b\nitem 1,2\n"},
        {"items": "a.csv", "where": "b > 2"},
        "the filter leaves no item of",
    ),
    "all denied": ({"a.txt": keys_of(range(ITEMS))}, {"deny": "a.txt"}, "40 items denied"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(folder, tmp_path, capfd, case):
    files, options, message = REFUSED[case]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    given = {name: tmp_path / value if name != "where" else value for name, value in options.items()}
    retrieve(folder, tmp_path / "lists", 2, **given)
    said = capfd.readouterr().err
    assert message in said and "Traceback" not in said and "user_column" not in said and "--input" not in said
    assert not (tmp_path / "lists").exists() and not list(tmp_path.glob(".prepare-*"))


def test_a_list_to_deny_without_a_known_item_denies_nothing_and_says_so(folder, tmp_path, capfd):
    (tmp_path / "deny.txt").write_text("item 98\nitem 99\n")
    found = retrieve(folder, tmp_path / "lists", deny=tmp_path / "deny.txt")
    assert found == {user: plain_list(user, 5, range(ITEMS)) for user in range(USERS)}
    said = capfd.readouterr().out
    assert "deny.txt: 0 items denied; keys unknown to the export: 2 (such as 'item 98')" in said
    assert f"allowed     {ITEMS} of {ITEMS} items" in said
