"""What goes wrong around Spark is said in a sentence, leaves nothing behind, and harms no other user of Spark."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import ibis
import pyarrow as pa
import pyarrow.fs
import pytest

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.engines import opening, spark_session
from recgpt_torchrec.preparation.engines.duckdb_engine import DuckDBEngine
from recgpt_torchrec.preparation.engines.spark_engine import SparkEngine
from recgpt_torchrec.preparation.engines.spark_errors import explain_spark
from recgpt_torchrec.preparation.engines.spark_writing import _keep_counted
from recgpt_torchrec.preparation.reading.formats.lists import LOOKS_LIKE_LIST
from recgpt_torchrec.storage.parts import Part
from tests.preparation.spark_helpers import fill_table, start_spark


@pytest.fixture(scope="module")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkEngine]:
    for _ in start_spark(str(tmp_path_factory.mktemp("spark"))):
        with SparkEngine(str(tmp_path_factory.mktemp("tables"))) as engine:
            yield engine


def test_spark_of_another_thread_is_shared_and_goes_on(spark: SparkEngine, tmp_path: Path) -> None:
    masters = []

    def open_and_close() -> None:
        with SparkEngine(str(tmp_path)) as engine:
            masters.append(engine.spark.sparkContext.master)

    thread = threading.Thread(target=open_and_close)
    thread.start()
    thread.join()
    assert masters == [spark.spark.sparkContext.master]
    assert spark.spark.range(3).count() == 3
    assert [*tmp_path.iterdir()] == []


def test_text_is_not_substituted_and_patterns_mean_the_same(spark: SparkEngine, tmp_path: Path) -> None:
    lists = ["[a]", "[a\rb]", "1,2", "[\u2028]", "[\x85]", "[é😀]"]
    keys = ["${spark.app.name}", *lists, "[a]\n", "[a\nb]", "1,2\n", "1,2\r"]
    table = pa.table({"key": keys})
    found = []
    with DuckDBEngine(str(tmp_path)) as duckdb:
        for engine in (duckdb, spark):
            stored = fill_table(engine, "odd_keys", table)
            same = stored.key == ibis.literal("${spark.app.name}")
            rows = engine.rows(stored.mutate(same=same, listed=stored.key.re_search(LOOKS_LIKE_LIST)))
            found.append({row["key"]: (row["same"], row["listed"]) for row in rows})
    assert found[0] == found[1]
    assert [key for key in keys if found[1][key][0]] == keys[:1]
    assert [key for key in keys if found[1][key][1]] == lists


def test_the_jobs_of_the_program_keep_their_description(spark: SparkEngine) -> None:
    context = spark.spark.sparkContext
    context.setJobDescription("mine")
    with spark.shown("a step"):
        assert context.getLocalProperty("spark.job.description") == "a step"
    assert context.getLocalProperty("spark.job.description") == "mine"
    assert context.getLocalProperty("spark.jobGroup.id") is None
    context.setLocalProperty("spark.job.description", None)


def test_a_scratch_that_cannot_be_written_is_named_before_spark_starts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot write temporary tables to .*missing.*--scratch"):
        SparkEngine(str(tmp_path / "missing"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("SPARK_REMOTE", "sc://host"), ("SPARK_API_MODE", "connect"), ("PYSPARK_SUBMIT_ARGS", "--remote sc://host")],
)
def test_spark_connect_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    pytest.importorskip("pyspark", reason="Spark is not installed (make spark)")
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="does not run over Spark Connect"):
        spark_session.open_session(str(tmp_path))


def test_a_bucket_has_no_room_for_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "filesystem", lambda path: (SimpleNamespace(type_name="s3"), path))
    config = Prepare(input=["log.csv"], output="s3://bucket/data/", engine="pyspark")
    assert opening._choose_scratch(config) == "s3a://bucket"
    with pytest.raises(InputError, match="s3://bucket is a whole bucket.*--scratch"):
        opening._choose_scratch(Prepare(input=["log.csv"], output="s3://bucket", engine="pyspark"))


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(spark_session, "CONTAINER_LIMITS", (limit, tmp_path / "missing"))
    whole = spark_session._total_memory()
    limit.write_text("max\n")
    assert spark_session._total_memory() == whole
    limit.write_text("1000000\n")
    assert spark_session._total_memory() == 1_000_000


def test_errors_of_tasks_and_of_a_driver_that_ended_are_explained() -> None:
    failed = type("PythonException", (Exception,), {"__module__": "pyspark.errors"})
    with pytest.raises(InputError, match="^part 3 is damaged$"), explain_spark():
        raise failed("a page of Java\nrecgpt_torchrec.errors.InputError: part 3 is damaged\nat org.apache")
    silent = type("Py4JError", (Exception,), {"__module__": "py4j.protocol"})
    with pytest.raises(InputError, match="Spark's driver process ended"), explain_spark():
        raise silent("An error occurred while calling o47.count")
    for kind in (ConnectionRefusedError, EOFError):
        with pytest.raises(InputError, match="Spark's driver process ended"), explain_spark():
            exec(compile(f"raise {kind.__name__}", "/lib/py4j/clientserver.py", "exec"))
        with pytest.raises(kind), explain_spark():
            raise kind  # of a store
    with pytest.raises(silent), explain_spark():
        raise silent("An error occurred while calling o47.count. Trace:\njava.lang.Fault")


def test_parts_stay_in_order_beyond_five_digits(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    paths = [f"rows/.attempt-7-{number:05d}.parquet" for number in (99_999, 100_000, 100_001)]
    for path in [*paths, "rows/.attempt-6-99999.parquet"]:
        (tmp_path / path).write_bytes(b"")
    written = [Part(path=path, rows=1, items=1, bytes=1, checksum="") for path in reversed(paths)]
    kept = _keep_counted(pyarrow.fs.LocalFileSystem(), str(tmp_path), "rows", written)
    names = [f"part-{number}.parquet" for number in ("99999", "100000", "100001")]
    assert [part.path for part in kept] == [f"rows/{name}" for name in names]
    assert sorted(os.listdir(tmp_path / "rows")) == sorted(names)


KILLED = """
import sys
import pyarrow as pa
from pyspark import SparkContext
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.engines.spark_engine import SparkEngine
from recgpt_torchrec.preparation.engines.spark_errors import explain_spark
try:
    with explain_spark(), SparkEngine(sys.argv[1]) as engine:
        rows = pa.table({"key": [1, 2]})
        table = engine.fill_from("numbers", [rows], lambda table: [table], rows.schema)
        with engine.shown("a step"):
            SparkContext._gateway.proc.kill()
            engine.count(table)
except InputError as error:
    print(error)
"""


@pytest.mark.usefixtures("spark")  # skips where it cannot run
def test_a_driver_that_is_killed_leaves_no_table_and_one_message(tmp_path: Path) -> None:
    environment = {**os.environ, "PYSPARK_SUBMIT_ARGS": "--master local[1] --driver-memory 1g pyspark-shell"}
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert ended.stdout.startswith("--engine pyspark: Spark's driver process ended"), ended.stderr
    # The thread of pyspark that receives accumulators may print an error of its own.
    assert "while sending" not in ended.stderr and "recgpt_torchrec" not in ended.stderr
    assert [*tmp_path.iterdir()] == []
