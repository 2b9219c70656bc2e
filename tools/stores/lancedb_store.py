"""LanceDB: a folder of columnar files, searched in this process.

Its metric `dot` gives a distance of 1 - inner product. Without an index every vector is scored, so lists are exact.
"""

import os
from datetime import timedelta

os.environ.setdefault("LANCEDB_LOG", "error")  # read when it is imported; else it warns of each new table

import lancedb
import numpy as np
import pyarrow as pa
from lancedb.index import BTree, HnswFlat, IvfFlat

from tools.stores.store import (
    IVF_EFFORT,
    Float32,
    Found,
    Int64,
    Items,
    Record,
    Store,
    effort_of,
    found_of,
    has_name,
    table_of,
)

IDS_PER_DELETE = 10_000


class LanceStore(Store):
    """A table of LanceDB; the URI is a folder, or an object store's that LanceDB knows."""

    name = "lancedb"
    batch_bytes = 2**26  # each batch is a file of the table
    errors = (RuntimeError, ValueError, OSError)

    def connect(self) -> None:
        """See `Store`."""
        self.database = lancedb.connect(self.uri)

    def close(self) -> None:
        """See `Store`."""

    def read_state(self) -> str | None:
        """See `Store`."""
        if self.state_table not in self._tables():
            return None
        return self.database.open_table(self.state_table).to_arrow()["record"][0].as_py()

    def write_state(self, text: str) -> None:
        """See `Store`."""
        self.database.create_table(self.state_table, pa.table({"record": [text]}), mode="overwrite")

    def has_table(self) -> bool:
        """See `Store`."""
        return has_name(self._tables(), self.table)

    def create(self, dim: int) -> None:
        """See `Store`."""
        schema = pa.schema({"item_id": pa.int64(), "key": pa.string(), "vector": pa.list_(pa.float32(), dim)})
        self.database.create_table(self.table, schema=schema, mode="overwrite")

    def insert(self, items: Items) -> None:
        """See `Store`."""
        self._open().add(table_of(items))

    def upsert(self, items: Items) -> None:
        """See `Store`."""
        merge = self._open().merge_insert("item_id").when_matched_update_all().when_not_matched_insert_all()
        merge.execute(table_of(items))

    def delete(self, ids: Int64) -> None:
        """See `Store`."""
        table = self._open()
        for first in range(0, len(ids), IDS_PER_DELETE):
            table.delete(f"item_id IN ({', '.join(map(str, ids[first : first + IDS_PER_DELETE].tolist()))})")

    def build_index(self, record: Record) -> None:
        """See `Store`."""
        table = self._open()
        table.create_index("item_id", config=BTree())
        table.create_index("key", config=BTree())
        if record.index == "ivf":
            table.create_index("vector", config=IvfFlat(distance_type="dot"))
        elif record.index == "hnsw":
            table.create_index("vector", config=HnswFlat(distance_type="dot", num_partitions=1))
        self.finish_delta(record)

    def finish_delta(self, record: Record) -> None:
        """Index the rows that a delta added (until then they are scored one by one), and merge small files."""
        self._open().optimize(cleanup_older_than=timedelta(days=1))

    def count(self) -> int:
        """See `Store`."""
        return self._open().count_rows()

    def search(self, queries: Float32, k: int, record: Record, effort: int = 0) -> Found:
        """See `Store`."""
        search = self._open().search(list(queries), vector_column_name="vector").distance_type("dot").limit(k)
        if record.index == "hnsw":
            search = search.ef(effort_of(record, k, effort))
        elif record.index == "ivf":
            search = search.nprobes(effort or IVF_EFFORT)
        found = search.select(["item_id", "key", "_distance"]).to_arrow()
        query = found["query_index"].to_numpy() if len(queries) > 1 else np.zeros(len(found), np.int64)
        rows: list[list[tuple[int, str, float]]] = [[] for _ in queries]
        columns = [found[name].to_pylist() for name in ("item_id", "key", "_distance")]
        for place, item, key, distance in zip(query.tolist(), *columns, strict=True):
            rows[place].append((item, key, 1 - distance))
        return found_of([sorted(row, key=lambda each: -each[2]) for row in rows], k)

    def _tables(self) -> list[str]:
        return self.database.list_tables(limit=100_000).tables

    def _open(self) -> "lancedb.table.Table":
        return self.database.open_table(self.table)
