"""FAISS indexes in an export, built and searched by several ranks."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recgpt_torchrec.catalogue.rounds import Rounds
from recgpt_torchrec.config import IVF, Retrieve
from recgpt_torchrec.data.ragged import Ragged
from recgpt_torchrec.distributed import processes
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.retrieval.exports.index_manifest import IndexManifest
from recgpt_torchrec.retrieval.exports.reading import open_export, open_on_all_ranks
from recgpt_torchrec.retrieval.merging import merge_rule
from recgpt_torchrec.retrieval.search import stored
from recgpt_torchrec.retrieval.search.choosing import resolve
from recgpt_torchrec.retrieval.search.indexing import add_index, open_own_shards
from recgpt_torchrec.retrieval.search.searching import build_retrievers
from recgpt_torchrec.retrieval.search.sharded_index import ShardedIndex
from tests.retrieval.index_helpers import (
    DIM,
    ITEMS,
    USERS,
    index_of,
    plain_lists,
    recall,
    settings,
    vectors,
    write_vectors,
)
from tests.support import stage
from tools.ranks import run_ranks


def lists_of_rank(rank: int, world_size: int, path: str, **options) -> np.ndarray:
    """Lists of users rank, rank + world_size, ... without some items, in batches whose number differs by rank."""
    export = open_export(path)
    config = resolve(Retrieve(export=path, output="", k=8, **options), export)
    exact, retriever, finish = build_retrievers(config, export, merge_rule("score", 0))
    users = vectors(USERS, DIM, seed=1)[rank::world_size]
    seen = [[7 * user % ITEMS, user] for user in range(rank, USERS, world_size)]
    rows = []
    for first in range(0, len(users), 5 + 9 * rank):
        part = slice(first, first + 5 + 9 * rank)
        rows.append(retriever.lists(users[part, None], Ragged.from_lists(seen[part])).items.numpy())
        if rank == 0:
            exact.lists(users[part, None])
    finish()
    return np.concatenate(rows)


def build_and_search(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """Write indexes on these ranks, and search those that one rank and these wrote."""
    items, users = vectors(ITEMS, DIM), vectors(USERS, DIM, seed=1)
    lists: dict[str, Any] = {}
    stored.BLOCK_BYTES = 4 * DIM * 100  # so that what is read block by block has several
    for kind in ("flat", "hnsw"):
        path = f"{folder}/{kind}-{world_size}"
        if rank == 0:
            write_vectors(Path(path), items, users)
        gathered()
        index, there = add_index(open_export(path), settings(kind))
        assert not there and len(index.shards) == world_size and add_index(open_export(path), settings(kind))[1]
        assert index.measured["ranks"] == world_size and index.measured["recall@10"] > 0.95
        assert kind == "hnsw" or index.measured["recall@50"] == 1.0
        for written_by in (1, world_size):
            lists[f"{kind}-{written_by}"] = lists_of_rank(rank, world_size, f"{folder}/{kind}-{written_by}")
    lists["built now"] = lists_of_rank(rank, world_size, f"{folder}/flat-1", index="ivf", ivf=IVF(probes=100))
    few = f"{folder}/few-{world_size}"  # fewer items than ranks
    if rank == 0:
        write_vectors(Path(few), items[:2], users[:1])
    gathered()
    assert len(add_index(open_export(few), settings("flat"))[0].shards) == min(2, world_size)
    export, rounds = open_export(few), Rounds()
    found, _ = ShardedIndex(open_own_shards(export, index_of(export)), 2, DIM, rounds).search(users[:3], 2)
    rounds.finish()
    np.testing.assert_array_equal(found, plain_lists(items[:2], users[:3], 2))
    lists["error"] = error_of_one_rank(rank, world_size, f"{folder}/hnsw-1")
    return lists


def gathered() -> None:
    from recgpt_torchrec.distributed.processes import gather_objects

    gather_objects(None)


def error_of_one_rank(rank: int, world_size: int, path: str) -> str:
    """The error of every rank where the last one cannot read the vectors that the exact search needs."""
    export = open_export(path)
    config = resolve(Retrieve(export=path, output="", k=8), export)
    exact, _, finish = build_retrievers(config, export, merge_rule("score", 0))
    if rank == world_size - 1:

        def fail(*_):
            raise InputError("items/ is gone")

        setattr(export, "item_vectors", fail)  # noqa: B010 (mypy lets no method be assigned)
    try:
        if rank == 0:
            exact.lists(vectors(3, DIM)[:, None])
        finish()
    except InputError as error:
        finish()  # returns at once: no rank waits
        return str(error)
    return ""


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_find_the_same_lists_whatever_number_of_ranks_wrote_the_shards(kept, tmp_path, world_size):
    items, users = vectors(ITEMS, DIM), vectors(USERS, DIM, seed=1)
    for kind in ("flat", "hnsw"):
        shutil.copytree(kept[f"{kind}-1"].path, tmp_path / f"{kind}-1")
    results = run_ranks(build_and_search, world_size, str(tmp_path))
    expected = np.full((USERS, 8), -1)
    for user in range(USERS):
        order = plain_lists(items, users[user : user + 1], 10)[0].tolist()
        expected[user] = [item for item in order if item not in (7 * user % ITEMS, user)][:8]
    for name in ("flat-1", f"flat-{world_size}", "hnsw-1", f"hnsw-{world_size}", "built now"):
        found = np.full((USERS, 8), -1)
        for rank, lists in enumerate(results):
            found[rank::world_size] = lists[name]
        if name.startswith("flat") or name == "built now":  # which examines all clusters
            np.testing.assert_array_equal(found, expected, name)
        assert recall(found, expected) > 0.95, name
    alone = lists_of_rank(0, 1, str(tmp_path / f"flat-{world_size}"))
    np.testing.assert_array_equal(alone, expected)
    assert [lists["error"] for lists in results] == ["items/ is gone"] * world_size


def index_seen(rank: int, world_size: int, folder: str) -> tuple[IndexManifest | None, str]:
    """The index of an export of which each rank sees another state, and the error where the last rank sees none."""
    index = open_on_all_ranks(f"{folder}/{rank}").manifest.index
    with pytest.raises(InputError) as caught:
        open_on_all_ranks(f"{folder}/{rank if rank < world_size - 1 else 'none'}")
    return index, str(caught.value)


def test_every_rank_searches_the_index_that_the_first_sees(kept, tmp_path):
    shutil.copytree(kept["flat-3"].path, tmp_path / "0")
    shutil.copytree(kept["ivf-1"].path, tmp_path / "1")
    found = run_ranks(index_seen, 2, str(tmp_path))
    assert [index for index, _ in found] == [index_of(kept["flat-3"])] * 2
    assert found[0][1] == found[1][1] and str(tmp_path / "none") in found[0][1]


def test_ranks_wait_for_a_long_build(kept, tmp_path, monkeypatch):
    timeouts, init = [], processes.dist.init_process_group

    def record(*args, **options):
        timeouts.append(options["timeout"].total_seconds())
        return init(*args, **options)

    monkeypatch.setattr(processes.dist, "init_process_group", record)
    path = shutil.copytree(kept["flat-1"].path, tmp_path / "e")
    assert stage("index", {"--export": path, "--index.kind": "flat"}) == 0
    assert stage("retrieve", {"--export": path, "--output": tmp_path / "lists", "--k": 5, "--index": "ivf"}) == 0
    assert timeouts == [86_400.0] * 2
