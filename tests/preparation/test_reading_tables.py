"""What is read is what is meant: separators, headers, quotes, histories or tables, conditions, words for clicks."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.errors import InputError
from tests.preparation.prepare_helpers import make, read_sequences
from tests.preparation.test_reading_files import page, put

HEADER = "user_id,item_id,timestamp\n"
BY_PLACE = {"header": False, "user_column": "0", "item_column": "1"}


@pytest.mark.parametrize(
    ("name", "line", "options"),
    [
        ("UserBehavior.csv", "{user},{item},2520,pv,{time}", {"time_column": "4"}),
        ("ratings.dat", "{user}::{item}::5::{time}", {"time_column": "3", "separator": "::"}),
        ("u.data", "{user}\t{item}\t3\t{time}", {"time_column": "3", "input_format": "tsv"}),
        ("clicks.dat", "{user},{item},0,2014-04-07T10:51:0{time}Z", {"time_column": "3"}),
        ("views.csv", "{user};{item};{time}", {"time_column": "2", "separator": "semicolon"}),
        ("views.txt", "{user} {item} {time}", {"time_column": "2", "separator": "space"}),
        ("views.txt", "{user}|{item}|{time}", {"time_column": "2", "separator": "|"}),
    ],
)
def test_files_without_a_header_with_columns_by_place(tmp_path: Path, name: str, line: str, options: Any) -> None:
    rows = [("u", "b", 2), ("u", "a", 1), ("v", "c", 3)]
    text = "".join(line.format(user=user, item=item, time=time) + "\n" for user, item, time in rows)
    make(put(tmp_path / name, text), tmp_path / "data", **BY_PLACE, **options)
    assert read_sequences(tmp_path / "data") == {"u": ["a", "b"], "v": ["c"]}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("1,2268308,2,pv,1511544170\n", "--header false with columns by place"),
        ("1::8::4::978300860\n", "Pass --separator :: and, if it has no header, --header false"),
        ("user_id;item_id;timestamp\nu;a;1\n", "Pass --separator semicolon"),
        ("user_id|item_id|timestamp\nu|a|1\n", "Pass --separator pipe"),
        ("User_ID,item_id,timestamp\nu,a,1\n", "--user_column 'User_ID'"),
        ("user_id,item_id,item_id,timestamp\nu,a,b,1\n", "has 2 columns 'item_id'"),
        ("\nuser_id,item_id,timestamp\nu,a,1\n", "begins with a blank line"),
        ("sep=;\nuser_id;item_id;timestamp\nu;a;1\n", "its first line is 'sep=;' and does not name the columns"),
        ("user_id,item_id,timestamp\n1,u,a,1\n2,u,b,2\n", "its rows have 4 values and its header 3 names"),
        ("user_id;item_id\nu;a\n", "Pass --separator semicolon"),
    ],
)
def test_another_table_than_expected_is_refused_with_the_option(tmp_path: Path, content: str, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        make(put(tmp_path / "log.csv", content), tmp_path / "data")
    assert expected in str(caught.value)


def test_a_first_row_taken_for_names_and_names_taken_for_a_row_are_said(tmp_path: Path) -> None:
    log = put(tmp_path / "log.csv", "1,2268308,1511544170\n2,2268309,1511544171\n")
    text = page(log, tmp_path / "a", user_column="1", item_column="2268308", time_column="1511544170")
    assert "the first line is taken for the names of columns (1, 2268308, 1511544170)" in text
    log = put(tmp_path / "named.csv", HEADER + "u,a,1\n")
    text = page(log, tmp_path / "b", **BY_PLACE, time_column="2")
    assert "the first line looks like names of columns" in text and "1 unreadable time" in text
    log = put(tmp_path / "frame.csv", "0,1,2\nu,a,1\n")  # what pandas writes where columns have no names
    assert "note" not in page(log, tmp_path / "c", user_column="0", item_column="1", time_column="2")


def test_quotes_in_a_tsv_are_characters_unless_asked_for(tmp_path: Path) -> None:
    rows = ['u\t"weird al" yankovic\t1', 'u\t"heroes"\t2', 'v\tremix 12"\t3', 'v\t"x\t4']
    log = put(tmp_path / "log.tsv", "user_id\titem_id\ttimestamp\n" + "\n".join(rows) + "\n")
    text = page(log, tmp_path / "a")
    assert read_sequences(tmp_path / "a") == {"u": ['"weird al" yankovic', '"heroes"'], "v": ['remix 12"', '"x']}
    assert "3 keys of items begin with a quote; if values are quoted, name --quote" in text
    log = put(tmp_path / "quoted.tsv", 'user_id\titem_id\ttimestamp\nu\t"a\tb"\t1\n')
    make(log, tmp_path / "b", quote='"')
    assert read_sequences(tmp_path / "b") == {"u": ["a\tb"]}


def test_lines_inside_quotes_are_said_and_lost_lines_are_counted(tmp_path: Path) -> None:
    titles = ["a", '"b', "c", "d", 'e"', "f"]
    lines = "".join(f"u,i{number},{number},{title}\n" for number, title in enumerate(titles))
    log = put(tmp_path / "log.csv", HEADER.replace("\n", ",title\n") + lines)
    assert "1 rows span several lines" in page(log, tmp_path / "a")
    assert "span" not in page(log, tmp_path / "b", quote="none")
    assert read_sequences(tmp_path / "b") == {"u": [f"i{number}" for number in range(6)]}
    unclosed = put(tmp_path / "unclosed.csv", HEADER + 'u,a,1\nu,"b,2\n' + "".join(f"v,c{k},{k}\n" for k in range(5)))
    result = make(unclosed, tmp_path / "c")
    assert result.manifest.preparation["rows"] == 7
    assert result.manifest.preparation["rejected"] == {"unclosed or stray quote": 6}
    rejected = pq.read_table(tmp_path / "c" / "rejected").to_pylist()
    assert [row["row"] for row in rejected] == [3, 4, 5, 6, 7, 8] and rejected[1]["text"] == "v,c0,0"


def test_a_backslash_before_quotes(tmp_path: Path) -> None:
    log = put(tmp_path / "log.csv", HEADER + 'u,"he said \\"hi, x\\" y",1\nu,b,2\n')
    assert "pass --escape '\\'" in page(log, tmp_path / "a")
    make(log, tmp_path / "b", escape="\\")
    assert read_sequences(tmp_path / "b") == {"u": ['he said "hi, x" y', "b"]}


@pytest.mark.parametrize("separator", ["\t", ",", ";", "|", " "])
def test_a_txt_whose_header_has_the_columns_is_a_table(tmp_path: Path, separator: str) -> None:
    lines = [("who", "what", "when"), ("u", "b", "2"), ("u", "a", "1")]
    log = put(tmp_path / "log.txt", "".join(separator.join(line) + "\n" for line in lines))
    make(log, tmp_path / "data", user_column="who", item_column="what", time_column="when")
    assert read_sequences(tmp_path / "data") == {"u": ["a", "b"]}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("0\t2010-10-19T23:55:27Z\t30.2\t-97.7\t22847\n1\t2010-10-18T22:17:43Z\t30.2\t-97.7\t4209\n", "hold dates"),
        ("1 13 5 978300860\n2 14 1 978300861\n", "value 3 (from 0) is a time in all of them"),
        ("1 30.25 7\n2 31.5 8\n", "value 1 (from 0) is a decimal number"),
        ("1 5 6\n1 7 8\n2 5 9\n", "several begin with the same user"),
        ("".join(f"{n} 5 3 97830076{n % 10}\n" for n in range(30)) + "7 8 9\n", "30 of 31 lines have 4 values"),
        ("1 5 20190101\n2 6 20190102\n", "value 2 (from 0) is a time"),
        ("% bip weighted\n1 1 4\n1 2 4\n", "looks like a comment"),
        ("1,2,3\n2,3,4\n", "its lines hold comma"),
        ('{"user_id": 1}\n', "pass --input_format jsonl"),
    ],
)
def test_rows_of_a_table_are_never_taken_for_histories(tmp_path: Path, content: str, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        make(put(tmp_path / "log.txt", content), tmp_path / "data")
    assert expected in str(caught.value)


def test_histories_of_equal_length_are_histories(tmp_path: Path) -> None:
    make(put(tmp_path / "log.txt", "1 2 3\n2 3 4\n3 4 2\n"), tmp_path / "a")
    assert read_sequences(tmp_path / "a") == {"1": ["2", "3"], "2": ["3", "4"], "3": ["4", "2"]}
    pairs = put(tmp_path / "pairs.txt", "1 5\n1 6\n2 5\n")  # user and item, line by line, in time order
    make(pairs, tmp_path / "b")
    assert read_sequences(tmp_path / "b") == {"1": ["5", "6"], "2": ["5"]}
    odd = put(tmp_path / "odd.txt", "1 5 978300860\n2 6 978300861\n")
    assert "looks like a table and is read as histories, as asked" in page(
        odd, tmp_path / "c", input_format="sequences"
    )


EVENTS = [("u", "a", 1, "view", 9), ("u", "b", 2, "cart", 10), ("u", "c", 3, "view", ""), ("v", "d", 4, "buy", 20)]


def write_events(folder: Path, format: str) -> Path:
    names = ["user_id", "item_id", "timestamp", "event", "price"]
    path = folder / f"events.{format}"
    if format == "csv":
        return put(path, "\n".join([",".join(names), *(",".join(map(str, row)) for row in EVENTS)]) + "\n")
    rows = [dict(zip(names, (*row[:4], row[4] or None), strict=True)) for row in EVENTS]
    if format == "jsonl":
        return put(path, "".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("format", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ("event in ('cart', 'buy')", "bd"),
        ("price >= 10", "bd"),
        ("price >= 10 and event <> 'buy' or timestamp = 1", "ab"),
        ("price between 9 and 10", "ab"),
        ("price / 2 < 10 and not event = 'cart'", "a"),
        ("lower(user_id) like 'U%' or upper(event) = 'BUY'", "d"),
        ("price is null", "c"),
    ],
)
def test_where(tmp_path: Path, format: str, where: str, kept: str) -> None:
    result = make(write_events(tmp_path, format), tmp_path / "data", where=where)
    assert sorted(item for items in read_sequences(tmp_path / "data").values() for item in items) == [*kept]
    assert result.manifest.preparation["rows"] == 4
    assert result.manifest.preparation["filtered"] == 4 - len(kept)
    assert result.manifest.preparation["rejected"] == {}


@settings(max_examples=8, deadline=None)
@given(
    threshold=st.integers(-3, 12),
    prices=st.lists(st.one_of(st.integers(-2, 11), st.just("x")), min_size=1, max_size=30),
)
def test_where_against_plain_python(
    tmp_path_factory: pytest.TempPathFactory, threshold: int, prices: list[Any]
) -> None:
    folder = tmp_path_factory.mktemp("where")
    lines = "".join(f"u,i{number},{number},{price}\n" for number, price in enumerate(prices))
    log = put(folder / "log.csv", "user_id,item_id,timestamp,price\n" + lines)
    expected = [f"i{number}" for number, price in enumerate(prices) if price != "x" and price > threshold]
    if not expected:
        with pytest.raises(InputError, match="none of the"):
            make(log, folder / "data", where=f"price > {threshold}")
        return
    result = make(log, folder / "data", where=f"price > {threshold}")
    assert read_sequences(folder / "data") == {"u": expected}
    assert result.manifest.preparation.get("uncomputed", 0) == prices.count("x")


@pytest.mark.parametrize("format", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ("number = 9007199254740993", [1]),
        ("number in (9007199254740993, 5)", [1]),
        ("number <> 9007199254740993", [0, 2]),
        ("number > 9007199254740992", [1, 2]),
    ],
)
def test_conditions_tell_whole_numbers_beyond_2_to_the_53_apart(
    tmp_path: Path, format: str, where: str, kept: list[int]
) -> None:
    numbers = [2**53 + n for n in range(3)]
    rows = [{"user_id": "u", "item_id": f"i{n}", "timestamp": n, "number": number} for n, number in enumerate(numbers)]
    path = tmp_path / f"log.{format}"
    if format == "csv":
        put(path, HEADER.replace("\n", ",number\n") + "".join(",".join(map(str, row.values())) + "\n" for row in rows))
    elif format == "jsonl":
        put(path, "".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    make(path, tmp_path / "data", where=where)
    assert read_sequences(tmp_path / "data") == {"u": [f"i{n}" for n in kept]}


def test_two_columns_of_text_are_compared_as_numbers_where_both_are(tmp_path: Path) -> None:
    lines = [
        "u,a,1,9,10,2019-01-02,2019-01-01",
        "u,b,2,10.4,9,2018-01-02,2019-01-01",
        "u,c,3,100,20,2019-01-02,2020-01-01",
    ]
    log = put(tmp_path / "log.csv", "user_id,item_id,timestamp,price,cost,since,until\n" + "\n".join(lines) + "\n")
    for where, kept in (
        ("price > cost", "bc"),
        ("price <= cost", "a"),
        ("since > until", "a"),
        ("not price > cost", "a"),
    ):
        make(log, tmp_path / where.replace(" ", ""), where=where)
        assert read_sequences(tmp_path / where.replace(" ", "")) == {"u": [*kept]}


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("prize > 1", "has no column 'prize'"),
        ("price > (select 1)", "is no condition on a row"),
        ("price in (select content from read_text('/etc/hostname'))", "is no condition on a row"),
        ("price > 1; drop table log_rows", "cannot be read"),
        ("price > 1) or (1 = 1", "cannot be read"),
        ("count(*) > 1", "is no condition on a row"),
        ("nonsense(price)", "nonsense"),
        ("1 = 1", "names no column"),
        ("price > 1000", "none of the 4 rows can be used"),
    ],
)
def test_a_condition_that_is_none_is_refused(tmp_path: Path, where: str, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        make(write_events(tmp_path, "csv"), tmp_path / "data", where=where)
    assert expected in str(caught.value)


@pytest.mark.parametrize("format", ["csv", "jsonl", "parquet"])
def test_clicks_by_words(tmp_path: Path, format: str) -> None:
    log = write_events(tmp_path, format)
    result = make(log, tmp_path / "data", click_column="event", click_values=["buy,cart"])
    assert read_sequences(tmp_path / "data") == {"u": ["b"], "v": ["d"]}
    assert result.manifest.preparation["exposed"]["rows"] == 2
    with pytest.raises(
        InputError, match=r"no row has 'Buy' in event, whose values are view \(2\), buy \(1\), cart \(1\)"
    ):
        make(log, tmp_path / "other", click_column="event", click_values=["Buy", "cart"])
    with pytest.raises(InputError, match="are all values of event"):
        make(log, tmp_path / "other", click_column="event", click_values=["buy", "cart", "view"])
    with pytest.raises(InputError, match="for words in event pass --click_values"):
        make(log, tmp_path / "other", click_column="event")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"click_values": ["buy"]}, "--click_values says"),
        ({"click_values": ["buy"], "click_column": "e", "click_from": 3}, "--click_values is for words"),
        ({"separator": "none"}, "--separator is none"),
        ({"separator": "12345"}, "--separator is '12345'"),
        ({"quote": "ab"}, "--quote is 'ab'"),
        ({"encoding": "utf-99"}, "--encoding is utf-99"),
        ({"time_format": "iso"}, "--time_format is iso"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Prepare(input=["x"], output="y", **options)


def collapsed(items: list[str]) -> list[str]:
    return [item for place, item in enumerate(items) if not place or item != items[place - 1]]


@settings(max_examples=7, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("uvwxyz"), st.sampled_from("ab")), min_size=1, max_size=60))
def test_repeats_are_collapsed(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]) -> None:
    folder = tmp_path_factory.mktemp("repeats")
    lines = "".join(f"{user},{item},{time}\n" for time, (user, item) in enumerate(rows))
    result = make(put(folder / "log.csv", HEADER + lines), folder / "data", repeats="collapse")
    expected = {user: collapsed([item for who, item in rows if who == user]) for user, _ in rows}
    assert read_sequences(folder / "data") == expected
    dropped = len(rows) - sum(map(len, expected.values()))
    assert result.manifest.preparation["repeats_collapsed"] == dropped
