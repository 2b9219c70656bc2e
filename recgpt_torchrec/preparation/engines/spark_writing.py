"""Writes the parts of a dataset on Spark's executors, each where its rows are.

A task writes one part. It may run twice: after a failure, or beside a slow copy of itself (speculation). So each
attempt writes a file of its own, and the driver renames those that Spark counts, one per part, and deletes the others.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.fs

from recgpt_torchrec.preparation.writing import Layout
from recgpt_torchrec.storage.parts import Part

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

ATTEMPT = ".attempt"
"""Prefix of the files of attempts."""
RENAMES = 32
"""Number of files renamed at once: an object store copies each."""
RECORD = "path string, rows long, items long, bytes long, checksum string, footer string"
"""Columns of a `Part`, for Spark."""


def write_on_executors(
    rows: "DataFrame", schema: pa.Schema, layout: Layout, fs: pyarrow.fs.FileSystem, root: str
) -> list[Part]:
    """Write rows as the parts of a folder.

    Rows go to the task of their part in one shuffle and are sorted there, spilling to disk; the driver receives one
    record per file.

    Args:
        rows: the columns of `layout`.
        schema: of the columns that are written.
        layout: the folder, and which rows are in which file.
        fs: file system of `root`, which the executors reach under the same name.
        root: folder above that of the layout.
    """
    from pyspark.sql import functions

    def write_part(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        from pyspark import TaskContext

        context = TaskContext.get()
        assert context is not None
        prefix = f"{ATTEMPT}-{context.taskAttemptId()}"
        cast = (batch.cast(schema) for batch in batches)
        part = layout.write_part(fs, root, cast, context.partitionId(), prefix)
        yield pa.RecordBatch.from_pylist([asdict(part)])

    number = functions.floor(rows[layout.id] / layout.ids_per_part).cast("int")
    in_order = [functions.asc_nulls_last(column) for column in (layout.id, *layout.order)]
    placed = rows.repartitionById(layout.parts, number).sortWithinPartitions(*in_order).select(*layout.columns)
    fs.create_dir(f"{root}/{layout.folder}", recursive=True)
    written = [Part(**row.asDict()) for row in placed.mapInArrow(write_part, RECORD).collect()]
    return _keep_counted(fs, root, layout.folder, written)


def _keep_counted(fs: pyarrow.fs.FileSystem, root: str, folder: str, written: list[Part]) -> list[Part]:
    """Give the files of the attempts that count their names, and delete those of other attempts."""

    def rename(part: Part) -> Part:
        named = replace(part, path=f"{folder}/part-{part.path.rpartition('-')[2]}")
        fs.move(f"{root}/{part.path}", f"{root}/{named.path}")
        return named

    with ThreadPoolExecutor(RENAMES) as threads:
        parts = list(threads.map(rename, written))
    for file in fs.get_file_info(pyarrow.fs.FileSelector(f"{root}/{folder}")):
        if file.base_name.startswith(ATTEMPT):
            fs.delete_file(file.path)
    return sorted(parts, key=lambda part: (len(part.path), part.path))  # from 100,000 parts on, numbers get longer
