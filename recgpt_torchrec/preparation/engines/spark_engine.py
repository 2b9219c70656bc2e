"""The engine of a cluster: Apache Spark, through its SQL."""

import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.fs

from recgpt_torchrec.preparation.engines.engine import Engine, T, make_scratch
from recgpt_torchrec.preparation.engines.spark_errors import has_ended
from recgpt_torchrec.preparation.engines.spark_progress import shown
from recgpt_torchrec.preparation.engines.spark_session import open_session
from recgpt_torchrec.preparation.engines.spark_writing import write_on_executors
from recgpt_torchrec.preparation.writing import Layout
from recgpt_torchrec.progress import LOGGER
from recgpt_torchrec.storage import remote
from recgpt_torchrec.storage.parts import Part

if TYPE_CHECKING:
    from pyspark.sql import DataFrame
    from pyspark.sql.types import StructType


class SparkEngine(Engine):
    """Apache Spark, with every stored table as Parquet in a scratch folder, so that a lost executor repeats one step.

    The driver sends SQL and receives aggregates: no table passes through it. Only the keys of the written vocabulary
    are read there once, as a stream, for their fingerprint.
    """

    dialect = "pyspark"

    def __init__(self, parent: str) -> None:
        """Connect to Spark, or start it on this machine.

        Args:
            parent: path or URI of a folder that the driver and all executors reach; tables are written to a new folder
                in it, which `close` removes.

        Raises:
            InputError: Spark cannot be started, or `parent` is local and cannot be written to.
        """
        name = f".prepare-{uuid.uuid4().hex[:12]}"
        # A path without a scheme would be one of the cluster's own file system, such as HDFS.
        where = parent.rstrip("/") if remote(parent) else f"file://{parent.rstrip('/')}"
        self.scratch = f"{where}/{name}"
        here = tempfile.gettempdir() if remote(parent) else parent
        with ExitStack() as resources:  # closed in reverse: a folder of this machine last, whatever Spark left in it
            if not remote(parent):
                resources.callback(shutil.rmtree, f"{parent.rstrip('/')}/{name}", ignore_errors=True)
            own = make_scratch(here)
            resources.callback(shutil.rmtree, own, ignore_errors=True)
            self.spark, is_owner = open_session(here)
            if is_owner:
                resources.callback(self._stop)
            self.parallelism = self.spark.sparkContext.defaultParallelism
            """Number of tasks that run at once."""
            is_local = self.spark.sparkContext.master.startswith("local")
            self.local_scratch = own if is_local else None
            """Folder for what tasks write beside tables, where all tasks run on this machine; None: executors have
            folders of their own, which Spark removes. A task that is cancelled cannot remove what it wrote."""
            resources.callback(self._remove_tables)
            self._resources = resources.pop_all()

    def close(self) -> None:
        """Drop every table, remove the scratch folder, and stop Spark if it was started here."""
        self._resources.close()

    def _remove_tables(self) -> None:
        try:
            self.remove(self.scratch)
        except Exception as error:
            if not has_ended(error):
                raise
            if remote(self.scratch.removeprefix("file://")):
                LOGGER.info(f"note        temporary tables are left in {self.scratch}, as Spark's driver ended")

    def _stop(self) -> None:
        try:
            self.spark.stop()
        except Exception as error:
            if not has_ended(error):
                raise

    def save(self, name: str, expression: ir.Table) -> ir.Table:
        """Store the result of `expression` as the table `name`, and return that table for further expressions."""
        return self.save_frame(name, self.frame(expression), expression.schema())

    def save_frame(
        self,
        name: str,
        frame: "DataFrame",
        schema: ibis.Schema,
        step: str = "",
        stop: Callable[[], bool] = lambda: False,
    ) -> ir.Table:
        """Store a DataFrame as the table `name`, and return that table.

        Args:
            name: of the table.
            frame: its rows.
            schema: to which its columns are cast.
            step: what the progress bar says; empty: the table's name.
            stop: whether to give up; asked again and again.
        """
        path = f"{self.scratch}/{name}"
        with self.shown(step or name.replace("_", " "), stop):
            self._cast(frame, schema).write.mode("overwrite").parquet(path)
        return self._register(name, path, schema)

    def shown(self, step: str, stop: Callable[[], bool] = lambda: False) -> AbstractContextManager[None]:
        """Show the progress of the jobs that the `with` starts; see `spark_progress.shown`."""
        return shown(self.spark.sparkContext, step, stop)

    def fill_from(
        self, name: str, sources: Sequence[T], read: Callable[[T], Iterable[pa.Table]], schema: pa.Schema
    ) -> ir.Table:
        """Store the Arrow tables that `read` makes of each source as a table: on the executors, a task each."""

        def read_sources(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for batch in batches:
                for number in batch.column(0).to_pylist():
                    for table in read(sources[number]):
                        yield from table.cast(schema).to_batches()

        kinds = ibis.Schema.from_pyarrow(schema)
        numbers = self.spark.range(0, len(sources), 1, len(sources))
        return self.save_frame(name, numbers.mapInArrow(read_sources, self.types(kinds)), kinds)

    def drop(self, *names: str) -> None:
        """Drop tables, so that their space on disk is free again."""
        for name in names:
            self.spark.catalog.dropTempView(name)
            self.remove(f"{self.scratch}/{name}")

    def write_parts(
        self, rows: ir.Table, layout: Layout, fs: pyarrow.fs.FileSystem, root: str, total: int
    ) -> list[Part]:
        """Write rows as the Parquet parts of a folder, on the executors."""
        schema = rows.schema()
        written = rows.select(layout.columns).schema().to_pyarrow()
        with self.shown(f"writing {layout.folder}"):
            return write_on_executors(self._cast(self.frame(rows), schema), written, layout, fs, root)

    def rows(self, expression: ir.Table) -> list[dict[str, Any]]:
        """The rows of a small result: all of them at once, in one job."""
        found = self._cast(self.frame(expression), expression.schema()).toArrow()
        return list(found.cast(expression.schema().to_pyarrow()).to_pylist())

    def frame(self, expression: ir.Table) -> "DataFrame":
        """`expression` as a DataFrame, for what only Spark can do with it."""
        return self.spark.sql(self.sql(expression))

    def remove(self, path: str) -> None:
        """Delete a folder of any file system that Spark knows, if it exists."""
        context = self.spark.sparkContext
        place = context._jvm.org.apache.hadoop.fs.Path(path)
        place.getFileSystem(context._jsc.hadoopConfiguration()).delete(place, True)

    def _register(self, name: str, path: str, schema: ibis.Schema) -> ir.Table:
        plain = re.sub(r"([][*?{}\\])", r"\\\1", path)  # Spark reads these as patterns
        self.spark.read.schema(self.types(schema)).parquet(plain).createOrReplaceTempView(name)
        return ibis.table(schema, name=name)

    def _cast(self, frame: "DataFrame", schema: ibis.Schema) -> "DataFrame":
        """The columns as Ibis has them: Spark's own types may be others (row_number is an int32 there)."""
        kinds = {field.name: field.dataType for field in self.types(schema)}
        return frame.select(*(frame[name].cast(kind).alias(name) for name, kind in kinds.items()))

    @staticmethod
    def types(schema: ibis.Schema) -> "StructType":
        """A schema of Ibis as one of Spark."""
        from ibis.backends.pyspark.datatypes import PySparkSchema

        return PySparkSchema.from_ibis(schema)
