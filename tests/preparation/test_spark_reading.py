"""Logs are read on Spark as they are on DuckDB, row by row, and what is wrong with them is said in the same words."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.config.boundaries import Boundary
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation import parts
from recgpt_torchrec.preparation.engines.duckdb_engine import DuckDBEngine
from recgpt_torchrec.preparation.engines.engine import Engine
from recgpt_torchrec.preparation.engines.spark_engine import SparkEngine
from recgpt_torchrec.preparation.moments import find_ends, find_moment
from recgpt_torchrec.preparation.reading import spark_loading
from recgpt_torchrec.preparation.reading.files import InputFile
from recgpt_torchrec.preparation.reading.log import read_log
from recgpt_torchrec.preparation.reading.spark_loading import group_files
from tests.preparation.spark_helpers import start_spark


@pytest.fixture(scope="module")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkEngine]:
    for _ in start_spark(str(tmp_path_factory.mktemp("spark"))):
        with SparkEngine(str(tmp_path_factory.mktemp("tables [of spark]"))) as engine:
            yield engine


@pytest.fixture(scope="module")
def duckdb(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("duckdb"))


def read(engine: Engine, config: Prepare) -> dict[str, Any]:
    """What is read of a log: every row with its file, the rejected ones, the counts and the page."""
    inputs, _ = parts.list_input_files(config)
    log = read_log(engine, config, inputs)
    events = engine.rows(log.events.order_by("order"))
    firsts = sorted(log.first_rows)
    for event in events:
        event["file"] = sum(first <= event["order"] for first in firsts) - 1
        event["order"] -= firsts[event["file"]]
    result = {name: getattr(log, name) for name in ("exposed", "timed", "rows", "filtered", "uncomputed", "page")}
    rejected = engine.rows(log.rejected_rows.order_by("number"))
    return {**result, "events": events, "rejected": log.rejected, "rejected_rows": rejected, "files": log.files}


def check_same(spark: SparkEngine, duckdb: str, folder: Path, **options: Any) -> dict[str, Any]:
    """What both engines read of a folder, checked to be the same."""
    config = Prepare(**{"input": [str(folder)], "output": str(folder / "data"), **options})
    with DuckDBEngine(duckdb) as engine:
        expected = read(engine, config)
    assert read(spark, config) == expected
    return expected


def test_every_format_and_its_faults_are_read_alike(spark: SparkEngine, duckdb: str, tmp_path: Path) -> None:
    rows = [(f"u{n % 3}", f"i{n % 5}", 1_600_000_000 + n) for n in range(20)]
    lines = [",".join(map(str, row)) for row in rows]
    (tmp_path / "a.csv").write_text("\n".join(["user_id,item_id,timestamp", "one,value", *lines, "u1,,5", "u1,i1,x"]))
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(b"user_id,item_id,timestamp\nu9,i9,2020-01-02T03:04:05.25Z\n"))
    (tmp_path / "c.tsv").write_text("item_id\tuser_id\ttimestamp\ni1\tu 1\t1.5\nNULL\tu2\t3\ntoo\tmany\tof\tthem\n")
    objects = [{"user_id": n, "item_id": 12.0, "timestamp": n} for n in range(3)]
    (tmp_path / "d.jsonl").write_text("\n".join([*map(json.dumps, objects), "{no json", "", '{"user_id": 7}']))
    times = pa.array([10**9, None, 3], pa.timestamp("ms"))
    pq.write_table(pa.table({"user_id": [1, 2, 3], "item_id": ["é", "b", None], "timestamp": times}), tmp_path / "e.pq")
    (tmp_path / "f.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\nu1\ti1\t5\n")
    (tmp_path / "g.csv").write_bytes(b"")
    (tmp_path / "h.csv").write_bytes(b"user_id,item_id,timestamp\nu1,\xff,5\n" + b"u2,i2,6\n")
    found = check_same(spark, duckdb, tmp_path)
    assert len(found["events"]) == 20 + 1 + 1 + 3 + 1 + 1 + 1
    reasons = {"malformed line": 3, "no item": 3, "no item (NULL)": 1, "unreadable time": 1, "not UTF-8": 1}
    assert reasons.items() <= found["rejected"].items()
    assert found["rejected_rows"][0]["row"] == 2 and found["rejected_rows"][0]["text"] == "one,value"


def test_clicks_ratings_conditions_and_partitions_are_read_alike(
    spark: SparkEngine, duckdb: str, tmp_path: Path
) -> None:
    for day in ("01", "02"):
        (tmp_path / f"day={day}").mkdir()
        rows = [f"ü{n},i{n},{n}/05/2021,{word},{n}.5,{n}" for n, word in enumerate(["buy", "view", "cart", "gone"], 1)]
        text = "\n".join(["who,what,when,event,stars,price", *rows, "u1,i1,never,buy,bad,x"])
        (tmp_path / f"day={day}" / "log.csv").write_text(text, encoding="latin-1")
    found = check_same(
        spark,
        duckdb,
        tmp_path,
        encoding="latin-1",
        user_column="who",
        item_column="day",
        time_column="when",
        time_format="%d/%m/%Y",
        partition_columns=["day"],
        rating_column="stars",
        click_column="event",
        click_values=["buy", "cart"],
        where="event <> 'gone' and price >= 1",
    )
    assert (len(found["events"]), found["exposed"], found["filtered"], found["uncomputed"]) == (6, 2, 4, 2)
    assert {event["user"] for event in found["events"]} == {"ü1", "ü2", "ü3"}


def test_lists_and_histories_are_read_alike(spark: SparkEngine, duckdb: str, tmp_path: Path) -> None:
    for name in ("lists", "histories"):
        (tmp_path / name).mkdir()
    users = [
        {"user_id": "a", "item_id": [1, 2], "timestamp": [5, 6]},
        {"user_id": "b", "item_id": [1], "timestamp": []},
    ]
    (tmp_path / "lists" / "log.jsonl").write_text("\n".join(map(json.dumps, users)))
    assert len(check_same(spark, duckdb, tmp_path / "lists")["events"]) == 2
    (tmp_path / "histories" / "log.txt").write_text("u1 a b a\n\nu2 c\n")
    found = check_same(spark, duckdb, tmp_path / "histories")
    assert not found["timed"] and [event["item"] for event in found["events"]] == ["a", "b", "a", "c"]


def fail(engine: Engine, config: Prepare) -> str:
    with pytest.raises(InputError) as caught:
        read(engine, config)
    return str(caught.value)


def test_errors_of_tasks_arrive_in_the_same_words(
    spark: SparkEngine, duckdb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spark_loading, "FEW_FILES", 0)
    (tmp_path / "a.csv").write_text("user_id,item_id,timestamp\nu1,i1,5\n")
    (tmp_path / "b.csv").write_text("user_id,thing,timestamp\nu1,i1,5\n")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and no more")
    for files, expected in {("a.csv", "b.csv"): "has no column 'item_id'", ("a.csv", "c.parquet"): "c.parquet"}.items():
        config = Prepare(input=[str(tmp_path / file) for file in files], output=str(tmp_path / "data"))
        with DuckDBEngine(duckdb) as engine:
            assert fail(engine, config) == (text := fail(spark, config))
        assert expected in text
    limited = Prepare(input=[str(tmp_path / "a.csv")], output=str(tmp_path / "data"), memory_limit="lots")
    assert "--memory_limit lots is not a size" in fail(spark, limited)


def test_tables_and_moments_of_spark(spark: SparkEngine) -> None:
    times = [(5, 0.5), (5, 0.25), (-(2**62), 0.0), (2**62, 0.0), (6, 0.0), (6, 0.0), (6, 0.0)]
    table = pa.table({"whole": pa.array([whole for whole, _ in times]), "fraction": [part for _, part in times]})
    stored = spark.fill_from("times", [slice(0, 3), slice(3, 7)], lambda rows: [table[rows]], table.schema)
    assert spark.count(stored) == 7
    ordered = [Boundary(*time) for time in sorted(times)]
    assert find_ends(spark, stored) == (ordered[0], ordered[-1])
    assert [find_moment(spark, stored, place, ranges=4, few=2) for place in (2, 5)] == [ordered[2], ordered[5]]
    with_null = spark.save("with_null", stored.mutate(whole=stored.whole.nullif(5)))
    rows = spark.rows(with_null.order_by("whole", "fraction").select("whole"))
    assert [row["whole"] for row in rows] == [-(2**62), 6, 6, 6, 2**62, None, None]
    spark.drop("times", "with_null")
    assert not os.path.exists(f"{spark.scratch.removeprefix('file://')}/times")


def test_files_are_dealt_to_tasks_in_order() -> None:
    sizes = [5, 5, 5, 100, 0, 0, 1, 300]
    files = [InputFile(path=str(size), format="csv", bytes=size, modified="") for size in sizes]
    groups = group_files(files, [], parallelism=4)  # at most 26 bytes in several files
    assert [[file.bytes for file in group.files] for group in groups] == [[5, 5, 5], [100], [0, 0, 1], [300]]
    assert [group.first for group in groups] == [0, 3, 4, 7]


PREPARE = """
import sys
sys.modules.update({name: None for name in sys.argv[2:]})
from recgpt_torchrec import cli
from recgpt_torchrec.config import Prepare
from recgpt_torchrec.prepare import main
sys.argv = ["prepare", "--input", sys.argv[1], "--output", sys.argv[1] + ".data", "--engine", "pyspark"]
cli.run(Prepare, main, "recgpt_torchrec.prepare")
"""


@pytest.mark.parametrize("missing", ["pyspark", "java"])
def test_what_is_missing_is_named_with_the_way_to_get_it(tmp_path: Path, missing: str) -> None:
    if missing == "java":
        pytest.importorskip("pyspark", reason="Spark is not installed (make spark)")
    log = tmp_path / "log.csv"
    log.write_text("user_id,item_id,timestamp\nu1,i1,5\n")
    command = [sys.executable, "-c", PREPARE, str(log), *(["pyspark"] if missing == "pyspark" else [])]
    environment = {**os.environ, **({"JAVA_HOME": str(tmp_path)} if missing == "java" else {})}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert "make spark" in ended.stderr and "Traceback" not in ended.stderr
    assert ("pyspark is not installed" if missing == "pyspark" else "holds no bin/java") in ended.stderr
    assert sorted(tmp_path.iterdir()) == [log]
