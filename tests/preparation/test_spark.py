"""Both engines write the same dataset, byte for byte, and Spark puts nothing in one place that grows with the log."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ibis
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from recgpt_torchrec.config import FindNeighbours
from recgpt_torchrec.preparation import neighbours
from recgpt_torchrec.preparation.engines.spark_engine import SparkEngine
from recgpt_torchrec.preparation.writing import Layout, lay_out_rows
from recgpt_torchrec.storage.parts import regroup
from tests.preparation.prepare_helpers import make, read_sequences, write_csv
from tests.preparation.spark_helpers import EVENTS, fill_table, start_spark
from tests.preparation.test_ids import write_days
from tests.support import read_files, walks, write_dataset
from tools import spark_plans
from tools.check_engines import check_log, compare_datasets, write_logs

LOGS = ("histories", "times", "events", "by time", "attributes")
"""Not `clicks`, all of whose options `events` has, nor `vocabulary`: `attributes` and two tests extend one.
`tools/check_engines.py` compares all seven."""


@pytest.fixture(scope="module")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One Spark for all tests, which is watched: the folder with its `events`, where logs are written too."""
    folder = tmp_path_factory.mktemp("spark")
    (folder / "events").symlink_to(EVENTS)
    for _ in start_spark(str(folder)):
        yield folder


@pytest.fixture(scope="module")
def logs(spark: Path) -> dict[str, dict[str, Any]]:
    """The logs, in few rows."""
    return write_logs(spark / "logs", users=90, items=40)


@pytest.mark.parametrize("name", LOGS)
def test_both_engines_write_the_same_files_and_no_plan_gathers_rows(name, spark, logs):
    faults, seen, _ = check_log(spark / name.replace(" ", "_"), logs[name])
    assert faults == []
    parts = json.loads((spark / name.replace(" ", "_") / "pyspark" / "manifest.json").read_text())["sequences"]
    assert len(parts) > 1
    assert not any(call.statement == "createDataFrame" for call in seen.collected)
    assert any(call.caller == "pipeline.py:_write_dataset" and call.rows == len(parts) for call in seen.collected)


def test_both_engines_find_the_same_neighbours(spark, tmp_path, monkeypatch):
    monkeypatch.setattr(neighbours, "BATCH_ROWS", 8)
    monkeypatch.setattr(neighbours, "GROUPS_PER_PART", 2)
    write_dataset(tmp_path / "data", walks(users=40, items=30, seed=1), items=30)
    for engine in ("duckdb", "pyspark"):
        options: dict[str, Any] = {"data": str(tmp_path / "data"), "output": str(tmp_path / engine), "engine": engine}
        with spark_plans.watch(spark / "events") as seen:
            found = neighbours.find_neighbours(FindNeighbours(**options))
        assert len(found.manifest.parts) == 2 and found.manifest.pairs > 100
        faults = [fault for plan in seen.plans for fault in spark_plans.find_faults(plan)]
        assert faults == [] and seen.too_large() == [] and bool(seen.plans) == (engine == "pyspark")
    one, other = (read_files(tmp_path / engine / "neighbours") for engine in ("duckdb", "pyspark"))
    assert one == other


def test_parts_without_any_interaction_hold_empty_lists(spark, tmp_path):
    first = [(f"u{user}", f"i{user % 3}", user) for user in range(40)]
    earlier = tmp_path / "earlier"
    make(write_csv(tmp_path / "first.csv", first), earlier)
    gone = set(range(8, 24))  # two parts of eight users
    keys = list(read_sequences(earlier))
    later = [(key, "i1", 50) for number, key in enumerate(keys) if number not in gone]
    train, test = write_csv(tmp_path / "train.csv", later), write_csv(tmp_path / "test.csv", later[:5])
    options = {"vocabulary": str(earlier), "rows_per_group": 4, "groups_per_part": 2}
    options |= {"hold_out": "given", "test_input": [str(test)]}
    make(train, tmp_path / "duckdb", **options)
    make(train, tmp_path / "pyspark", **options, engine="pyspark")
    assert compare_datasets(tmp_path / "duckdb", tmp_path / "pyspark") == []
    sequences = read_sequences(tmp_path / "pyspark")
    assert [number for number, key in enumerate(keys) if not sequences[key]] == sorted(gone)


@pytest.mark.parametrize("options", [{"ids": "managed", "user_rows": 22}, {"ids": "hash"}])
def test_slots_are_the_same(options, spark, tmp_path):
    options = {**options, "item_rows": 35, "groups_per_part": 2}
    first, second = write_days(tmp_path, 2)
    make(first, tmp_path / "earlier", **options)
    for engine in ("duckdb", "pyspark"):
        make(second, tmp_path / engine, vocabulary=str(tmp_path / "earlier"), engine=engine, **options)
    assert compare_datasets(tmp_path / "duckdb", tmp_path / "pyspark") == []
    manifest = json.loads((tmp_path / "pyspark/manifest.json").read_text())
    assert manifest["id_tables"] and manifest["lineage"]


def test_a_task_that_fails_halfway_and_runs_again_leaves_one_file(spark, tmp_path):
    def fail_once(batches: Any, *, start: int, stop: int) -> Iterator[pa.Table]:
        from pyspark import TaskContext

        for group in regroup(batches, 2):
            yield group
            if start == 4 and TaskContext.get().attemptNumber() == 0:
                raise OSError("the disk went away")

    layout = lay_out_rows("items", ["item_id", "key"], 11, 2, 2)
    flaky = Layout(**{**vars(layout), "make_groups": fail_once})
    ids = [7, 3, 10, 0, 1, 9, 2, 8, 4, 6, 5]
    rows = pa.table({"item_id": pa.array(ids), "key": [f"i{number}" for number in ids]})
    fs = pyarrow.fs.LocalFileSystem()
    with SparkEngine(str(tmp_path)) as engine:
        table = fill_table(engine, "items", rows)
        parts = engine.write_parts(table, flaky, fs, str(tmp_path), 11)
    names = ["items/part-00000.parquet", "items/part-00001.parquet", "items/part-00002.parquet"]
    assert [part.path for part in parts] == names and [part.rows for part in parts] == [4, 4, 3]
    assert sorted(path.name for path in (tmp_path / "items").iterdir()) == [name.split("/")[1] for name in names]
    assert pq.read_table(tmp_path / "items").equals(rows.sort_by("item_id"))


def test_plans_that_gather_rows_are_found(spark):
    def gather(engine: SparkEngine, table: ibis.Table) -> list[ibis.Table]:
        small = table.filter(table.key < 3).mutate(twice=table.key * 2)
        return [
            table.mutate(place=ibis.row_number().over(order_by=table.key)),
            table.group_by("key").agg(n=table.count()).mutate(place=ibis.row_number().over(order_by=ibis._.key)),
            table.join(small, table.key < small.twice).select(small.twice),
            table.order_by("key").limit(spark_plans.MAX_LIMIT + 1),
        ]

    def share(engine: SparkEngine, table: ibis.Table) -> list[ibis.Table]:
        bucketed = table.mutate(bucket=table.key // 100).group_by("bucket").agg(n=ibis._.count())
        total = ibis.cumulative_window(order_by="bucket")
        return [
            table.agg(n=table.count(), most=table.key.max()),
            bucketed.mutate(total=bucketed.n.sum().over(total)),
            table.mutate(share=table.key / table.count().as_scalar()),
            table.order_by("key"),
        ]

    rows = pa.table({"key": pa.array(range(1000))})
    with SparkEngine(str(spark)) as engine:
        table = fill_table(engine, "numbers", rows)
        for make_tables, are_bad in ((gather, True), (share, False)):
            for number, expression in enumerate(make_tables(engine, table)):
                with spark_plans.watch(spark / "events") as seen:
                    engine.save(f"result_{number}", expression)
                faults = [fault for plan in seen.plans for fault in spark_plans.find_faults(plan)]
                assert seen.plans and bool(faults) == are_bad, (number, are_bad, faults)


def test_rows_that_pass_through_the_driver_are_counted(spark, monkeypatch):
    rows = pa.table({"key": pa.array(range(50))})
    monkeypatch.setattr(spark_plans, "MAX_ROWS", 49)
    with SparkEngine(str(spark)) as engine:
        with spark_plans.watch(spark / "events") as seen:
            frame = engine.spark.createDataFrame(rows)
            table = engine.save_frame("numbers", frame, ibis.Schema.from_pyarrow(rows.schema))
            assert len(engine.rows(table)) == 50
            assert engine.count(table) == 50
    assert [call.rows for call in seen.collected] == [50, 50, 1]
    assert [call.rows for call in seen.too_large()] == [50, 50]
