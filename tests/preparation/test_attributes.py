"""Tables of attributes: every format, spelling, missing values, lists, numbers, texts; what the summary says."""

import bz2
import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from recgpt_torchrec.data.dataset import Dataset, Manifest
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.attributes import buckets
from recgpt_torchrec.preparation.engines.duckdb_engine import DuckDBEngine
from recgpt_torchrec.prepare import summary
from tests.preparation.attribute_helpers import (
    LOG,
    plain_bucket,
    plain_edges,
    plain_order,
    plain_spelling,
    read_values,
    vocabulary,
    write_table,
)
from tests.preparation.prepare_helpers import make, read_keys, read_sequences, write_csv
from tests.preparation.spark_helpers import fill_table

ROWS: list[dict[str, Any]] = [
    {"item_id": 1, "brand": "a", "tags": ["x", "y"], "price": 1.5, "title": "One, first"},
    {"item_id": 2, "brand": "b", "tags": ["y"], "price": 2.5, "title": "Two"},
    {"item_id": 3, "brand": None, "tags": [], "price": None, "title": None},
    {"item_id": 9, "brand": "c", "tags": ["z"], "price": 7.0, "title": "Nine"},
]
"""Item 4 of the log has no row, and item 9 is in no interaction."""
ASKED = ["brand,tags:list", "price:number", "title:text"]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "log.csv", LOG)


def check_rows(folder: Path) -> None:
    """Check that a dataset has the attributes of `ROWS`."""
    assert read_values(folder, "item", "brand") == {"1": ["a"], "2": ["b"], "3": [], "4": []}
    assert {key: set(v) for key, v in read_values(folder, "item", "tags").items()} == {
        **{"1": {"x", "y"}, "2": {"y"}},
        **{"3": set(), "4": set()},
    }
    assert read_values(folder, "item", "price") == {"1": [0], "2": [1], "3": [], "4": []}
    assert read_values(folder, "item", "title") == {"1": "One, first", "2": "Two", "3": None, "4": None}
    manifest = Dataset.open(str(folder), checksums=True).manifest
    brand, tags, price = manifest.attributes
    assert (brand.kind, brand.multiple, brand.values, brand.missing) == ("category", False, 2, 2)
    assert (tags.kind, tags.multiple, tags.values, tags.missing) == ("category", True, 2, 2)
    assert (price.kind, price.edges, price.values, price.missing) == ("number", [2.5], 2, 2)
    assert vocabulary(folder, "item", "brand") == plain_order({"a", "b"}, [])
    assert [part.path.rpartition("/")[0] for part in brand.parts + tags.parts] == [
        "attributes/item-brand",
        "attributes/item-tags",
    ]


@pytest.mark.parametrize("ending", ["tsv", "txt", "parquet", "semicolon.csv", "csv.gz", "jsonl.bz2"])
def test_every_format_gives_the_same_attributes(ending, log, tmp_path):
    plain = ending.removesuffix(".gz").removesuffix(".bz2")
    separators = {"tsv": "\t", "semicolon.csv": ";"}
    table = write_table(tmp_path / f"items.{plain}", ROWS, separators.get(ending, ","))
    for packed, compress in ((".gz", gzip.compress), (".bz2", bz2.compress)):
        if ending.endswith(packed):
            target = tmp_path / f"items.{ending}"
            target.write_bytes(compress(table.read_bytes()))
            table.unlink()
            table = target
    make(log, tmp_path / "data", items=[str(table)], item_attributes=ASKED)
    check_rows(tmp_path / "data")


def test_recbole_files_and_folders_are_tables_too(log, tmp_path):
    folder = tmp_path / "tables"
    folder.mkdir()
    (folder / "a.item").write_text(
        "item_id:token\tbrand:token\ttags:token_seq\tprice:float\ttitle:token_seq\n1\ta\tx y\t1.5\tOne, first\n"
    )
    (folder / "b.item").write_text(
        "item_id:token\tbrand:token\ttags:token_seq\tprice:float\ttitle:token_seq\n"
        "2\tb\ty\t2.5\tTwo\n3\t\t\t\t\n9\tc\tz\t7\tNine\n"
    )
    (folder / "read.me").write_text("nothing")
    result = make(log, tmp_path / "data", items=[str(folder)], item_attributes=["brand,tags,price,title:text"])
    check_rows(tmp_path / "data")
    assert any("left out" in text and "read.me" in text for label, text in result.manifest.preparation["page"])


def test_users_have_attributes_keyed_by_a_column_of_another_name(log, tmp_path):
    users = write_table(
        tmp_path / "users.parquet", [{"id": "u2", "age": 30, "ok": True}, {"id": "u1", "age": 40, "ok": None}]
    )
    options = {"users": [str(users)], "users_key": "id", "user_attributes": ["age:number", "ok"]}
    make(log, tmp_path / "data", **options)
    assert read_values(tmp_path / "data", "user", "ok") == {"u1": [], "u2": ["true"], "u3": []}
    assert read_values(tmp_path / "data", "user", "age") == {"u1": [1], "u2": [0], "u3": []}
    assert "attribute_age" not in pq.read_schema(tmp_path / "data" / "items" / "part-00000.parquet").names


COLUMNS: list[tuple[Any, str, list[Any]]] = [
    (pa.array([1, 2, None], pa.int32()), "category", [["1"], ["2"], []]),
    (pa.array([1.0, 2.5, None]), "number", [[0], [1], []]),
    (pa.array([True, False, None]), "category", [["true"], ["false"], []]),
    (pa.array(["12.0", " ", "NULL"]), "category", [["12"], [], []]),
    (pa.array(["a", "b", "a"]).dictionary_encode(), "category", [["a"], ["b"], ["a"]]),
    (pa.array([[1, 1], [], None], pa.list_(pa.int64())), "category", [["1"], [], []]),
    (pa.array([[2.0, None], [], None], pa.large_list(pa.float32())), "category", [["2"], [], []]),
    (pa.array([[1, 2], [2, 3], [4, 4]], pa.list_(pa.int16(), 2)), "category", [{"1", "2"}, {"2", "3"}, ["4"]]),
    (pa.array([[b"x"], [b"y", None], []], pa.list_(pa.binary())), "category", [["x"], ["y"], []]),
    (
        pa.array([10, 20, 30], pa.int32()).cast(pa.date32()),
        "category",
        [["1970-01-11"], ["1970-01-21"], ["1970-01-31"]],
    ),
    (pa.array([[1], [1, 2], None], pa.list_(pa.time32("s"))), "category", [["00:00:01"], {"00:00:01", "00:00:02"}, []]),
    (pa.array(["1.50", "2.00", None]).cast(pa.decimal128(10, 2)), "number", [[0], [1], []]),
]
"""Columns of Parquet, what each is taken for, and the values of items 1 to 3."""


def test_types_of_parquet_columns(log, tmp_path):
    columns = {f"a{place}": column for place, (column, _, _) in enumerate(COLUMNS)}
    pq.write_table(pa.table({"item_id": ["1", "2", "3"], **columns}), tmp_path / "items.parquet")
    make(log, tmp_path / "data", items=[str(tmp_path / "items.parquet")], item_attributes=[",".join(columns)])
    attributes = Manifest.from_json((tmp_path / "data" / "manifest.json").read_text()).attributes
    for attribute, (column, kind, values) in zip(attributes, COLUMNS, strict=True):
        assert attribute.kind == kind, column
        found = read_values(tmp_path / "data", "item", attribute.name)
        for key, expected in zip("123", values, strict=True):
            assert type(expected)(found[key]) == expected, column


def test_json_values_of_several_types(log, tmp_path):
    lines = [
        {"item_id": 1, "a": "x", "n": 1, "o": {"b": 5}},
        {"item_id": "2", "a": ["x", "y", None], "n": 2.5, "o": {"b": 6.0}},
        {"item_id": 3.0, "n": None, "o": {}},
    ]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "\n{broken\n")
    result = make(log, tmp_path / "data", items=[str(tmp_path / "items.jsonl")], item_attributes=["a,n,o.b:category"])
    found = read_values(tmp_path / "data", "item", "a")
    assert {key: set(each) for key, each in found.items()} == {"1": {"x"}, "2": {"x", "y"}, "3": set(), "4": set()}
    assert read_values(tmp_path / "data", "item", "n") == {"1": [0], "2": [1], "3": [], "4": []}
    assert read_values(tmp_path / "data", "item", "o.b") == {"1": ["5"], "2": ["6"], "3": [], "4": []}
    text = summary_of(result)
    assert "1 lines cannot be read (malformed line) and were left out, such as '{broken'" in text


def summary_of(result: Any) -> str:
    from recgpt_torchrec.config import Prepare

    return summary(Prepare(input=["log"], output="out"), result)


cells = st.sampled_from(["x", "y", "12", "12.0", "-0.0", "", " ", "NULL", "none", "é", "a b", "1.50"])


@hypothesis_settings(max_examples=5)
@given(
    table=st.dictionaries(st.integers(0, 12), st.tuples(cells, st.lists(cells, max_size=3)), min_size=1),
    seed=st.integers(0, 3),
)
def test_values_equal_a_plain_reading(table, seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("values")
    log = [(f"u{item % 3}", str(item), item) for item in range(10)]
    if not any(plain_spelling(row[0]) for key, row in table.items() if key < 10):
        table[0] = ("x", table.get(0, ("", []))[1])
    table.setdefault(1, ("x", []))
    table[2] = ("y", ["z"])
    rows = [{"item_id": key, "one": one, "several": several} for key, (one, several) in table.items()]
    items = write_table(folder / "items.parquet", rows)
    options = {"items": [str(items)], "item_attributes": ["one", "several"], "seed": seed}
    make(write_csv(folder / "log.csv", log), folder / "data", **options)
    single = {str(item): plain_spelling(table.get(item, ("", []))[0]) for item in range(10)}
    expected = {key: {value} - {None} for key, value in single.items()}
    assert {key: set(each) for key, each in read_values(folder / "data", "item", "one").items()} == expected
    values = {value for value in single.values() if value is not None}
    assert vocabulary(folder / "data", "item", "one") == plain_order(values, [], seed)
    several = {str(item): set(map(plain_spelling, table.get(item, ("", []))[1])) - {None} for item in range(10)}
    assert {key: set(each) for key, each in read_values(folder / "data", "item", "several").items()} == several
    (one, more) = Manifest.from_json((folder / "data" / "manifest.json").read_text()).attributes
    assert one.missing == sum(not each for each in expected.values())
    assert more.missing == sum(not each for each in several.values())


floats = st.floats(allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, 2.0, math.inf, -math.inf, 1.7e308, -1.7e308])
floats = floats.filter(lambda number: number == 0 or abs(number) > 1e-300)


@hypothesis_settings(max_examples=20)
@given(numbers=st.lists(floats, min_size=1, max_size=40), count=st.integers(2, 20))
def test_edges_are_quantiles_and_buckets_count_the_edges_below(numbers, count, engine):
    check_buckets(engine, numbers, count)


@pytest.mark.parametrize(("scale", "ranges"), [(1.0, 2**16), (1e306, 2**16), (1.0, 20), (1.0, 3)])
def test_edges_of_many_distinct_numbers_are_the_same(scale, ranges, engine, monkeypatch):
    monkeypatch.setattr(buckets, "FEW", 10)
    monkeypatch.setattr(buckets, "RANGES", ranges)
    numbers = (np.random.default_rng(0).normal(size=300).round(3) * scale).tolist()
    check_buckets(engine, [*numbers, math.inf, -math.inf], 5)


def check_buckets(engine: DuckDBEngine, numbers: list[float], count: int) -> None:
    """Compare edges and buckets with the plain ones."""
    engine.drop("numbers")
    table = fill_table(engine, "numbers", pa.table({"number": [number + 0.0 for number in numbers]}))
    edges = buckets.find_edges(engine, table, count)
    assert edges == plain_edges(numbers, count) and len(edges) < count
    found = engine.rows(table.select("number", bucket=buckets.number_bucket(table.number, edges)))
    assert [row["bucket"] for row in found] == [plain_bucket(number, edges) for number in numbers]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with DuckDBEngine(str(tmp_path_factory.mktemp("engine"))) as engine:
        yield engine


def test_many_buckets_are_one_expression_that_the_engine_takes(engine):
    engine.drop("numbers")
    table = fill_table(engine, "numbers", pa.table({"number": [float(number) for number in range(5000)]}))
    edges = buckets.find_edges(engine, table, 1024)
    assert edges == plain_edges([float(number) for number in range(5000)], 1024)
    found = engine.row(table.agg(last=buckets.number_bucket(table.number, edges).max()))
    assert found["last"] == 1023


def test_numbers_that_are_none_are_missing_and_told(log, tmp_path):
    items = [
        {"item_id": 1, "n": "inf"},
        {"item_id": 2, "n": "NaN"},
        {"item_id": 3, "n": "soon"},
        {"item_id": 4, "n": "-5"},
    ]
    table = write_table(tmp_path / "items.csv", items)
    result = make(log, tmp_path / "data", items=[str(table)], item_attributes=["n:number"])
    assert read_values(tmp_path / "data", "item", "n") == {"1": [0], "2": [], "3": [], "4": [0]}
    text = summary_of(result)
    assert "1 values of n are no numbers and were left empty, such as 'soon'" in text
    assert "n: its numbers are infinite or equal, so there is one bucket" in text


def test_the_summary_says_what_was_understood(log, tmp_path):
    table = write_table(tmp_path / "items.parquet", ROWS)
    users = write_table(tmp_path / "users.csv", [{"user_id": "u1", "c": "a|b"}, {"user_id": "", "c": "z"}])
    options = {"users": [str(users)], "user_attributes": ["c"]}
    result = make(log, tmp_path / "data", items=[str(table)], item_attributes=["brand,tags,price"], **options)
    text = summary_of(result)
    for line in (
        f"items       4 rows of {table} (Parquet)",
        "3 of the dataset's 4 items have a row; 1 of the table's 4 are in no interaction",
        "brand: category (string), 2 values; missing for 2 (50.0%); most frequent a (1), b (1)",
        "tags: list (list<element: string>), 2 values; missing for 2 (50.0%); most frequent y (2), x (1)",
        "price: number (double), 2 buckets from 1.5 to 2.5; missing for 2 (50.0%)",
        "--users: 1 rows have no user and were left out",
        "--user_attributes c: its values seem to be lists, such as 'a|b'; to read them so, pass c:list",
    ):
        assert line in text, (line, text)


def test_an_id_in_disguise_is_noted(tmp_path):
    log = [(f"u{item % 7}", str(item), item) for item in range(40)]
    rows = [{"item_id": item, "title": f"t{item}", "price": item * 10 + 3, "fine": item % 4} for item in range(40)]
    table = write_table(tmp_path / "items.csv", rows)
    options = {"items": [str(table)], "item_attributes": ["title,price,fine"]}
    text = summary_of(make(write_csv(tmp_path / "log.csv", log), tmp_path / "data", **options))
    assert "--item_attributes title: 40 values for 40 items, nearly one each: an id in disguise" in text
    assert "Pass title:text to keep it as a name" in text and "Pass price:number for buckets" in text
    assert "fine: 4 values for" not in text


def test_tags_that_several_items_share_are_no_ids_and_one_value_tells_nothing(tmp_path):
    log = [(f"u{item % 7}", str(item), item) for item in range(40)]
    rows = [
        {"item_id": item, "tags": [(item + k) % 40 for k in range(3)], "own": [2 * item, 2 * item + 1], "one": "x"}
        | {"added": f"2026-01-{1 + item % 9:02d} 10:00:00"}
        for item in range(40)
    ]
    table = write_table(tmp_path / "items.parquet", rows)
    options = {"items": [str(table)], "item_attributes": ["tags,own,one,added"]}
    text = summary_of(make(write_csv(tmp_path / "log.csv", log), tmp_path / "data", **options))
    assert "own: 80 values for 40 items, nearly all of one item alone: an id in disguise" in text
    assert "one: it is 'x' for every item, which tells nothing; leave it out" in text
    assert "tags: 40 values for" not in text and "added: its values seem to be lists" not in text


def test_lists_in_text_with_another_separator_or_none(log, tmp_path):
    table = write_table(tmp_path / "items.csv", [{"item_id": 1, "t": "[a, 'b']"}, {"item_id": 2, "t": "b"}])
    options = {"items": [str(table)], "item_attributes": ["t:list"]}
    make(log, tmp_path / "data", attribute_separator="comma", **options)
    assert set(read_values(tmp_path / "data", "item", "t")["1"]) == {"a", "b"}
    result = make(log, tmp_path / "other", attribute_separator=";", **options)
    assert "no value holds the separator" in summary_of(result)


def test_rows_that_repeat_are_told_and_rows_that_differ_refused(log, tmp_path):
    rows = [
        {"item_id": "1", "a": "x", "n": "1"},
        {"item_id": "1.0", "a": "x", "n": "1.0"},
        {"item_id": "2", "a": "y", "n": "2"},
    ]
    options = {"item_attributes": ["a,n:number"]}
    table = write_table(tmp_path / "same.csv", rows)
    result = make(log, tmp_path / "data", items=[str(table)], **options)
    assert "--items: 1 rows repeat another row of their item" in summary_of(result)
    for name, value in (("a", ""), ("a", "z"), ("n", "3")):
        other = write_table(tmp_path / "differ.csv", [*rows, {**rows[0], name: value}])
        with pytest.raises(
            InputError, match=rf"the item '1' has several rows that differ in {name}: .* in row 2 of .*"
        ):
            make(log, tmp_path / "new", items=[str(other)], **options)


def test_items_of_the_catalogue_have_ids_without_interactions(tmp_path):
    pairs = [("u1", "1"), ("u1", "2"), ("u1", "4"), ("u2", "1"), ("u2", "2"), ("u2", "3")]
    log = write_csv(tmp_path / "log.csv", [(user, item, time) for time, (user, item) in enumerate(pairs)])
    table = write_table(tmp_path / "items.parquet", ROWS)
    options = {"items": [str(table)], "catalogue": "items", "min_count": 2, "hold_out": "none"}
    make(log, tmp_path / "data", item_attributes=["brand"], **options)
    found = pq.read_table(tmp_path / "data" / "items").to_pylist()
    counts = {row["key"]: (row["count"], row["train_count"]) for row in found}
    assert counts == {"1": (2, 2), "2": (2, 2), "3": (0, 0), "9": (0, 0)}  # 3 has one interaction, 4 no row
    assert read_sequences(tmp_path / "data") == {"u1": ["1", "2"], "u2": ["1", "2"]}
    assert [row["key"] for row in found] == plain_order({"1", "2", "3", "9"}, [])
    assert read_values(tmp_path / "data", "item", "brand") == {"1": ["a"], "2": ["b"], "3": [], "9": ["c"]}
    make(log, tmp_path / "alone", **options)
    assert read_keys(tmp_path / "alone", "items", "item_id") == plain_order({"1", "2", "3", "9"}, [])
    assert Dataset.open(str(tmp_path / "alone")).manifest.attributes == []


def test_a_dataset_without_tables_records_nothing_of_them(log, tmp_path):
    make(log, tmp_path / "data")
    values = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert not {"attributes"} & values.keys() and "tables" not in values["preparation"]
    assert not [name for name in values["settings"] if "attribute" in name or name in ("items", "users", "catalogue")]


def test_a_changed_table_is_another_result_and_the_same_one_is_not_read_again(log, tmp_path):
    table = write_table(tmp_path / "items.csv", [{"item_id": "1", "a": "x"}])
    options = {"items": [str(table)], "item_attributes": ["a"]}
    make(log, tmp_path / "data", **options)
    assert make(log, tmp_path / "data", **options).already_there
    with pytest.raises(InputError, match=r"item_attributes: \['a'\] there, \['a:text'\] now"):
        make(log, tmp_path / "data", items=[str(table)], item_attributes=["a:text"])
    write_table(table, [{"item_id": "1", "a": "y"}, {"item_id": "2", "a": "z"}])
    with pytest.raises(InputError, match="files of tables differ: .*items.csv"):
        make(log, tmp_path / "data", **options)
    with pytest.raises(InputError, match="files of tables differ: .*items.csv"):
        make(log, tmp_path / "data")
