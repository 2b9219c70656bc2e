"""A small Spark for tests: one session for all tests of a file, as starting one takes seconds."""

from collections.abc import Iterator

import pytest

from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.engines.spark_session import check_java, open_session

SETTINGS = "--master local[2] --driver-memory 1g --conf spark.sql.shuffle.partitions=2 pyspark-shell"


def start_spark(folder: str) -> Iterator[None]:
    """Keep a session open, which engines share; skip the tests where Spark is not installed."""
    pytest.importorskip("pyspark", reason="Spark is not installed (make spark)")
    try:
        check_java()
    except InputError as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYSPARK_SUBMIT_ARGS", SETTINGS)
        session, _ = open_session(folder)
    yield
    session.stop()
