"""Exports with an index of each kind."""

import pytest

from recgpt_torchrec.retrieval.exports.reading import Export, open_export
from recgpt_torchrec.retrieval.search.indexing import add_index
from tests.retrieval.index_helpers import DIM, ITEMS, KINDS, USERS, settings, vectors, write_vectors


@pytest.fixture(scope="session")
def kept(tmp_path_factory) -> dict[str, Export]:
    """An export with an index of each kind, in one shard and in three."""
    folder = tmp_path_factory.mktemp("indexes")
    items, users = vectors(ITEMS, DIM), vectors(USERS, DIM, seed=1)
    exports = {}
    for kind in KINDS:
        for shards in (1, 3):
            export = write_vectors(folder / f"{kind}-{shards}", items, users)
            add_index(export, settings(kind, shards=shards))
            exports[f"{kind}-{shards}"] = open_export(export.path)
    return exports
