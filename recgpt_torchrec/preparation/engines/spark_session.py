"""Connects to Apache Spark, or starts it on this machine."""

from typing import TYPE_CHECKING

from recgpt_torchrec.errors import InputError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

OPTIONS = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.caseSensitive": "true",
    "spark.sql.ansi.enabled": "true",  # overflows and bad casts are errors, as in DuckDB
}
"""Options of the session, which Spark lets a program change at any time."""


def open_session() -> tuple["SparkSession", bool]:
    """A session of Spark with `OPTIONS`, and whether Spark was started for it, so is to be stopped.

    Where a program such as spark-submit has a session already, the new one shares its executors.

    Raises:
        InputError: pyspark or a Java virtual machine is missing.
    """
    try:
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise InputError(
            f"--engine pyspark: pyspark is not installed ({error}); run `make spark`, or "
            "pip install 'recgpt-torchrec[spark]'"
        ) from None
    active = SparkSession.getActiveSession()
    session = SparkSession.builder.appName("prepare").getOrCreate() if active is None else active.newSession()
    for name, value in OPTIONS.items():
        session.conf.set(name, value)
    session.sparkContext.setLogLevel("ERROR")
    return session, active is None
