"""A small Spark for tests: one session for all tests of a file, as starting one takes seconds."""

import atexit
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ibis.expr.types as ir
import pyarrow as pa
import pytest

from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.engines.engine import Engine
from recgpt_torchrec.preparation.engines.spark_session import check_java, open_session
from tools.spark_plans import as_arguments, settings

SETTINGS = (
    "--master local[2,4] --driver-memory 1g --conf spark.sql.shuffle.partitions=2 "
    # A test's statements run once, on a few rows: most of their time would be the compilation of what runs them.
    "--driver-java-options '-XX:TieredStopAtLevel=1 -XX:+UseSerialGC' --conf spark.sql.codegen.wholeStage=false "
    "--conf spark.sql.codegen.factoryMode=NO_CODEGEN"
)
"""Two tasks at once; one that fails is tried again, up to four times."""
EVENTS = Path(tempfile.mkdtemp(prefix="spark-events-"))
"""What Spark did, of all sessions: a process has one Java, which keeps the settings that it was started with."""
atexit.register(shutil.rmtree, EVENTS, ignore_errors=True)


def fill_table(engine: Engine, name: str, table: pa.Table) -> ir.Table:
    """Store an Arrow table in an engine."""
    return engine.fill_from(name, [table], lambda source: [source], table.schema)


def start_spark(folder: str) -> Iterator[None]:
    """Keep a session open, which engines share; skip the tests where Spark is not installed.

    Args:
        folder: local, for what Spark spills.
    """
    pytest.importorskip("pyspark", reason="Spark is not installed (make spark)")
    try:
        check_java()
    except InputError as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYSPARK_SUBMIT_ARGS", f"{SETTINGS} {as_arguments(settings(EVENTS))}")
        session, _ = open_session(folder)
    yield
    session.stop()
