"""Opens the engine that `--engine` names, and explains what it says of its surroundings."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from recgpt_torchrec.config import FindNeighbours, Prepare
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.engines.duckdb_engine import DuckDBEngine, explain_lack
from recgpt_torchrec.preparation.engines.engine import Engine
from recgpt_torchrec.preparation.engines.spark_engine import SparkEngine
from recgpt_torchrec.preparation.engines.spark_errors import explain_spark
from recgpt_torchrec.storage import filesystem, remote, scratch_beside


@contextmanager
def open_engine(config: Prepare | FindNeighbours) -> Iterator[Engine]:
    """The engine of the configuration; its tables are gone when the `with` ends.

    Raises:
        InputError: it cannot be started, or lacks memory or scratch space.
    """
    scratch = _choose_scratch(config)
    if config.engine == "pyspark":
        with explain_spark(), SparkEngine(scratch) as spark:
            yield spark
    else:
        with explain_lack(scratch), DuckDBEngine(scratch, config.memory_limit) as database:
            yield database


def _choose_scratch(config: Prepare | FindNeighbours) -> str:
    """The folder for the engine's tables: `scratch`, or the output's parent if that is on a local disk, or on Spark."""
    is_spark = config.engine == "pyspark"
    if config.scratch is not None and remote(config.scratch):
        if not is_spark:
            raise InputError(f"--scratch {config.scratch}: --engine duckdb needs a folder on a local disk")
        return config.scratch
    if config.scratch is not None:
        return scratch_beside(os.path.join(os.path.abspath(config.scratch), "tables"))
    if is_spark and filesystem(config.output)[0].type_name != "local":
        above = config.output.rstrip("/").rpartition("/")[0]
        if above.endswith("/"):
            raise InputError(
                f"--output {config.output} is a whole bucket, and Spark's tables need a folder beside it; name a "
                "folder in it, or one for tables with --scratch"
            )
        return f"s3a://{above.removeprefix('s3://')}" if above.startswith("s3://") else above  # as Hadoop names it
    return scratch_beside(config.output)  # missing folders are created with the dataset only
