"""Tables of attributes that change from day to day, beside an earlier dataset, and tables that cannot be used."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recgpt_torchrec.data.dataset import Dataset, Manifest
from recgpt_torchrec.data.inputs.records import ValueVocabulary
from recgpt_torchrec.errors import InputError
from tests.preparation.attribute_helpers import LOG, plain_order, read_values, vocabulary, write_table
from tests.preparation.prepare_helpers import make, write_csv
from tests.support import change_json

FIRST: list[dict[str, Any]] = [
    {"item_id": "1", "brand": "a", "tags": ["x"], "price": 1.0},
    {"item_id": "2", "brand": "b", "tags": ["y", "x"], "price": 2.0},
    {"item_id": "3", "brand": "a", "tags": [], "price": 3.0},
]
SECOND: list[dict[str, Any]] = [
    {"item_id": "1", "brand": "c", "tags": ["z"], "price": 9.0},
    {"item_id": "3", "brand": "a", "tags": ["x"], "price": 0.5},
    {"item_id": "5", "brand": "d", "tags": ["w"], "price": 2.5},
]
"""Item 1 has another brand, 2 none, 5 is new, and nobody has the brand b and the tag y any more."""
ASKED = ["brand,tags,price"]
LATER = [*LOG, ("u4", "5", 7), ("u4", "1", 8)]


@pytest.fixture
def days(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """The dataset of the first day, and the options of the second."""
    first = tmp_path / "first"
    table = write_table(tmp_path / "first.parquet", FIRST)
    make(write_csv(tmp_path / "first.csv", LOG), first, items=[str(table)], item_attributes=ASKED)
    second = write_table(tmp_path / "second.parquet", SECOND)
    write_csv(tmp_path / "second.csv", LATER)
    return first, {"items": [str(second)], "item_attributes": ASKED, "vocabulary": str(first)}


def test_values_keep_their_ids_and_new_ones_come_after(days, tmp_path):
    first, options = days
    make(tmp_path / "second.csv", tmp_path / "data", **options)
    folder = tmp_path / "data"
    brands = vocabulary(first, "item", "brand")
    assert brands == plain_order({"a", "b"}, [])
    assert vocabulary(folder, "item", "brand") == plain_order({"a", "b", "c", "d"}, brands)
    tags = vocabulary(first, "item", "tags")
    assert vocabulary(folder, "item", "tags") == plain_order({"x", "y", "z", "w"}, tags)
    assert read_values(folder, "item", "brand") == {"1": ["c"], "2": [], "3": ["a"], "4": [], "5": ["d"]}
    before, after = (Dataset.open(str(each)).manifest for each in (first, folder))
    for old, new in zip(before.attributes, after.attributes, strict=True):
        own = ValueVocabulary(fingerprint=old.fingerprint, values=old.values)
        assert new.lineage == ([] if new.kind == "number" else [own])
    assert before.attributes[2].edges == after.attributes[2].edges  # kept, so that bucket b means what it did
    assert read_values(folder, "item", "price")["1"] == [after.attributes[2].values - 1]
    page = json.dumps(after.preparation["page"])
    assert "brand: category (string), 4 values, 2 of them new" in page


def test_a_day_without_new_values_has_the_same_vocabulary_and_lineage(days, tmp_path):
    first, options = days
    make(tmp_path / "second.csv", tmp_path / "second", **options)
    make(tmp_path / "second.csv", tmp_path / "third", **{**options, "vocabulary": str(tmp_path / "second")})
    second, third = (Dataset.open(str(tmp_path / name)).manifest for name in ("second", "third"))
    assert [(e.fingerprint, e.lineage) for e in second.attributes] == [
        (e.fingerprint, e.lineage) for e in third.attributes
    ]
    assert vocabulary(tmp_path / "third", "item", "brand") == vocabulary(tmp_path / "second", "item", "brand")


def test_leaving_new_keys_out_leaves_new_values_out_too(days, tmp_path):
    first, options = days
    result = make(tmp_path / "second.csv", tmp_path / "data", new_keys="leave_out", **options)
    assert read_values(tmp_path / "data", "item", "brand") == {"1": [], "2": [], "3": ["a"], "4": []}
    before, after = (Dataset.open(str(each)).manifest for each in (first, tmp_path / "data"))
    assert [(e.values, e.fingerprint) for e in before.attributes] == [
        (e.values, e.fingerprint) for e in after.attributes
    ]
    assert after.attributes[0].missing == 3
    notes = [text for label, text in result.manifest.preparation["page"] if label == "note"]
    assert "--item_attributes brand: 1 values that --vocabulary lacks were left empty (--new_keys leave_out)" in notes


def test_one_value_may_become_several_and_an_attribute_may_be_new(days, tmp_path):
    _, options = days
    rows = [{**row, "brand": [row["brand"], "e"], "colour": "red"} for row in SECOND]
    table = write_table(tmp_path / "lists.parquet", rows)
    more = {**options, "items": [str(table)], "item_attributes": ["brand,tags,price,colour"]}
    make(tmp_path / "second.csv", tmp_path / "data", **more)
    brand, *_, colour = Dataset.open(str(tmp_path / "data")).manifest.attributes
    assert brand.multiple and brand.values == 5 and colour.lineage == []
    single = {**options, "vocabulary": str(tmp_path / "data"), "item_attributes": ["brand,tags,price,colour:category"]}
    write_table(tmp_path / "second.parquet", [{**row, "colour": "blue"} for row in SECOND])
    make(tmp_path / "second.csv", tmp_path / "next", **single)
    assert Dataset.open(str(tmp_path / "next")).manifest.attributes[0].multiple


def test_a_kind_that_changed_between_days(days, tmp_path):
    _, options = days
    with pytest.raises(InputError, match=r"price is a category now \(double\), and a number in --vocabulary"):
        make(tmp_path / "second.csv", tmp_path / "new", **{**options, "item_attributes": ["brand,tags,price:category"]})
    table = write_table(tmp_path / "numbers.parquet", [{**row, "brand": 0.5} for row in SECOND])
    with pytest.raises(InputError, match=r"brand is a number now \(double\), and a category .*pass brand:category"):
        make(tmp_path / "second.csv", tmp_path / "new", **{**options, "items": [str(table)]})
    assert not (tmp_path / "new").exists()


def test_an_attribute_of_the_earlier_day_must_be_given(days, tmp_path):
    _, options = days
    absent = "has the item attribute price, which is not given now; name its table"
    as_text = "price:text: --vocabulary .* has it as a number; pass price:number"
    for asked, message in (("brand,tags", absent), ("brand,tags,price:text", as_text)):
        with pytest.raises(InputError, match=message):
            make(tmp_path / "second.csv", tmp_path / "new", **{**options, "item_attributes": [asked]})
    with pytest.raises(InputError, match="has the item attribute brand, which is not given now"):
        make(tmp_path / "second.csv", tmp_path / "new", vocabulary=options["vocabulary"])


def test_a_vocabulary_that_is_damaged_or_shrank(days, tmp_path):
    first, options = days
    path = first / "attributes" / "item-brand" / "part-00000.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(InputError, match="--vocabulary: .* part attributes/item-brand/part-00000.parquet is damaged"):
        make(tmp_path / "second.csv", tmp_path / "new", **options)
    path.unlink()
    with pytest.raises(InputError, match="part attributes/item-brand/part-00000.parquet is missing"):
        make(tmp_path / "second.csv", tmp_path / "new", **options)
    shrunk = pq.read_table(pa.BufferReader(whole)).slice(0, 1)
    pq.write_table(shrunk, path)
    with (first / "manifest.json").open() as file:
        attribute = json.load(file)["attributes"][0]
    attribute["parts"][0] |= {"bytes": path.stat().st_size, "footer": None}

    def put(values: dict[str, Any]) -> None:
        values["attributes"][0] = attribute
        values.pop("checksum", None)

    change_json(first / "manifest.json", put)
    with pytest.raises(InputError, match=r"part-00000.parquet has 1 rows, the manifest promises 2"):
        make(tmp_path / "second.csv", tmp_path / "new", **options)
    attribute["parts"][0]["rows"] = 1
    change_json(first / "manifest.json", put)
    with pytest.raises(InputError, match="it promises 2 values of the item attribute brand, but 1 rows in its parts"):
        make(tmp_path / "second.csv", tmp_path / "new", **options)
    pq.write_table(pa.table({"value_id": [0, 0], "key": ["a", "b"], "count": [1, 1]}), path)
    attribute["parts"][0] |= {"rows": 2, "bytes": path.stat().st_size}
    change_json(first / "manifest.json", put)
    with pytest.raises(
        InputError, match="the vocabulary of the item attribute brand is damaged: it has 2 values with 1"
    ):
        make(tmp_path / "second.csv", tmp_path / "new", **options)


def test_a_catalogue_grows_with_new_items_after_those_that_are_known(days, tmp_path):
    first, options = days
    make(tmp_path / "second.csv", tmp_path / "data", **options, catalogue="items")
    before, after = (pq.read_table(folder / "items")["key"].to_pylist() for folder in (first, tmp_path / "data"))
    assert after == plain_order({"5"}, before)
    extends = Dataset.open(str(tmp_path / "data")).manifest.preparation["extends"]
    assert (extends["items"], extends["absent_items"]) == (4, 0)


GOOD = [{"item_id": "1", "a": "x"}, {"item_id": "2", "a": "y"}]
CASES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a column that is missing": (GOOD, {"item_attributes": ["A_"]}, "no column 'A_', which --item_attributes names"),
    "a name that is nearly right": (
        [{"item_id": "1", "category": "x"}],
        {"item_attributes": ["categories"]},
        "no column 'categories', which --item_attributes names; it has 'item_id', 'category'; did you mean category",
    ),
    "no column of keys": ([{"item": "1", "a": "x"}], {}, "has no column 'item_id' for the item; it has "),
    "an empty table": ([{"item_id": "", "a": ""}], {}, r"no row has a key in the column 'item_id' (1 no key)"),
    "keys of another kind": ([{"item_id": "x7", "a": "x"}], {}, "are like 'x7', those of the log like '1'"),
    "no value at all": ([{"item_id": "1", "a": ""}], {}, "--item_attributes a: no item of the dataset has a value"),
    "names that clash": (GOOD, {"item_attributes": ["a b", "a_b"]}, "--item_attributes a b,a_b: these names differ in"),
}


@pytest.mark.parametrize(
    ("name", "ending"), [(name, ("csv", "parquet", "jsonl")[place % 3]) for place, name in enumerate(CASES)]
)
def test_tables_that_cannot_be_used(name, ending, tmp_path):
    rows, options, expected = CASES[name]
    table = write_table(tmp_path / f"items.{ending}", rows)
    log = write_csv(tmp_path / "log.csv", LOG)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as error:
        make(log, tmp_path / "data", **{"items": [str(table)], "item_attributes": ["a"], **options})
    assert expected in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def refuse(folder: Path, path: Path, asked: str, expected: str, **options: Any) -> None:
    log = write_csv(folder / "log.csv", LOG)
    with pytest.raises(InputError) as error:
        make(log, folder / "data", **{"items": [str(path)], "item_attributes": [asked], **options})
    assert expected in str(error.value) and not (folder / "data").exists()


def test_columns_that_hold_no_values(tmp_path):
    path = tmp_path / "items.parquet"
    pq.write_table(pa.table({"item_id": ["1"], "a": [{"b": 1}], "l": [[[1]]], "t": [["x"]]}), path)
    refuse(tmp_path, path, "a", "'a' holds struct<b: int64>")
    refuse(tmp_path, path, "l", "'l' holds list<")
    refuse(tmp_path, path, "t:number", "--item_attributes t:number: the column holds lists in")
    refuse(tmp_path, path, "t:text", "--item_attributes t:text: the column holds lists in")
    refuse(tmp_path, path, "a", "'t' holds lists", items_key="t", item_attributes=["item_id"])
    path = tmp_path / "items.jsonl"
    path.write_text('{"item_id": 1, "a": {"b": 1}, "l": [{"c": 1}]}\n')
    refuse(tmp_path, path, "a", "'a' holds objects; name a column with one value or a list of values per row, such as")
    refuse(tmp_path, path, "l", "'l' holds lists of objects or lists")
    path.write_text('{"item_id": 1, "a": ["x", ["y"]]}\n')
    refuse(tmp_path, path, "a", "'a' holds lists of objects or lists")
    path = tmp_path / "items.csv"
    path.write_text("item_id,a\n1,soon\n2,\n")
    refuse(tmp_path, path, "a:number", "1 values cannot be read as one, such as 'soon'. Pass a:category")


def test_files_that_differ_in_type(tmp_path):
    folder = tmp_path / "tables"
    folder.mkdir()
    pq.write_table(pa.table({"item_id": ["1"], "a": [1.5]}), folder / "1.parquet")
    pq.write_table(pa.table({"item_id": ["2"], "a": ["x"]}), folder / "2.parquet")
    refuse(tmp_path, folder, "a", "--item_attributes a: its type differs between files (double or string)")
    make(tmp_path / "log.csv", tmp_path / "data", items=[str(folder)], item_attributes=["a:category"])
    found = read_values(tmp_path / "data", "item", "a")
    assert found == {"1": ["1.5"], "2": ["x"], "3": [], "4": []}


def test_files_that_are_not_what_their_ending_says(tmp_path):
    refuse(tmp_path, write_bytes(tmp_path / "items.parquet", b"item_id,a\n"), "a", "cannot be read as parquet")
    refuse(tmp_path, write_bytes(tmp_path / "items.csv", b"PAR1"), "a", "is not csv but a Parquet file")
    refuse(tmp_path, write_bytes(tmp_path / "items.csv.gz", b"item_id,a\n"), "a", "items.csv.gz: cannot be read as csv")
    refuse(tmp_path, write_bytes(tmp_path / "items.csv", b""), "a", "empty; give a table with a row per item")
    refuse(tmp_path, write_bytes(tmp_path / "items.csv", b"item_id,a\n"), "a", "the table is empty")
    refuse(tmp_path, tmp_path / "missing.csv", "a", "--items")


def write_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"item_attributes": ["a"]}, "--item_attributes a: no table of items is named; name it with --items"),
        ({"items": ["x"]}, "--items names a table and no column of it"),
        ({"users": ["x"], "user_attributes": ["a,b,a:text"]}, "--user_attributes names a twice"),
        ({"items": ["x"], "item_attributes": ["a:words"]}, "'words' is no kind; give NAME or NAME:KIND with category"),
        ({"items_key": "x"}, "--items_key x: no table of items is named"),
        ({"catalogue": "items"}, "--catalogue items gives the items of a table ids"),
        ({"items": ["x"], "item_attributes": ["a"], "attribute_buckets": 1}, "--attribute_buckets is 1"),
        ({"items": ["x"], "item_attributes": ["a"], "attribute_separator": "none"}, "--attribute_separator is none"),
        (
            {"items": ["x"], "catalogue": "items", "vocabulary": "y", "new_keys": "leave_out"},
            "--catalogue items adds items, and --new_keys leave_out adds none",
        ),
    ],
)
def test_options_that_do_not_fit_each_other(options, expected):
    with pytest.raises(ValueError) as error:
        make("log.csv", "data", **options)
    assert expected in str(error.value)


def test_a_manifest_whose_attributes_do_not_fit(days):
    first, _ = days
    values = json.loads((first / "manifest.json").read_text())
    values.pop("checksum")
    for place, change, expected in (
        (0, {"values": 3}, "promises 3 values of the item attribute brand"),
        (2, {"edges": [1.0, 1.0]}, "the edges of the item attribute price are not those of"),
        (0, {"missing": -1}, "missing of the item attribute brand is -1"),
        (0, {"values": 0, "parts": []}, "promises no values of the item attribute brand"),
    ):
        changed = json.loads(json.dumps(values))
        changed["attributes"][place] |= change
        with pytest.raises(ValueError, match=expected):
            Manifest.from_values(changed)
