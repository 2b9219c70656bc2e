"""What is read is what is meant: names of files and folders, encodings, compressions, and what is left out."""

import bz2
import gzip
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.prepare import summary
from tests.preparation.prepare_helpers import make, read_sequences

LOG = "user_id,item_id,timestamp\nu,a,1\nu,b,2\nv,c,3\n"
SEQUENCES = {"u": ["a", "b"], "v": ["c"]}


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def page(folder: Path, data: Path, **options: Any) -> str:
    """The page that prepare prints, with the sequences it wrote."""
    config = Prepare(input=[str(folder)], output=str(data), min_count=1, **options)
    result = make(folder, data, **options)
    return summary(config, result)


@pytest.mark.parametrize(
    "name", ["log[1].csv", "lo*?.csv", 'it\'s "one".csv', "user_id=zz/log.csv", "a=b=c/x y.csv", "LOG.CSV"]
)
def test_a_path_is_taken_literally_and_its_folders_mean_nothing(tmp_path: Path, name: str) -> None:
    put(tmp_path / "log" / "log1.csv", LOG.replace("u,a", "wrong,a"))  # what the name would match as a pattern
    make(put(tmp_path / "log" / name, LOG), tmp_path / "data")
    assert read_sequences(tmp_path / "data") == SEQUENCES


@pytest.mark.parametrize("format", ["parquet", "csv"])
def test_a_folder_named_like_a_column_does_not_replace_it(tmp_path: Path, format: str) -> None:
    for day in (1, 2):
        times = [f"2023-08-0{day} 0{hour}:00:00" for hour in (9, 7, 8)]
        table = pa.table({"user_id": ["u"] * 3, "item_id": [f"{day}-{time[11:13]}" for time in times], "when": times})
        path = tmp_path / "log" / f"when=2023-08-0{day}" / f"part.{format}"
        path.parent.mkdir(parents=True)
        if format == "parquet":
            pq.write_table(table, path)
        else:
            put(path, "\n".join(["user_id,item_id,when", *(",".join(row.values()) for row in table.to_pylist())]))
    make(tmp_path / "log", tmp_path / "data", time_column="when")
    assert read_sequences(tmp_path / "data") == {"u": ["1-07", "1-08", "1-09", "2-07", "2-08", "2-09"]}


def test_a_folder_is_a_column_when_it_is_asked_for(tmp_path: Path) -> None:
    for day, name in (("2024-01-02", "b"), ("2024-01-01%2010%3A30", "a"), ("__HIVE_DEFAULT_PARTITION__", "c")):
        put(tmp_path / "log" / f"dt={day}" / "x.csv", f"user_id,item_id\nu,{name}\n")
    with pytest.raises(InputError, match="the name of a folder.*pass --partition_columns dt"):
        make(tmp_path / "log", tmp_path / "data", time_column="dt")
    result = make(tmp_path / "log", tmp_path / "data", time_column="dt", partition_columns=["dt"])
    assert read_sequences(tmp_path / "data") == {"u": ["a", "b"]}
    assert read_sequences(tmp_path / "data", "timestamps") == {"u": [1704105000, 1704153600]}
    assert result.manifest.preparation["rejected"] == {"no time": 1}
    both = put(tmp_path / "both" / "dt=5" / "x.csv", "user_id,item_id,dt\nu,a,1\n")
    with pytest.raises(InputError, match="has a column 'dt' itself"):
        make(both, tmp_path / "other", time_column="dt", partition_columns=["dt"])
    with pytest.raises(InputError, match="is in no folder day=VALUE"):
        make(both, tmp_path / "other", time_column="day", partition_columns=["day"])


@pytest.mark.parametrize(
    ("ending", "compress"),
    [
        (".gz", lambda data: gzip.compress(data[:30]) + gzip.compress(data[30:])),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", lambda data: pa.compress(data, codec="zstd", asbytes=True)),
    ],
)
def test_every_compression(tmp_path: Path, ending: str, compress) -> None:
    make(put(tmp_path / f"log.csv{ending}", compress(LOG.encode())), tmp_path / "data")
    assert read_sequences(tmp_path / "data") == SEQUENCES
    cut = compress(LOG.encode() * 500)[:-20]
    with pytest.raises(InputError, match=f"cut.csv{ending}: cannot be read as csv"):
        make(put(tmp_path / f"cut.csv{ending}", cut), tmp_path / "other")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "cp1252", "utf-8-sig"])
def test_every_encoding(tmp_path: Path, encoding: str) -> None:
    log = put(tmp_path / "log.csv", "user_id,item_id,timestamp\nu,café,1\nu,b,2\n".encode(encoding))
    make(log, tmp_path / "data", encoding=encoding)
    assert read_sequences(tmp_path / "data") == {"u": ["café", "b"]}


def test_another_encoding_than_the_files_is_said(tmp_path: Path) -> None:
    log = put(tmp_path / "log.csv", "user_id,item_id,timestamp\nu,café,1\nu,b,2\n".encode("latin-1"))
    text = page(log, tmp_path / "data")
    assert "1 not UTF-8" in text and "pass --encoding latin-1" in text
    with pytest.raises(InputError, match="is not in --encoding ascii.*from byte 0 on"):
        make(log, tmp_path / "other", encoding="ascii")


def test_files_of_a_folder_that_are_not_read_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    put(folder / "day1.csv", LOG)
    put(folder / "day2.csv.bz2", bz2.compress(LOG.replace("u,", "w,").encode()))
    put(folder / "day3.json", '{"user_id": "x", "item_id": "a", "timestamp": 1}\n')
    put(folder / "part-00000", LOG)
    put(folder / "_day5.csv", LOG)
    put(folder / ".day6.csv.crc", LOG)
    put(folder / "_SUCCESS", "")
    put(folder / "settings.json", "[1, 2]")
    put(folder / "day7.csv", "")
    text = page(folder, tmp_path / "data")
    assert read_sequences(tmp_path / "data") == {"u": ["a", "b"], "v": ["c", "c"], "w": ["a", "b"], "x": ["a"]}
    left_out = [line for line in text.split("\n") if line.startswith("left out")]
    assert "3 files" in left_out[0] and all(
        name in left_out[0] for name in ("part-00000", "_day5.csv", "settings.json")
    )
    assert "1 empty file" in left_out[1] and "day7.csv" in left_out[1]


@pytest.mark.parametrize(
    ("path", "name"),
    [("_delta_log/00000.json", "Delta"), (".hoodie/x.commit", "Hudi"), ("metadata/v1.metadata.json", "Iceberg")],
)
def test_a_table_whose_files_hold_old_rows_is_refused(tmp_path: Path, path: str, name: str) -> None:
    put(tmp_path / "table" / "data" / "part-0.csv", LOG)
    put(tmp_path / "table" / path, "{}")
    with pytest.raises(InputError, match=f"is an? {name} table: its files also hold rows"):
        make(tmp_path / "table", tmp_path / "data")


def test_an_option_that_no_file_can_follow_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"user_id": ["u"], "item_id": ["a"], "timestamp": [1]}), tmp_path / "log.parquet")
    log = put(tmp_path / "log.jsonl", '{"user_id": 1, "item_id": 2, "timestamp": 3}\n')
    for options in ({"separator": ";"}, {"quote": "'"}, {"header": False}, {"escape": "/"}):
        with pytest.raises(InputError, match="is given, but no file of --input is a table in text"):
            make(log, tmp_path / "data", **options)
    with pytest.raises(InputError, match="--encoding is given, but"):
        make(tmp_path / "log.parquet", tmp_path / "data", encoding="latin-1")
    histories = put(tmp_path / "log.txt", "u a b c\nv b c\n")
    for name, value in {
        "where": "a > 1",
        "rating_column": "r",
        "click_column": "c",
        "time_format": "%Y",
        "list_separator": ",",
    }.items():
        with pytest.raises(InputError, match=f"--{name} .*: files of the format sequences have no columns"):
            make(histories, tmp_path / "data", **{name: value})


def test_links_are_followed_once_and_a_broken_one_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "b.csv", LOG.replace("u,", "w,"))
    put(tmp_path / "log" / "a.csv", LOG)
    (tmp_path / "log" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "log" / "loop").symlink_to(tmp_path / "log")
    make(tmp_path / "log", tmp_path / "data")
    assert read_sequences(tmp_path / "data") == {"u": ["a", "b"], "v": ["c", "c"], "w": ["a", "b"]}
    log = str(tmp_path / "log" / "a.csv")
    result = make([log, log], tmp_path / "other")
    assert ["left out", f"1 file named twice: {log}"] in result.manifest.preparation["page"]
    (tmp_path / "log" / "gone.csv").symlink_to(tmp_path / "nowhere.csv")
    with pytest.raises(InputError, match="gone.csv: this link leads nowhere"):
        make(tmp_path / "log", tmp_path / "third")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (lzma.compress(LOG.encode()), "xz data; name it so that it ends in .xz"),
        (b"PK\3\4" + b"\0" * 60, "a zip archive or an Excel sheet; write it as"),
        (b"SQLite format 3\0" + b"\0" * 60, "an SQLite database; write it as"),
    ],
)
def test_a_file_that_is_no_text_is_named_for_what_it_is(tmp_path: Path, content: bytes, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        make(put(tmp_path / "log.csv", content), tmp_path / "data")
    assert expected in str(caught.value)
