"""Both engines write the same dataset, byte for byte, and Spark puts nothing in one place that grows with the log."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from recgpt_torchrec.preparation.engines.spark_session import check_java, open_session
from tools import spark_plans
from tools.check_engines import check_log, write_logs

pyspark = pytest.importorskip("pyspark", reason="pyspark is not installed (make spark)")
LOGS = ("histories", "times", "clicks", "vocabulary", "by time")


@pytest.fixture(scope="module")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One Spark for all tests, which is watched: the folder with its `events`, where logs are written too."""
    try:
        check_java()
    except Exception as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("spark")
    (folder / "events").mkdir()
    before = pytest.MonkeyPatch()
    options = {**spark_plans.settings(folder / "events"), "spark.driver.memory": "700m"}
    options |= {"spark.master": "local[2,4]", "spark.sql.shuffle.partitions": "2"}  # 4: tasks may fail three times
    before.setenv("PYSPARK_SUBMIT_ARGS", spark_plans.as_arguments(options))
    session, _ = open_session(str(folder))
    yield folder
    session.stop()
    before.undo()


@pytest.fixture(scope="module")
def logs(spark: Path) -> dict[str, dict[str, Any]]:
    """The five logs, in few rows."""
    return write_logs(spark / "logs", users=90, items=40)


@pytest.mark.parametrize("name", LOGS)
def test_both_engines_write_the_same_files_and_no_plan_gathers_rows(name, spark, logs):
    faults, seen, _ = check_log(spark / name.replace(" ", "_"), logs[name])
    assert faults == []
    parts = json.loads((spark / name.replace(" ", "_") / "pyspark" / "manifest.json").read_text())["sequences"]
    assert len(parts) > 1
    assert any(call.caller == "pipeline.py:_write_dataset" and call.rows == len(parts) for call in seen.collected)
