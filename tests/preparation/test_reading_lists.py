"""What is read is what is meant: histories as lists in a column, of Parquet, of JSON, and in any text."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recgpt_torchrec.errors import InputError
from tests.preparation.prepare_helpers import make, read_keys, read_sequences
from tests.preparation.test_reading_files import page, put
from tests.preparation.test_reading_values import HEADER, parquet

HISTORIES = {"u": (["b", "a", "c"], [20, 10, 30]), "v": (["d"], [5]), "w": (["a", "e"], [1, 2])}
SORTED = {"u": ["a", "b", "c"], "v": ["d"], "w": ["a", "e"]}


def write_lists(folder: Path, format: str) -> Path:
    rows = [{"user_id": user, "item_id": items, "timestamp": times} for user, (items, times) in HISTORIES.items()]
    path = folder / f"lists.{format}"
    if format == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    if format == "jsonl":
        return put(path, "".join(json.dumps(row) + "\n" for row in rows))
    joined = [(row["user_id"], *(",".join(map(str, row[name])) for name in ("item_id", "timestamp"))) for row in rows]
    if format == "csv":
        return put(path, HEADER + "".join(f'{user},"{items}","{times}"\n' for user, items, times in joined))
    lines = "".join(f"{user}\t{items}\t{times}\n".replace(",", " ") for user, items, times in joined)
    return put(path, "user_id:token\titem_id:token_seq\ttimestamp:float_seq\n" + lines)


@pytest.mark.parametrize("format", ["parquet", "jsonl", "csv", "inter"])
@pytest.mark.parametrize("timed", [True, False])
def test_lists_in_a_column_are_histories(tmp_path: Path, format: str, timed: bool) -> None:
    options: dict[str, Any] = {"list_separator": ","} if format == "csv" else {}
    options |= {} if timed else {"time_column": None}
    text = page(write_lists(tmp_path, format), tmp_path / "data", **options)
    assert read_sequences(tmp_path / "data") == (
        SORTED if timed else {user: items for user, (items, _) in HISTORIES.items()}
    )
    assert "3 rows hold lists, 6 entries in all" in text


def test_what_seems_to_be_a_list_is_never_taken_for_one_item(tmp_path: Path) -> None:
    log = write_lists(tmp_path, "csv")
    with pytest.raises(InputError, match="column 'item_id' for the item seems to hold lists, such as 'b,a,c'"):
        make(log, tmp_path / "data", time_column=None)
    make(log, tmp_path / "kept", time_column=None, list_separator="none")
    assert read_sequences(tmp_path / "kept") == {"u": ["b,a,c"], "v": ["d"], "w": ["a,e"]}
    brackets = put(tmp_path / "brackets.csv", "user_id,item_id,timestamp\nu,\"['a', 'b']\",\"[2, 1]\"\nv,[],[]\n")
    result = make(brackets, tmp_path / "brackets", list_separator=",")
    assert read_sequences(tmp_path / "brackets") == {"u": ["b", "a"]}
    assert result.manifest.preparation["rejected"] == {"no item": 1}


def test_lists_that_do_not_fit_are_set_aside_with_their_row(tmp_path: Path) -> None:
    rows = [
        {"user_id": "u", "item_id": ["a", "b"], "timestamp": [1, 2]},
        {"user_id": "u", "item_id": ["c", "d"], "timestamp": [3]},
        {"user_id": "u", "item_id": [], "timestamp": []},
        {"user_id": "u", "item_id": ["e", None], "timestamp": [4, 5]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "log.parquet")
    result = make(tmp_path / "log.parquet", tmp_path / "data")
    assert read_sequences(tmp_path / "data") == {"u": ["a", "b", "e"]}
    assert result.manifest.preparation["rejected"] == {"lists of different lengths": 1, "no item": 2}
    rejected = pq.read_table(tmp_path / "data" / "rejected").to_pylist()
    assert [(row["row"], row["reason"]) for row in rejected] == [
        (2, "lists of different lengths"),
        (3, "no item"),
        (4, "no item"),
    ]
    one_time = parquet(tmp_path / "one.parquet", user_id=["u", "u"], item_id=[["a", "b"], ["c"]], timestamp=[2, 1])
    make(one_time, tmp_path / "one")
    assert read_sequences(tmp_path / "one") == {"u": ["c", "a", "b"]}
    wrong = parquet(tmp_path / "wrong.parquet", user_id=["u"], item_id=["a"], timestamp=[[1, 2]])
    with pytest.raises(InputError, match="the time is a list and the item is not"):
        make(wrong, tmp_path / "wrong")


def test_one_time_stands_for_all_items_of_a_list(tmp_path: Path) -> None:
    log = put(tmp_path / "log.csv", HEADER + 'u,"b,a",5\nu,"c",4\n')
    make(log, tmp_path / "csv", list_separator=",")
    assert read_sequences(tmp_path / "csv") == {"u": ["c", "b", "a"]}
    rows = [{"user_id": "u", "item_id": ["b", "a"], "timestamp": 5}, {"user_id": "u", "item_id": "c", "timestamp": 4}]
    make(put(tmp_path / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows)), tmp_path / "json")
    assert read_sequences(tmp_path / "json") == {"u": ["c", "b", "a"]}


@pytest.mark.parametrize(
    ("value", "separator"),
    [
        ("N55189 N42782 N34694", "space"),
        ("[1 2 3]", "space"),
        ("[1, 2, 3]", "comma"),
        ("1|2|3", "pipe"),
        ("{1,2}", "comma"),
    ],
)
@pytest.mark.parametrize("format", ["tsv", "parquet", "jsonl"])
def test_text_that_seems_to_be_a_list_is_refused_and_the_option_it_names_reads_it(
    tmp_path: Path, format: str, value: str, separator: str
) -> None:
    path = tmp_path / f"log.{format}"
    if format == "tsv":
        put(path, f"user_id\titem_id\ttimestamp\nu\t{value}\t1\n")
    elif format == "parquet":
        parquet(path, user_id=["u"], item_id=[value], timestamp=[1])
    else:
        put(path, json.dumps({"user_id": "u", "item_id": value, "timestamp": 1}) + "\n")
    with pytest.raises(InputError, match=f"seems to hold lists.*--list_separator {separator} "):
        make(path, tmp_path / "data")
    make(path, tmp_path / "data", list_separator=separator)
    words = value.strip("[]{}")
    for mark in ",|":
        words = words.replace(mark, " ")
    assert read_sequences(tmp_path / "data") == {"u": words.split()}


@pytest.mark.parametrize("name", ["sigur ros", "Portland, OR", "weird al yankovic", "Milk, 1 l", "blink 182", "7-Up"])
def test_names_of_several_words_are_no_lists(tmp_path: Path, name: str) -> None:
    log = put(tmp_path / "log.tsv", f"user_id\titem_id\ttimestamp\nu\t{name}\t1\n")
    make(log, tmp_path / "data")
    assert read_sequences(tmp_path / "data") == {"u": [name]}


def test_brackets_of_names_stay_and_what_cannot_be_split_is_set_aside(tmp_path: Path) -> None:
    titles = put(tmp_path / "titles.csv", HEADER + "u,Toy Story (1995)|Heat (1995),1\nv,(500) Days|Up,2\nw,(demo),3\n")
    make(titles, tmp_path / "titles", list_separator="|")
    assert read_sequences(tmp_path / "titles") == {
        "u": ["Toy Story (1995)", "Heat (1995)"],
        "v": ["(500) Days", "Up"],
        "w": ["(demo)"],
    }
    rows = ["[[1,2],[3]]", "[(1,5),(2,6)]", "['a,b', 'c']", "(1, 2)", "[]"]
    nested = put(tmp_path / "nested.csv", HEADER + "".join(f'u{n},"{row}",1\n' for n, row in enumerate(rows)))
    result = make(nested, tmp_path / "nested", list_separator=",")
    assert read_sequences(tmp_path / "nested") == {"u3": ["1", "2"]}
    assert result.manifest.preparation["rejected"] == {"list with brackets or quotes inside": 3, "no item": 1}
    rejected = pq.read_table(tmp_path / "nested" / "rejected").to_pylist()
    assert [row["row"] for row in rejected] == [2, 3, 4, 6]  # lines of the file


def test_lists_that_begin_late_are_said(tmp_path: Path) -> None:
    log = put(tmp_path / "log.csv", HEADER + "".join(f"u,i{n},{n}\n" for n in range(1200)) + 'u,"[1,0]",9999\n')
    assert "1 keys of items look like lists; if they are, name --list_separator" in page(log, tmp_path / "data")


def test_a_list_of_objects_by_a_name_in_it(tmp_path: Path) -> None:
    tracks = [{"uri": "a", "at": 5}, {"uri": "b", "at": 4}]
    log = put(tmp_path / "log.jsonl", json.dumps({"user_id": 1, "tracks": tracks}) + "\n")
    with pytest.raises(InputError, match="Name a value in it: --item_column 'tracks.uri'"):
        make(log, tmp_path / "data", item_column="tracks", time_column=None)
    make(log, tmp_path / "data", item_column="tracks.uri", time_column="tracks.at")
    assert read_sequences(tmp_path / "data") == {"1": ["b", "a"]}


def test_a_list_in_a_list_is_no_item(tmp_path: Path) -> None:
    row = '{"user_id": "u", "item_id": %s, "timestamp": 1}\n'
    with pytest.raises(InputError, match="is a list of lists"):
        make(put(tmp_path / "log.jsonl", row % "[[1, 2], [3]]"), tmp_path / "data")
    late = put(tmp_path / "late.jsonl", (row % "[1]") * 1100 + row % '[{"id": 5}, [7]]')
    result = make(late, tmp_path / "late")
    assert result.manifest.preparation["rejected"] == {"list or object in the list for the item": 1}
    assert read_keys(tmp_path / "late", "items", "item_id") == ["1"]
