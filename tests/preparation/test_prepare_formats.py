"""Every raw format, and the rows of it that cannot be used."""

import datetime
import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import ibis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recgpt_torchrec.preparation import queries
from recgpt_torchrec.preparation.reading.rows import RowOptions, steps
from tests.preparation.prepare_helpers import Row, in_time_order, make, random_log, read_sequences, write_csv

ROWS = random_log(80, users=7, items=9)


def write_jsonl(path: Path, rows: list[Row]) -> Path:
    lines = [json.dumps({"user_id": user, "item_id": item, "timestamp": time}) for user, item, time in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_parquet(path: Path, rows: list[Row]) -> Path:
    users, items, times = zip(*rows, strict=True)
    pq.write_table(pa.table({"user_id": users, "item_id": items, "timestamp": times}), path)
    return path


def write_recbole(path: Path, rows: list[Row]) -> Path:
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    path.write_text("\n".join(lines + [f"{user}\t{item}\t3\t{time}" for user, item, time in rows]) + "\n")
    return path


def write_tsv(path: Path, rows: list[Row]) -> Path:
    return write_csv(path, rows, delimiter="\t")


WRITERS = {"csv": write_csv, "tsv": write_tsv, "jsonl": write_jsonl, "parquet": write_parquet, "inter": write_recbole}


@pytest.mark.parametrize("ending", WRITERS)
def test_every_format_with_times_gives_the_same_dataset(tmp_path: Path, ending: str) -> None:
    make(WRITERS[ending](tmp_path / f"log.{ending}", ROWS), tmp_path / "data")
    assert read_sequences(tmp_path / "data") == in_time_order(ROWS)


@pytest.mark.parametrize(("ending", "separator"), [("csv", ","), ("tsv", "\t")])
def test_recbole_headers_are_read_in_any_table(tmp_path: Path, ending: str, separator: str) -> None:
    text = write_recbole(tmp_path / "log.inter", ROWS).read_text().replace("\t", separator)
    (tmp_path / f"log.{ending}").write_text(text)
    result = make(tmp_path / f"log.{ending}", tmp_path / "data")
    assert read_sequences(tmp_path / "data") == in_time_order(ROWS)
    assert any("RecBole's header" in words for _, words in result.manifest.preparation["page"])
    (tmp_path / "own.csv").write_text("user_id:token,item_id:token\nu,b\nu,a\n")
    columns = {"user_column": "user_id:token", "item_column": "item_id:token", "time_column": None}
    make(tmp_path / "own.csv", tmp_path / "own", **columns)  # names that are given hold as they are
    assert read_sequences(tmp_path / "own") == {"u": ["b", "a"]}


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "inter"])
def test_text_formats_may_be_gzipped(tmp_path: Path, ending: str) -> None:
    plain = WRITERS[ending](tmp_path / f"log.{ending}", ROWS)
    (tmp_path / f"log.{ending}.gz").write_bytes(gzip.compress(plain.read_bytes()))
    make(tmp_path / f"log.{ending}.gz", tmp_path / "data")
    assert read_sequences(tmp_path / "data") == in_time_order(ROWS)


def test_sequences_keep_their_order_and_have_no_times(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("u1 a b  a\n\nu2\tc\r\nu3 d\nu1 e\n")
    make(tmp_path / "log.txt", tmp_path / "data")
    assert read_sequences(tmp_path / "data") == {"u1": ["a", "b", "a", "e"], "u2": ["c"], "u3": ["d"]}
    assert "timestamps" not in pq.read_schema(tmp_path / "data" / "sequences" / "part-00000.parquet").names


def test_without_a_time_column_rows_are_in_order(tmp_path: Path) -> None:
    make(write_csv(tmp_path / "log.csv", ROWS), tmp_path / "data", time_column=None)
    expected: dict[str, list[str]] = {}
    for user, item, _ in ROWS:
        expected.setdefault(user, []).append(item)
    assert read_sequences(tmp_path / "data") == expected


def test_files_folders_and_globs_of_mixed_formats(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    write_csv(tmp_path / "in" / "a.csv", ROWS[:20])
    write_jsonl(tmp_path / "in" / "deep" / "b.jsonl", ROWS[20:40])
    (tmp_path / "in" / "_SUCCESS").write_text("")
    (tmp_path / "in" / "readme.md").write_text("not data")
    write_parquet(tmp_path / "more-1.parquet", ROWS[40:60])
    write_parquet(tmp_path / "more-2.parquet", ROWS[60:])
    result = make([str(tmp_path / "in"), str(tmp_path / "more-*.parquet")], tmp_path / "data")
    assert read_sequences(tmp_path / "data") == in_time_order(ROWS)
    assert len(result.manifest.preparation["inputs"]) == 4


def test_other_column_names_and_extra_columns(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("when,note,who,what\n2,x,u,b\n1,y,u,a\n")
    columns = {"user_column": "who", "item_column": "what", "time_column": "when"}
    make(tmp_path / "log.csv", tmp_path / "data", **columns)
    assert read_sequences(tmp_path / "data") == {"u": ["a", "b"]}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1600000000", 1600000000),
        ("-5", -5),
        ("9007199254740993", 9007199254740993),  # one more than a float64 can tell
        ("1600000000.75", 1600000000),
        ("1.6e9", 1600000000),
        ("2020-09-13", 1599955200),
        ("2020-09-13 12:26:40", 1600000000),
        ("2020-09-13T12:26:40.9", 1600000000),
        ("2020-09-13T12:26:40Z", 1600000000),
        ("2020-09-13T14:26:40+02:00", 1600000000),
        ("1969-12-31 23:59:58.75", -2),
    ],
)
def test_times_as_numbers_and_as_iso_date_times(tmp_path: Path, text: str, seconds: int) -> None:
    (tmp_path / "log.csv").write_text(f"user_id,item_id,timestamp\nu,a,{text}\n")
    make(tmp_path / "log.csv", tmp_path / "data")
    assert read_sequences(tmp_path / "data", "timestamps") == {"u": [seconds]}


def test_fractions_of_a_second_order_events(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\nu,c,5.75\nu,b,5.5\nu,a,5\n")
    (tmp_path / "iso.csv").write_text(
        "user_id,item_id,timestamp\nu,c,2020-01-01 00:00:00.75\nu,b,2020-01-01 00:00:00.5\nu,a,2020-01-01 00:00:00\n"
    )
    for name in ("log", "iso"):
        make(tmp_path / f"{name}.csv", tmp_path / name)
        assert read_sequences(tmp_path / name) == {"u": ["a", "b", "c"]}


def test_parquet_columns_of_other_types(tmp_path: Path) -> None:
    moment = datetime.datetime(2020, 9, 13, 12, 26, 40, 500_000)
    table = pa.table(
        {
            "user_id": pa.array([12.0, 12.0, None, 13.5]),  # as pandas writes integers with gaps
            "item_id": pa.array([b"a", b"b", b"c", b"d"]),
            "timestamp": pa.array([moment, moment.replace(microsecond=0), moment, None], pa.timestamp("us")),
        }
    )
    pq.write_table(table, tmp_path / "log.parquet")
    result = make(tmp_path / "log.parquet", tmp_path / "data")
    assert read_sequences(tmp_path / "data") == {"12": ["b", "a"]}
    assert read_sequences(tmp_path / "data", "timestamps") == {"12": [1600000000, 1600000000]}
    assert result.manifest.preparation["rejected"] == {"no time": 1, "no user": 1}
    rejected = pq.read_table(tmp_path / "data" / "rejected").to_pylist()
    assert [(row["row"], row["reason"]) for row in rejected] == [(3, "no user"), (4, "no time")]


def test_quotes_unicode_and_blank_keys(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(
        'user_id,item_id,timestamp\nu,"a, ""b""",1\n"ü","two\nlines",2\n,c,3\n"  ",c,4\n', encoding="utf-8-sig"
    )
    result = make(tmp_path / "log.csv", tmp_path / "data")
    assert read_sequences(tmp_path / "data") == {"u": ['a, "b"'], "ü": ["two\nlines"]}
    assert result.manifest.preparation["rejected"] == {"no user": 2}


def test_rejected_csv_rows_are_counted_by_reason_and_written_with_their_line(tmp_path: Path) -> None:
    lines = [
        "user_id,item_id,timestamp",
        "u,a,1",
        ",b,2",
        "u,b",
        "u,,3",
        "u,c,4,more",
        "u,d,tomorrow",
        "u,e,",
        "u,f,nan",
        "u,g,9",
    ]
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    result = make(tmp_path / "log.csv", tmp_path / "data")
    reasons = {"malformed line": 2, "no item": 1, "no time": 2, "no user": 1, "unreadable time": 1}
    assert result.manifest.preparation["rejected"] == reasons
    assert result.manifest.preparation["rows"] == 9
    assert read_sequences(tmp_path / "data") == {"u": ["a", "g"]}
    rejected = pq.read_table(tmp_path / "data" / "rejected").to_pylist()
    assert {row["file"] for row in rejected} == {str(tmp_path / "log.csv")}
    for row in rejected:
        assert row["text"] == lines[row["row"] - 1]
    assert len(rejected) == 7


def test_rejected_rows_of_json_lines_and_sequences(tmp_path: Path) -> None:
    lines = [
        '{"user_id": "u", "item_id": 7, "timestamp": 1}',
        '{"user_id": "u", "item_id":',
        "",
        '{"item_id": 8, "timestamp": 2}',
        "[1, 2]",
        '{"user_id": "u", "item_id": null, "timestamp": 3}',
        '{"user_id": "u", "item_id": 9, "timestamp": "2020-01-01"}',
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    result = make(tmp_path / "log.jsonl", tmp_path / "json")
    assert result.manifest.preparation["rejected"] == {"malformed line": 2, "no item": 1, "no user": 1}
    assert read_sequences(tmp_path / "json") == {"u": ["7", "9"]}
    rejected = pq.read_table(tmp_path / "json" / "rejected").to_pylist()
    assert [row["row"] for row in rejected] == [2, 4, 5, 6]
    assert all(row["text"] == lines[row["row"] - 1] for row in rejected)

    (tmp_path / "log.txt").write_text("u a b\nlonely\nv c\n")
    result = make(tmp_path / "log.txt", tmp_path / "text")
    assert result.manifest.preparation["rejected"] == {"no item": 1}
    (row,) = pq.read_table(tmp_path / "text" / "rejected").to_pylist()
    assert (row["row"], row["text"]) == (2, "lonely")


def test_rejected_rows_name_the_right_one_of_several_files(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.csv").write_text(f"user_id,item_id,timestamp\nu,x,1\nu,{name},oops\n")
    make([str(tmp_path / f"{name}.csv") for name in "cab"], tmp_path / "data")
    rejected = pq.read_table(tmp_path / "data" / "rejected").to_pylist()
    assert [(Path(row["file"]).stem, row["row"], row["text"]) for row in rejected] == [
        (name, 3, f"u,{name},oops") for name in "cab"
    ]


def test_invalid_utf8_is_one_rejected_row(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_bytes(b"user_id,item_id,timestamp\nu,\xff\xfe,1\nu,a,2\n")
    result = make(tmp_path / "log.csv", tmp_path / "data")
    assert result.manifest.preparation["rejected"] == {"not UTF-8": 1}


@pytest.mark.parametrize("ending", ["csv", "jsonl", "inter"])
def test_windows_and_mixed_line_endings(tmp_path: Path, ending: str) -> None:
    text = WRITERS[ending](tmp_path / f"log.{ending}", ROWS).read_text()
    (tmp_path / f"windows.{ending}").write_bytes(text.replace("\n", "\r\n").encode())
    lines = text.splitlines()
    mixed = "".join(line + ("\r\n" if place % 2 else "\n") for place, line in enumerate(lines))
    (tmp_path / f"mixed.{ending}").write_bytes(mixed.encode())
    for name in ("windows", "mixed"):
        make(tmp_path / f"{name}.{ending}", tmp_path / name)
        assert read_sequences(tmp_path / name) == in_time_order(ROWS)


def test_remote_input_through_fsspec(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for name, rows in (("a.csv", ROWS[:30]), ("b.csv", ROWS[30:])):
        memory.pipe(f"/prepare-input/{name}", write_csv(tmp_path / name, rows).read_bytes())
    make("memory://prepare-input/*.csv", tmp_path / "data")
    assert read_sequences(tmp_path / "data") == in_time_order(ROWS)


def test_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    log = write_csv(tmp_path / "log.csv", ROWS)
    make([str(log), f"{tmp_path}/./log.csv", f"{tmp_path}/*.csv"], tmp_path / "data")
    assert read_sequences(tmp_path / "data") == in_time_order(ROWS)


def test_the_expressions_compile_for_spark_too(monkeypatch: pytest.MonkeyPatch) -> None:
    spark = SimpleNamespace(pyspark=SimpleNamespace(treat_nan_as_null=False))  # set by pyspark, which need not be here
    monkeypatch.setattr("ibis.backends.sql.compilers.pyspark.options", spark)
    names = ("user", "item", "time", "rating", "click", "fault")
    keys = dict.fromkeys(names, "string")
    more = {"text": "string", "several_lines": "boolean", "row": "int64"}
    source = ibis.table({**keys, **more}, name="source")
    typed = ibis.table({**keys, **more, "time": "timestamp(6)", "user": "float64"}, name="typed")
    options = RowOptions(timed=True, rated=True, labelled=True, null_words=("NA", "NULL"))
    *before, rows = steps(source, options)
    log = rows.mutate(order=ibis.literal(0, "int64"), segment=ibis.literal(0, "int8"))
    users = ibis.table({"key": "string", "user": "int64"}, name="users")
    items = ibis.table({"key": "string", "item": "int64"}, name="items")
    events = queries.encode_keys(log, users, items)
    user_ids = queries.assign_ids(users, "user", "user_id")
    item_ids = queries.assign_ids(items, "item", "item_id")
    kept = events.inner_join(user_ids, "user").inner_join(item_ids, "item").drop("user", "item")
    for expression in (
        *before,
        *steps(typed, RowOptions(timed=True, rated=False, labelled=False)),
        queries.assign_codes(log.select(key=log.user).distinct(), "user", seed=1),
        queries.drop_repeats(events),
        queries.drop_outer_shown(kept),
        queries.item_table(item_ids, items, queries.count_items(queries.place_interactions(kept, "last"))),
        queries.summarize_parts(queries.count_parts(queries.place_interactions(kept.mutate(part=1), "time"))),
        queries.user_table(user_ids, users),
        kept.order_by("user_id", *queries.IN_TIME),
    ):
        assert "SELECT" in ibis.to_sql(expression, dialect="pyspark")
