"""What is read is what is meant: one spelling for a key, missing values, types, times, lists in a column, JSON."""

import datetime
import decimal
import json
import math
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.reading.times import suggest_formats
from tests.preparation.prepare_helpers import make, read_keys, read_sequences
from tests.preparation.test_reading_files import page, put

HEADER = "user_id,item_id,timestamp\n"
NAN = float("nan")


def parquet(path: Path, **columns: Any) -> Path:
    values = {
        name: value if isinstance(value, pa.Array | pa.ExtensionArray) else pa.array(value)
        for name, value in columns.items()
    }
    pq.write_table(pa.table(values), path)
    return path


# ---------------------------------------------------------------------------------------------------------------- keys


def write_numbers(folder: Path, format: str, users: list[float | None]) -> Path:
    """A log as pandas writes it whose users are floats, because some are missing."""
    path = folder / f"log.{format}"
    if format == "csv":
        return put(path, HEADER + "".join(f"{'' if u is None else u},7,{time}\n" for time, u in enumerate(users)))
    if format == "jsonl":
        rows = [{"user_id": NAN if u is None else u, "item_id": 7, "timestamp": t} for t, u in enumerate(users)]
        return put(path, "".join(json.dumps(row) + "\n" for row in rows))
    column = pa.array([NAN if u is None else u for u in users], pa.float64())
    return parquet(path, user_id=column, item_id=[7] * len(users), timestamp=range(len(users)))


@settings(max_examples=6, deadline=None)
@given(
    st.lists(
        st.one_of(st.none(), st.integers(-5, 2**53 - 1).map(float), st.sampled_from([0.5, -2.25])),
        min_size=1,
        max_size=24,
    )
)
def test_a_key_has_one_spelling_in_every_format(
    tmp_path_factory: pytest.TempPathFactory, users: list[float | None]
) -> None:
    expected = sorted({str(int(u)) if u == int(u) else str(u) for u in users if u is not None})
    folder = tmp_path_factory.mktemp("keys")
    for format in ("csv", "jsonl", "parquet"):
        log = write_numbers(folder, format, users)
        if not expected:
            with pytest.raises(InputError, match="none of the"):
                make(log, folder / format)
            continue
        result = make(log, folder / format)
        assert sorted(read_keys(folder / format, "users", "user_id")) == expected
        assert sum(result.manifest.preparation["rejected"].values()) == users.count(None)


@pytest.mark.parametrize("word", ["NA", "NULL", "null", "\\N", "nan", "NaN", "None", "<NA>", "#N/A"])
def test_words_for_a_missing_value_are_no_key(tmp_path: Path, word: str) -> None:
    log = put(tmp_path / "log.csv", HEADER + f"{word},a,1\nu,{word},2\nu,b,{word}\nu,c,4\n")
    text = page(log, tmp_path / "data")
    assert read_sequences(tmp_path / "data") == {"u": ["c"]}
    assert f"1 no user ({word})" in text and f"1 no item ({word})" in text and "1 no time" in text
    assert "give other --null_words, [] for none" in text
    log = put(tmp_path / "kept.csv", HEADER + f"{word},a,1\n")
    make(log, tmp_path / "kept", null_words=[])
    assert read_sequences(tmp_path / "kept") == {word: ["a"]}
    zero = put(tmp_path / "zero.csv", HEADER + "0,a,1\n00,b,2\n")
    make(zero, tmp_path / "zero", null_words=["0"])
    assert read_sequences(tmp_path / "zero") == {"00": ["b"]}


def test_readings_that_are_lenient_are_said(tmp_path: Path) -> None:
    log = put(tmp_path / "log.csv", "user_id,item_id,timestamp,stars\n12.0,a,1,x\n12, b,2,\n13,c,3,4\n")
    text = page(log, tmp_path / "data", rating_column="stars")
    assert "1 rows have keys written like 12.0" in text
    assert "1 ratings are no numbers and were left empty (--rating_column stars)" in text
    assert "1 keys of items begin or end with a blank" in text
    assert read_sequences(tmp_path / "data") == {"12": ["a", " b"], "13": ["c"]}
    big = parquet(tmp_path / "log.parquet", user_id=[1e19, 1.0], item_id=["a", "b"], timestamp=[1, 2])
    assert "1 rows have keys in floating point beyond the whole numbers" in page(big, tmp_path / "big")
    assert read_sequences(tmp_path / "big") == {"1e+19": ["a"], "1": ["b"]}


@pytest.mark.parametrize("format", ["csv", "jsonl", "parquet"])
def test_null_words_that_are_numbers_hold_for_every_type(tmp_path: Path, format: str) -> None:
    users, items, times = [0, 5, 5, 5], [1, -1, 2, 3], [1, 2, -1, 4]
    path = tmp_path / f"log.{format}"
    if format == "csv":
        put(path, HEADER + "".join(f"{u},{i},{t}\n" for u, i, t in zip(users, items, times, strict=True)))
    elif format == "jsonl":
        rows = zip(users, items, times, strict=True)
        put(path, "".join(json.dumps({"user_id": u, "item_id": i, "timestamp": t}) + "\n" for u, i, t in rows))
    else:
        parquet(path, user_id=pa.array(users, pa.float64()), item_id=items, timestamp=times)
    result = make(path, tmp_path / "data", null_words=["0", "-1"])
    assert read_sequences(tmp_path / "data") == {"5": ["3"]}
    reasons = {reason.partition(" (")[0]: n for reason, n in result.manifest.preparation["rejected"].items()}
    assert reasons == {"no user": 1, "no item": 1, "no time": 1}


def test_keys_of_histories_follow_the_same_rules(tmp_path: Path) -> None:
    log = put(tmp_path / "log.txt", "12.0 5.0 6 7 NaN\n12 5 6\nNULL 1 2\n\nx\n")
    result = make(log, tmp_path / "data")
    assert read_sequences(tmp_path / "data") == {"12": ["5", "6", "7", "5", "6"]}
    assert result.manifest.preparation["rejected"] == {"no item": 1, "no item (NaN)": 1, "no user (NULL)": 2}


# --------------------------------------------------------------------------------------------------------------- types

UUID = uuid.UUID(int=2**127 + 5)
KEYS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "uuid": (lambda: pa.ExtensionArray.from_storage(pa.uuid(), pa.array([UUID.bytes] * 2, pa.binary(16))), [str(UUID)]),
    "dictionary": (lambda: pa.array(["x", "y"]).dictionary_encode(), ["x", "y"]),
    "large_string": (lambda: pa.array(["x", "y"], pa.large_string()), ["x", "y"]),
    "string_view": (lambda: pa.array(["x", "y"], pa.string_view()), ["x", "y"]),
    "binary": (lambda: pa.array([b"x", b"\xc3\xa9"]), ["x", "é"]),
    "uint64": (lambda: pa.array([2**63 + 5, 1], pa.uint64()), ["1", str(2**63 + 5)]),
    "decimal": (lambda: pa.array([decimal.Decimal("12.00"), decimal.Decimal("13.50")]), ["12", "13.50"]),
    "float32": (lambda: pa.array([12, 1.5], pa.float32()), ["1.5", "12"]),
}


@pytest.mark.parametrize("name", KEYS)
def test_types_that_a_key_may_have(tmp_path: Path, name: str) -> None:
    log = parquet(tmp_path / "log.parquet", user_id=KEYS[name][0](), item_id=["a", "b"], timestamp=[1, 2])
    make(log, tmp_path / "data")
    assert sorted(read_keys(tmp_path / "data", "users", "user_id")) == KEYS[name][1]


NO_KEYS: dict[str, Callable[[], Any]] = {
    "bool": lambda: pa.array([True, False]),
    "date32": lambda: pa.array([datetime.date(2020, 1, 1)] * 2),
    "timestamp": lambda: pa.array([datetime.datetime(2020, 1, 1)] * 2),
    "struct": lambda: pa.array([{"a": 1}] * 2),
    "map": lambda: pa.array([[("a", 1)]] * 2, pa.map_(pa.string(), pa.int64())),
    "duration": lambda: pa.array([1, 2], pa.duration("s")),
    "time32": lambda: pa.array([1, 2], pa.time32("s")),
    "halffloat": lambda: pa.array(np.array([1, 2], np.float16)),
    "decimal256": lambda: pa.array([decimal.Decimal(12)] * 2, pa.decimal256(50, 0)),
    "fixed_size_binary": lambda: pa.array([UUID.bytes] * 2, pa.binary(16)),
    "arrow.json": lambda: pa.array(["{}"] * 2, pa.json_()),
}


@pytest.mark.parametrize("name", NO_KEYS)
def test_types_that_are_no_key_end_in_a_sentence(tmp_path: Path, name: str) -> None:
    log = parquet(tmp_path / "log.parquet", user_id=NO_KEYS[name](), item_id=["a", "b"], timestamp=[1, 2])
    with pytest.raises(InputError, match=f"column 'user_id' holds .*{name}.*, and the user must be .*--user_column"):
        make(log, tmp_path / "data")
    harmless = parquet(
        tmp_path / "other.parquet", extra=NO_KEYS[name](), user_id=["u", "u"], item_id=["a", "b"], timestamp=[1, 2]
    )
    make(harmless, tmp_path / "other")
    assert read_sequences(tmp_path / "other") == {"u": ["a", "b"]}


def test_columns_of_parquet_are_told_by_their_exact_name(tmp_path: Path) -> None:
    log = parquet(tmp_path / "log.parquet", USER_ID=["A"], user_id=["b"], User_id=["C"], item_id=["x"], timestamp=[1])
    for column, key in (("USER_ID", "A"), ("user_id", "b"), ("User_id", "C")):
        make(log, tmp_path / column, user_column=column)
        assert read_sequences(tmp_path / column) == {key: ["x"]}
    make(log, tmp_path / "where", where="\"User_id\" = 'C' and \"USER_ID\" = 'A'")
    with pytest.raises(InputError, match="none of the"):
        make(log, tmp_path / "none", where="\"User_id\" = 'b'")


# --------------------------------------------------------------------------------------------------------------- times


@pytest.mark.parametrize("missing", [NAN, math.inf, -math.inf, None, 1e300])
def test_one_time_that_is_none_costs_one_row(tmp_path: Path, missing: float | None) -> None:
    times = pa.array([missing, 1593878903.438, 1593878903.25], pa.float64())
    result = make(
        parquet(tmp_path / "log.parquet", user_id=["u"] * 3, item_id=["a", "b", "c"], timestamp=times),
        tmp_path / "data",
    )
    assert read_sequences(tmp_path / "data") == {"u": ["c", "b"]}
    reason = "no time" if missing is None or math.isnan(missing) else "unreadable time"
    assert result.manifest.preparation["rejected"] == {reason: 1}


@pytest.mark.parametrize(
    ("times", "format"),
    [
        (["31-12-18", "15-01-19", "02-02-19"], "%d-%m-%y"),
        (["31-12-2018", "15-01-2019", "02-02-2019"], "%d-%m-%Y"),
        (["12/31/2018 11:05:58 PM", "1/15/2019 9:05:58 AM", "2/2/2019 9:05:58 AM"], "%m/%d/%Y %I:%M:%S %p"),
        (["31/12/2018 08:26", "15/01/2019 08:26", "02/02/2019 08:26"], "%d/%m/%Y %H:%M"),
        (
            ["Mon Dec 31 18:00:09 +0000 2018", "Tue Jan 15 18:00:09 +0000 2019", "Sat Feb 02 18:00:09 +0000 2019"],
            "%a %b %d %H:%M:%S %z %Y",
        ),
        (["2018/12/31", "2019/01/15", "2019/02/02"], "%Y/%m/%d"),
        (["31.12.2018", "15.01.2019", "02.02.2019"], "%d.%m.%Y"),
    ],
)
def test_other_forms_of_times_are_refused_with_their_format_and_read_with_it(
    tmp_path: Path, times: list[str], format: str
) -> None:
    lines = "".join(f"u,{item},{time}\n" for item, time in zip("abc", times, strict=True))
    log = put(tmp_path / "log.csv", HEADER + lines)
    with pytest.raises(InputError) as caught:
        make(log, tmp_path / "data")
    assert "3 unreadable time" in str(caught.value) and f"--time_format '{format}'" in str(caught.value)
    make(log, tmp_path / "data", time_format=format)
    assert read_sequences(tmp_path / "data") == {"u": ["a", "b", "c"]}
    expected = [datetime.datetime.strptime(time, format).replace(tzinfo=datetime.UTC).timestamp() for time in times]
    assert read_sequences(tmp_path / "data", "timestamps") == {"u": [int(time) for time in expected]}


@pytest.mark.parametrize(
    "time", ["31-12-18", "201-01-01", "12019-01-01", "05-11-2019", "2019-13-01", "0000-00-00", "tomorrow"]
)
def test_a_year_has_four_digits(tmp_path: Path, time: str) -> None:
    log = put(tmp_path / "log.csv", HEADER + f"u,a,{time}\nu,b,2019-01-01\n")
    assert make(log, tmp_path / "data").manifest.preparation["rejected"] == {"unreadable time": 1}


def test_a_day_that_may_be_a_month_is_not_guessed(tmp_path: Path) -> None:
    assert suggest_formats(["05/11/2019", "06/11/2019"]) == ["%d/%m/%Y", "%m/%d/%Y"]
    assert suggest_formats(["05/11/2019", "31/12/2019"]) == ["%d/%m/%Y"]
    log = put(tmp_path / "log.csv", HEADER + "u,a,05/11/2019\n")
    with pytest.raises(InputError, match="the log does not tell which of them is meant"):
        make(log, tmp_path / "data")
    with pytest.raises(InputError, match="--time_format '%Q': "):
        make(log, tmp_path / "data", time_format="%Q")


def test_the_range_of_times_and_mixtures_are_said(tmp_path: Path) -> None:
    log = put(tmp_path / "log.csv", HEADER + "u,a,2019-10-01T00:00:00Z\nu,b,1569888001\n")
    text = page(log, tmp_path / "a")
    assert "1 times are date-times, kept as seconds since 1970, and 1 are numbers" in text
    log = put(tmp_path / "units.csv", HEADER + "u,a,1569888000\nu,b,1569888000000\n")
    assert "times look like 1 seconds and 1 milliseconds since 1970" in page(log, tmp_path / "b")
    log = put(tmp_path / "dates.csv", HEADER + "u,a,2019-10-01\nu,b,2020-10-01 10:00\n")
    assert "2019-10-01 00:00:00 to 2020-10-01 10:00:00 UTC, kept as seconds since 1970" in page(log, tmp_path / "c")
    log = put(tmp_path / "ms.csv", HEADER + "u,a,1569888000000\nu,b,1569888001000\n")
    assert "(as milliseconds since 1970: 2019-10-01 00:00:00 to 2019-10-01 00:00:01 UTC)" in page(log, tmp_path / "d")


def test_a_format_with_a_year_of_four_digits_takes_no_other(tmp_path: Path) -> None:
    log = put(tmp_path / "log.csv", HEADER + "u,a,1/2/19\nu,b,1/3/2019\n")
    result = make(log, tmp_path / "data", time_format="%m/%d/%Y")
    assert result.manifest.preparation["rejected"] == {"unreadable time": 1}
    assert read_sequences(tmp_path / "data") == {"u": ["b"]}


def test_a_few_times_of_another_unit_are_said(tmp_path: Path) -> None:
    lines = "".join(f"u,i{n},{1569888000 + n}\n" for n in range(3000))
    log = put(tmp_path / "log.csv", HEADER + lines + "u,z,1569888000000\n")
    assert "times look like 3,000 seconds and 1 milliseconds" in page(log, tmp_path / "data")


@pytest.mark.parametrize(("unit", "beyond"), [("s", 2**52), ("ms", 2**60)])
def test_a_timestamp_beyond_all_years_costs_one_row(tmp_path: Path, unit: str, beyond: int) -> None:
    times = pa.array([beyond, 1_000_000, 2_000_000], pa.timestamp(unit))
    log = parquet(tmp_path / "log.parquet", user_id=["u"] * 3, item_id=["a", "b", "c"], timestamp=times)
    text = page(log, tmp_path / "data")
    assert "1 times beyond the year 9999 were taken for none" in text
    assert read_sequences(tmp_path / "data") == {"u": ["b", "c"]}


# ---------------------------------------------------------------------------------------------------------------- JSON


def test_keys_of_json_are_told_by_their_exact_name_and_nested_ones_by_dots(tmp_path: Path) -> None:
    rows = [{"us/er~": "x", "i\"t'm": 7, "timestamp": 1, "a": {"b": {"$oid": "y"}}, "a.c": "z"}]
    log = put(tmp_path / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for column, key in (("us/er~", "x"), ("a.b.$oid", "y"), ("a.c", "z")):
        make(log, tmp_path / key, user_column=column, item_column="i\"t'm")
        assert read_sequences(tmp_path / key) == {key: ["7"]}
    with pytest.raises(InputError, match=r"'a' for the user is an object.*--user_column 'a\.b'"):
        make(log, tmp_path / "other", user_column="a", item_column="i\"t'm")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{u'user_id': 'a'}\n", "a literal of Python, not JSON"),
        ('{"user_id": 1, "item_id": [{"id": 5}], "timestamp": 1}\n', "--item_column 'item_id.id'"),
        ('[{"user_id": 1}]\n', "jq -c '.[]'"),
        ('{\n "user_id": 1\n}\n', "not a whole object"),
    ],
)
def test_json_that_is_no_lines_of_objects(tmp_path: Path, content: str, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        make(put(tmp_path / "log.json", content), tmp_path / "data")
    assert expected in str(caught.value)


def test_a_list_or_an_object_among_single_values_is_set_aside(tmp_path: Path) -> None:
    row = '{"user_id": "u", "item_id": %s, "timestamp": 1}\n'
    content = (row % '"a"') * 1500 + row % '["b", "c"]' + row % '{"d": 1}' + row % '"[e]"'  # beyond what is looked at
    result = make(put(tmp_path / "log.jsonl", content), tmp_path / "data")
    assert result.manifest.preparation["rejected"] == {"list or object for the item": 2}
    assert sorted(read_keys(tmp_path / "data", "items", "item_id")) == ["[e]", "a"]
