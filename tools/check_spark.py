"""Checks that Apache Spark runs here: starts it as `prepare --engine pyspark` does, and counts.

python -m tools.check_spark
"""

import tempfile
import time

import ibis

from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.engines.spark_engine import SparkEngine

ROWS = 1_000_000


def main() -> None:
    """Store a table of numbers, read it back, and print what ran."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, SparkEngine(folder) as engine:
        engine.spark.range(ROWS).createOrReplaceTempView("numbers")
        numbers = ibis.table({"id": "int64"}, name="numbers")
        kept = engine.save("kept", numbers.filter(numbers.id % 2 == 0))
        counted = engine.row(kept.agg(n=kept.count(), total=kept.id.sum()))
        if counted != {"n": ROWS // 2, "total": sum(range(0, ROWS, 2))}:
            raise SystemExit(f"Spark counts wrongly: {counted}")
        context = engine.spark.sparkContext
        print(f"Spark {context.version} runs on {context.master} ({time.monotonic() - began:.0f} s)")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(str(error)) from None
