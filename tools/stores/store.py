"""The interface of a vector store that holds an export's items, and the record of what it holds.

A store is one table (collection) of items: item_id, key and vector, and beside it a record of the state that it holds.
A new store is a module with a subclass of `Store`, and a line in `STORES`. Importing this module imports no store.
"""

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recgpt_torchrec.errors import InputError

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

STORES = {
    "lancedb": "tools.stores.lancedb_store.LanceStore",
    "milvus": "tools.stores.milvus_store.MilvusStore",
    "pgvector": "tools.stores.pgvector_store.PgvectorStore",
    "duckdb": "tools.stores.duckdb_store.DuckdbStore",
}
"""Classes by the value of `--store`."""
INDEXES = ("flat", "ivf", "hnsw")
"""Values of `--index`: exact search, inverted lists of clusters, a graph of neighbours."""
SCRATCH = "changed items"
"""Name of a table of changes on their way; no `--table` can have it."""
CLUSTER = 39
"""Minimum number of items per cluster of an IVF index."""
HNSW_EFFORT = 200
"""Default of `--effort` for HNSW."""
IVF_EFFORT = 64
"""Default of `--effort` for IVF, as in `retrieve`."""


class Items(NamedTuple):
    """Some items of an export or delta."""

    ids: Int64
    """[n] int64."""
    keys: list[str]
    """n keys, as in the raw log."""
    vectors: Float32
    """[n, dim] float32."""


class Found(NamedTuple):
    """Lists of items, one per query, best first."""

    ids: Int64
    """[queries, k] int64; -1 at the end where a store found fewer."""
    keys: npt.NDArray[Any]
    """[queries, k] str; empty beside -1."""
    scores: Float32
    """[queries, k] float32 inner products; -inf beside -1."""


@dataclass(kw_only=True)
class Record:
    """What a store holds. It is written before a change begins, and again when the change is whole."""

    state: str = ""
    """State of the export or delta that the store holds whole, see `DeltaManifest`; empty while an export is loaded."""
    pending: str = ""
    """State that is being loaded or applied; empty: nothing is."""
    pending_path: str = ""
    """Folder of it, for messages."""
    path: str = ""
    """Folder of the last export or delta, for messages."""
    dim: int = 0
    items: int = 0
    index: str = "flat"
    """One of `INDEXES`."""
    clusters: int = 0
    """Number of clusters of an IVF index."""


class Store(ABC):
    """A table of items in a vector store.

    Use it as a context manager: `with open_store("lancedb", "runs/demo/lance") as store: store.search(queries, 50)`.

    Args:
        uri: where the store is; its form is the store's own.
        table: name of the table; its record is in `<table>_state`.
        creates: whether a store that is not there yet is made.

    Raises:
        InputError: the table cannot have this name, or there is no store and none is to be made.
    """

    name: str
    """Value of `--store`."""
    indexes: tuple[str, ...] = INDEXES
    """The values of `--index` that it has."""
    batch_bytes = 2**24
    """Maximum bytes of vectors that are sent at once."""
    errors: tuple[type[Exception], ...] = ()
    """What its client raises."""

    def __init__(self, uri: str, table: str = "items", *, creates: bool = True) -> None:
        if not table.isidentifier():
            raise InputError(f"--table is {table!r}; give a name of letters, digits and underscores")
        self.uri, self.table, self.creates = uri, table, creates
        self.state_table = f"{table}_state"
        if not creates and not self.is_there():
            raise InputError(f"there is no {self.name} store at {uri}; check --uri, or load an export first")
        self.connect()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def is_there(self) -> bool:
        """Whether there is a folder or file at the URI; of a server, connecting tells."""
        path = self.uri.removeprefix("file://")
        return "://" in path or Path(path).exists()

    def read_record(self) -> Record | None:
        """The record of what the store holds; None: no export was ever loaded into this table."""
        text = self.read_state()
        return None if text is None else Record(**json.loads(text))

    def write_record(self, record: Record) -> None:
        """Replace the record."""
        self.write_state(json.dumps(asdict(record)))

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Groups changes; readers see all of them or none where the store has transactions."""
        yield

    @abstractmethod
    def connect(self) -> None:
        """Open the store."""

    @abstractmethod
    def close(self) -> None:
        """Close the store; what was written stays."""

    @abstractmethod
    def read_state(self) -> str | None:
        """The text that `write_state` wrote last; None: none."""

    @abstractmethod
    def write_state(self, text: str) -> None:
        """Replace the text of the record, in one step."""

    @abstractmethod
    def has_table(self) -> bool:
        """Whether the table of items exists, or another one that creating it could replace."""

    @abstractmethod
    def create(self, dim: int) -> None:
        """Drop the table of items if it exists, and create an empty one for vectors of length `dim`."""

    @abstractmethod
    def insert(self, items: Items) -> None:
        """Add items that the table does not have."""

    @abstractmethod
    def upsert(self, items: Items) -> None:
        """Add items, or replace the keys and vectors of those with the same ids."""

    @abstractmethod
    def delete(self, ids: Int64) -> None:
        """Remove the items with these ids [n]; those that are not there do no harm."""

    @abstractmethod
    def build_index(self, record: Record) -> None:
        """Build the index `record.index` after the last insert, and make the table ready for searches."""

    def prepare_delta(self) -> None:  # noqa: B027 (most stores need nothing)
        """Make the table ready for the changes of a delta."""

    def finish_delta(self, record: Record) -> None:  # noqa: B027 (some keep their index up to date by themselves)
        """Bring the index `record.index` up to date after a delta."""

    @abstractmethod
    def count(self) -> int:
        """Number of items."""

    @abstractmethod
    def search(self, queries: Float32, k: int, record: Record, effort: int = 0) -> Found:
        """The items with the largest inner products.

        Args:
            queries: [queries, dim] float32, as they are in the export: not normalised.
            k: items per query.
            record: of the store.
            effort: IVF: clusters to search; HNSW: candidates held (ef), at least k; 0: the default.
        """


def open_store(name: str, uri: str, table: str = "items", *, creates: bool = True) -> Store:
    """Open the store `name`, a key of `STORES`.

    Raises:
        InputError: its packages are not installed, it does not answer, or it is not there and not to be made.
    """
    module, _, class_name = STORES[name].rpartition(".")
    try:
        store_class = getattr(importlib.import_module(module), class_name)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith(("tools", "recgpt_torchrec")):
            raise
        raise InputError(
            f"--store {name} needs the package {error.name}, which is not installed; run make stores, and start this "
            "with .venv-stores/bin/python"
        ) from None
    try:
        return store_class(uri, table, creates=creates)
    except InputError:  # is a ValueError, which some clients raise too
        raise
    except store_class.errors as error:
        raise InputError(f"{name} cannot open {uri}: {one_line(error)}; check --uri") from error


def has_name(names: list[str], name: str) -> bool:
    """Whether one of `names` is `name`, case aside: they are folders, and some disks do not tell case apart."""
    return name.lower() in {each.lower() for each in names}


def one_line(error: Exception) -> str:
    """The message of an error of a store's client as one line of at most 300 characters."""
    return " ".join(str(error).split())[:300].rstrip(".")


def effort_of(record: Record, k: int, effort: int) -> int:
    """The clusters that IVF searches, or the candidates that HNSW holds, for lists of `k`."""
    if record.index == "ivf":
        return min(record.clusters, effort or IVF_EFFORT)
    return max(k, effort or HNSW_EFFORT)


def cluster_count(items: int) -> int:
    """Number of clusters of an IVF index of so many items."""
    return max(1, min(round(4 * items**0.5), items // CLUSTER))


def found_of(rows: list[list[tuple[int, str, float]]], k: int) -> Found:
    """Lists (id, key, score) of some queries, shorter than `k` where less was found, as arrays."""
    ids = np.full((len(rows), k), -1, np.int64)
    keys = np.full((len(rows), k), "", object)
    scores = np.full((len(rows), k), -np.inf, np.float32)
    for number, row in enumerate(rows):
        if row:
            ids[number, : len(row)], keys[number, : len(row)], scores[number, : len(row)] = zip(*row, strict=True)
    return Found(ids, keys, scores)


def table_of(items: Items) -> pa.Table:
    """Items as an Arrow table of the columns item_id, key and vector."""
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(items.vectors.reshape(-1)), items.vectors.shape[1])
    return pa.table({"item_id": items.ids, "key": pa.array(items.keys, pa.string()), "vector": vectors})
