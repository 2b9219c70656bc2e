"""Milvus: a server at http://host:19530, or Milvus Lite in a folder of its own.

The metric IP gives inner products as they are, larger is better. Milvus Lite scores rows one by one until the
collection is flushed, released and loaded again: only then does it search its index.
"""

import contextlib
import time

from pymilvus import DataType, MilvusClient, MilvusException

from tools.stores.store import Float32, Found, Int64, Items, Record, Store, effort_of, found_of, has_name

KEY_BYTES = 65_535
"""Maximum length of a key: that of a VARCHAR of Milvus."""
RECORD_BYTES = 65_535
IDS_PER_DELETE = 10_000
WAITS = (0.1, 0.5, 2.0)
"""Seconds between attempts to load a collection."""


class MilvusStore(Store):
    """A collection of Milvus; the URI is a server's, or a path that ends in .db."""

    name = "milvus"
    errors = (MilvusException, ValueError, OSError)

    def connect(self) -> None:
        """See `Store`."""
        self.client = MilvusClient(self.uri)

    def close(self) -> None:
        """See `Store`."""
        self.client.close()

    def read_state(self) -> str | None:
        """See `Store`."""
        if not self.client.has_collection(self.state_table):
            return None
        self._load(self.state_table)
        rows = self.client.query(self.state_table, filter="id == 0", output_fields=["record"])
        return rows[0]["record"] if rows else None

    def write_state(self, text: str) -> None:
        """See `Store`."""
        if not self.client.has_collection(self.state_table):
            schema = self.client.create_schema(auto_id=False)
            schema.add_field("id", DataType.INT64, is_primary=True)
            schema.add_field("record", DataType.VARCHAR, max_length=RECORD_BYTES)
            schema.add_field("unused", DataType.FLOAT_VECTOR, dim=2)  # Milvus has no collection without vectors
            self._create(self.state_table, schema, "unused", "FLAT", {})
        self.client.upsert(self.state_table, [{"id": 0, "record": text, "unused": [0.0, 0.0]}])
        self.client.flush(self.state_table)

    def has_table(self) -> bool:
        """See `Store`."""
        # The first also knows aliases.
        return self.client.has_collection(self.table) or has_name(self.client.list_collections(), self.table)

    def create(self, dim: int) -> None:
        """See `Store`."""
        if self.client.has_collection(self.table):
            self.client.drop_collection(self.table)
        schema = self.client.create_schema(auto_id=False)
        schema.add_field("item_id", DataType.INT64, is_primary=True)
        schema.add_field("key", DataType.VARCHAR, max_length=KEY_BYTES)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dim)
        self.client.create_collection(self.table, schema=schema, consistency_level="Strong")

    def insert(self, items: Items) -> None:
        """See `Store`."""
        self.client.insert(self.table, rows_of(items))

    def upsert(self, items: Items) -> None:
        """See `Store`."""
        self.client.upsert(self.table, rows_of(items))

    def delete(self, ids: Int64) -> None:
        """See `Store`."""
        for first in range(0, len(ids), IDS_PER_DELETE):
            self.client.delete(self.table, ids=ids[first : first + IDS_PER_DELETE].tolist())

    def build_index(self, record: Record) -> None:
        """See `Store`."""
        self.client.flush(self.table)
        kind, settings = {
            "flat": ("FLAT", {}),
            "ivf": ("IVF_FLAT", {"nlist": record.clusters}),
            "hnsw": ("HNSW", {"M": 32, "efConstruction": 200}),
        }[record.index]
        self._add_index(self.table, "vector", kind, settings)
        self.finish_delta(record)

    def finish_delta(self, record: Record) -> None:
        """Write new rows to a segment with an index, and load it: until then they are scored one by one."""
        self.client.flush(self.table)
        self.client.release_collection(self.table)
        self._load(self.table)

    def count(self) -> int:
        """See `Store`."""
        self._load(self.table)
        return int(self.client.query(self.table, filter="", output_fields=["count(*)"])[0]["count(*)"])

    def search(self, queries: Float32, k: int, record: Record, effort: int = 0) -> Found:
        """See `Store`."""
        self._load(self.table)
        name = {"ivf": "nprobe", "hnsw": "ef"}.get(record.index)
        found = self.client.search(
            self.table,
            data=list(queries),
            limit=k,
            output_fields=["key"],
            search_params={"metric_type": "IP", "params": {name: effort_of(record, k, effort)} if name else {}},
        )
        return found_of(
            [[(hit["item_id"], hit["entity"]["key"], hit["distance"]) for hit in hits] for hits in found], k
        )

    def _load(self, table: str) -> None:
        """Load a collection. After a flush Milvus Lite writes a segment's index in a thread of its own, in place: what
        is loaded meanwhile is half of it, and fails."""
        for wait in WAITS:
            with contextlib.suppress(MilvusException):
                return self.client.load_collection(table)
            time.sleep(wait)
        self.client.load_collection(table)

    def _create(self, name: str, schema: object, vector: str, kind: str, settings: dict[str, int]) -> None:
        self.client.create_collection(name, schema=schema, consistency_level="Strong")
        self._add_index(name, vector, kind, settings)
        self._load(name)

    def _add_index(self, name: str, vector: str, kind: str, settings: dict[str, int]) -> None:
        index = self.client.prepare_index_params()
        # Nested, since Milvus Lite 3.2 ignores settings that the client sends side by side with metric_type.
        index.add_index(vector, index_type=kind, metric_type="IP", params={"params": settings})
        self.client.create_index(name, index)


def rows_of(items: Items) -> list[dict[str, object]]:
    """Items as one dictionary per row."""
    return [
        {"item_id": item, "key": key, "vector": vector}
        for item, key, vector in zip(items.ids.tolist(), items.keys, items.vectors, strict=True)
    ]
