"""FAISS indexes in an export: against plain sorting, on several ranks, with filters; what is kept and refused."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from recgpt_torchrec.catalogue.rounds import Rounds
from recgpt_torchrec.catalogue.vectors import HeldVectors
from recgpt_torchrec.config import HNSW, IVF, PQ, Index, Retrieve
from recgpt_torchrec.data.ragged import Ragged
from recgpt_torchrec.distributed import processes
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.retrieval.exports import additions
from recgpt_torchrec.retrieval.exports.additions import commit_addition
from recgpt_torchrec.retrieval.exports.index_manifest import IndexManifest, IndexShard
from recgpt_torchrec.retrieval.exports.reading import Export, open_export, open_on_all_ranks
from recgpt_torchrec.retrieval.merging import merge_rule
from recgpt_torchrec.retrieval.search import choosing, index_files, stored
from recgpt_torchrec.retrieval.search.choosing import choose_kind, resolve
from recgpt_torchrec.retrieval.search.indexing import add_index, open_own_shards
from recgpt_torchrec.retrieval.search.searching import build_retrievers
from recgpt_torchrec.retrieval.search.sharded_index import ShardedIndex
from tests.retrieval.index_helpers import plain_lists, recall, vectors, write_vectors
from tests.support import change_json, read_files, stage
from tools.ranks import run_ranks

ITEMS, USERS, DIM = 1200, 60, 16
KINDS = {
    "flat": 1.0,
    "ivf": 0.9,
    "ivf_pq": 0.9,
    "hnsw": 0.95,
}
"""Recall@10 that each kind reaches at least."""
OPTIONS = {"hnsw": HNSW(build=60), "ivf": IVF(clusters=10, probes=5), "pq": PQ(m=8, bits=5)}


def settings(kind: str, **changes) -> Index:
    return Index(**{"kind": kind, "sample": 20, **OPTIONS, **changes})


@pytest.fixture(scope="module")
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


def index_of(export: Export) -> IndexManifest:
    assert export.manifest.index is not None
    return export.manifest.index


def searched(export: Export, queries: np.ndarray, k: int, allowed: np.ndarray | None = None):
    sharded = ShardedIndex(open_own_shards(export, index_of(export)), export.manifest.items, DIM, Rounds(), allowed)
    return sharded.search(queries, k)


@pytest.mark.parametrize("name", [f"{kind}-{shards}" for kind in KINDS for shards in (1, 3)])
def test_every_kind_finds_nearly_all_with_true_scores(kept, name):
    items, users = vectors(ITEMS, DIM), vectors(USERS, DIM, seed=1)
    found, scores = searched(kept[name], users, 10)
    assert recall(found, plain_lists(items, users, 10)) >= KINDS[name.split("-")[0]]
    assert (np.diff(scores, axis=1) <= 0).all()
    true = np.take_along_axis(users @ items.T, found, axis=1)
    np.testing.assert_allclose(scores, true, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0.5, 0.03])
@pytest.mark.parametrize("name", [f"{kind}-{shards}" for kind in KINDS for shards in (1, 3)])
def test_with_a_filter_lists_are_full_of_allowed_items(kept, name, share):
    items, users = vectors(ITEMS, DIM), vectors(USERS, DIM, seed=1)
    allowed = np.random.default_rng(2).random(ITEMS) < share
    allowed[:400] = False  # of three shards the first has none, and the second all
    allowed[400:800] |= share == 0.5
    found, scores = searched(kept[name], users, 10, allowed)
    assert allowed[found].all() and (found >= 0).all() and np.isfinite(scores).all()
    assert recall(found, plain_lists(items, users, 10, allowed)) >= KINDS[name.split("-")[0]]


@pytest.mark.parametrize("kind", KINDS)
def test_where_fewer_items_are_left_than_wanted_lists_end_with_minus_one(kept, kind):
    allowed = np.zeros(ITEMS, bool)
    allowed[[3, 700, 1100]] = True
    found, scores = searched(kept[f"{kind}-3"], vectors(4, DIM, seed=1), 6, allowed)
    if kind != "ivf":  # it may examine too few clusters
        assert np.sort(found, axis=1)[:, 3:].tolist() == [[3, 700, 1100]] * 4
    assert (found[:, 3:] == -1).all() and np.isneginf(scores[found < 0]).all() and np.isfinite(scores[found >= 0]).all()
    found, _ = searched(kept[f"{kind}-3"], vectors(4, DIM, seed=1), 6, np.zeros(ITEMS, bool))
    assert (found == -1).all()


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_exact_search_reads_block_by_block_where_memory_is_short(kept, monkeypatch, share):
    items, users = vectors(ITEMS, DIM), vectors(USERS, DIM, seed=1)
    allowed = np.random.default_rng(2).random(ITEMS) < share if share < 1 else None
    monkeypatch.setattr(stored, "BLOCK_BYTES", 4 * DIM * 70)
    for room in (10**9, 0):
        monkeypatch.setattr(stored, "available_bytes", lambda device, room=room: room)
        search = stored.StoredExactSearch(kept["flat-1"], Rounds(), allowed)
        for _ in range(2):
            found = search.lists(users[:, None], 9, None).items[:, 0].numpy()
            np.testing.assert_array_equal(found, plain_lists(items, users, 9, allowed))
        made: Any = search.search if allowed is None else getattr(search.search, "search", None)
        assert isinstance(made.catalogue.vectors, HeldVectors) == bool(room)


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_mapped_into_memory(kept, kind):
    export = kept[f"{kind}-1"]
    own = open_own_shards(export, index_of(export))
    maps = Path("/proc/self/maps").read_text()
    assert len(own) == 1 and f"{export.path}/{index_of(export).shards[0].path}" in maps


def test_the_manifest_tells_what_the_index_is_and_how_good(kept):
    items, users = vectors(ITEMS, DIM), vectors(USERS, DIM, seed=1)
    for name, export in kept.items():
        kind, shards = name.split("-")
        index = index_of(export)
        assert index.kind == kind and index.faiss == faiss.__version__
        bounds = [(shard.first, shard.stop) for shard in index.shards]
        assert bounds == ([(0, 1200)] if shards == "1" else [(0, 400), (400, 800), (800, 1200)])
        sizes = [(Path(export.path) / shard.path).stat().st_size for shard in index.shards]
        assert sizes == [shard.bytes for shard in index.shards]
        measured = index.measured
        assert measured["queries"] == 20 and measured["threads"] >= 1 and measured["queries_per_second"] > 0
        sample = users[np.linspace(0, USERS - 1, 20).astype(int)]  # all users are in one row group
        for k in (10, 50):
            found, _ = searched(export, sample, k)
            own = recall(found, plain_lists(items, sample, k))
            assert measured[f"recall@{k}"] == pytest.approx(own, abs=0.02 if kind == "hnsw" else 1e-6), (name, k)


def test_an_index_is_no_part_of_the_fingerprint_and_older_exports_have_none(tmp_path):
    export = write_vectors(tmp_path / "e", vectors(ITEMS, DIM), vectors(USERS, DIM, seed=1))
    before = open_export(export.path).fingerprint
    add_index(export, settings("flat"))
    assert open_export(export.path).fingerprint == before
    change_json(tmp_path / "e/manifest.json", lambda manifest: manifest.pop("index"))
    assert open_export(export.path).manifest.index is None and open_export(export.path).fingerprint == before


def test_the_same_index_is_there_already_and_another_replaces_it(tmp_path):
    export = write_vectors(tmp_path / "e", vectors(ITEMS, DIM), vectors(USERS, DIM, seed=1))
    (tmp_path / "e/index/dead").mkdir(parents=True)  # a run that was killed
    (tmp_path / "e/index/dead/shard-00000.faiss").write_bytes(b"half")
    shutil.copytree(tmp_path / "e/index/dead", tmp_path / "e/index/alive")  # a run that writes
    for path in (tmp_path / "e/index/dead/shard-00000.faiss", tmp_path / "e/index/dead"):
        os.utime(path, (time.time() - 90_000,) * 2)
    first, there = add_index(export, settings("ivf", shards=2))
    assert (tmp_path / "e/index/alive/shard-00000.faiss").read_bytes() == b"half"
    shutil.rmtree(tmp_path / "e/index/alive")
    assert not there and {path.name for path in (tmp_path / "e/index").iterdir()} == {
        first.shards[0].path.split("/")[1]
    }
    files = read_files(tmp_path / "e")
    assert add_index(open_export(export.path), settings("ivf")) == (first, True)  # of however many shards
    assert read_files(tmp_path / "e") == files
    # The files stay where only the search differs; what is measured does not.
    wide, there = add_index(open_export(export.path), settings("ivf", ivf=IVF(clusters=10, probes=10)))
    assert not there and wide.shards == first.shards and wide.measured["recall@50"] == 1.0
    assert first.measured["recall@50"] < 1.0 and wide.parameters == {"ivf.clusters": 10, "ivf.probes": 10}
    assert add_index(open_export(export.path), settings("ivf", ivf=IVF(clusters=10))) == (wide, True)  # no probes given
    other, there = add_index(open_export(export.path), settings("ivf", ivf=IVF(clusters=9, probes=5)))
    assert not there and not (tmp_path / "e" / first.shards[0].path).exists()
    assert open_export(export.path).manifest.index == other
    assert len(list((tmp_path / "e").rglob("*.faiss"))) == len(other.shards) == 1


def retrieval(export: Export, **options) -> Retrieve:
    return resolve(Retrieve(export=export.path, output="", k=5, **options), export)


def test_auto_is_the_index_of_the_export_searched_as_it_was_measured(kept, tmp_path):
    config = retrieval(kept["ivf-3"])
    assert (config.index, config.ivf) == ("ivf", IVF(clusters=10, probes=5))
    assert retrieval(kept["ivf-3"], ivf=IVF(probes=2)).ivf == IVF(clusters=10, probes=2)
    assert retrieval(kept["ivf-3"], index="exact").index == "exact"
    assert retrieval(kept["ivf-3"], index="hnsw").hnsw == HNSW(search=128)
    with pytest.raises(InputError, match=r"--ivf\.clusters is 7, but the index in .* was built with 10; leave it out"):
        retrieval(kept["ivf-3"], ivf=IVF(clusters=7))
    without = write_vectors(tmp_path / "e", vectors(50, DIM), vectors(5, DIM))
    config = retrieval(without)
    assert (config.index, config.ivf, config.hnsw, config.pq) == ("exact", IVF(probes=64), HNSW(search=128), PQ())


def test_auto_follows_the_number_and_the_size_of_the_vectors():
    sizes = {(1, 64): "flat", (100_000, 2000): "flat", (100_001, 8): "ivf", (2**24, 64): "ivf", (2**24, 65): "ivf_pq"}
    for (items, dim), kind in sizes.items():
        assert choose_kind("auto", items, dim) == kind
    assert choose_kind("hnsw", 1, 64) == "hnsw"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "ivf", "ivf": IVF(clusters=41)}, r"--index.ivf.clusters is 41, but the export has 40 items; give"),
        ({"kind": "ivf", "ivf": IVF(clusters=21), "shards": 2}, r"has 20 items in each of 2 shards; give fewer"),
        ({"kind": "ivf_pq", "pq": PQ(m=3, bits=4)}, r"--index.pq.m is 3, but the vectors have 16 numbers; give one of"),
        ({"kind": "ivf_pq", "pq": PQ()}, r"codes of 8 bits need at least 256 items, but the export has 40; choose"),
    ],
)
def test_options_that_do_not_fit_the_export_are_refused(tmp_path, changes, message):
    export = write_vectors(tmp_path / "e", vectors(40, DIM), vectors(5, DIM))
    with pytest.raises(InputError, match=message):
        add_index(export, Index(**changes))
    assert not (tmp_path / "e/index").exists()


def test_retrieve_speaks_of_ranks_where_an_index_is_built_now():
    config = Retrieve(export="e", output="", ivf=IVF(clusters=21))
    with pytest.raises(InputError, match=r"--ivf\.clusters is 21, but the export has 20 items in each of 2 ranks"):
        choosing.choose_parameters("ivf", config, 40, DIM, 2)
    with pytest.raises(InputError, match=r"in each of 2 ranks; choose the kind flat, or fewer --pq\.bits$"):
        choosing.choose_parameters("ivf_pq", Retrieve(export="e", output=""), 80, DIM, 2)


def test_codes_are_cut_by_a_divisor_of_the_length():
    for dim, m in {64: 16, 50: 10, 7: 1, 2: 1, 12: 3}.items():
        assert choosing.choose_parameters("ivf_pq", Index(), 1000, dim, 1)["pq.m"] == m


def test_more_clusters_than_items_of_a_small_shard_never_come_of_the_rule(tmp_path):
    for items in (1, 2, 39, 40, 300):
        export = write_vectors(tmp_path / str(items), vectors(items, DIM), vectors(5, DIM))
        index, _ = add_index(export, Index(kind="ivf", shards=7, sample=5))
        assert len(index.shards) == min(7, items) and index.measured["recall@50"] == 1.0
        assert add_index(export, Index(kind="ivf", shards=7, sample=5)) == (index, True)


def harm(export: Export, how: str) -> str:
    """Harm the second shard or the vectors."""
    path = Path(export.path) / index_of(export).shards[1].path
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "short":
        path.write_bytes(data[:-1])
    elif how == "another byte":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif how == "other vectors":
        other = write_vectors(path.parents[2] / "other", vectors(ITEMS, DIM, seed=5), vectors(USERS, DIM))
        shutil.copytree(f"{other.path}/items", f"{export.path}/items", dirs_exist_ok=True)
        parts = json.loads(Path(other.path, "manifest.json").read_text())["item_parts"]
        change_json(Path(export.path, "manifest.json"), lambda manifest: manifest.update(item_parts=parts))
        shutil.rmtree(other.path)
    return path.name


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "is missing"),
        ("short", "is damaged: it has"),
        ("another byte", "have another checksum than the manifest promises"),
        ("other vectors", "its index was made of other vectors than those it holds now"),
    ],
)
def test_a_damaged_or_foreign_index_is_refused_and_can_be_built_again(kept, tmp_path, capfd, how, message):
    path = tmp_path / "e"
    shutil.copytree(kept["hnsw-3"].path, path)
    harm(open_export(str(path)), how)
    options = {"--export": path, "--output": tmp_path / "lists", "--k": 5}
    assert stage("retrieve", options) == 2
    said = capfd.readouterr().err
    assert message in said and "python -m recgpt_torchrec.index --export" in said and "Traceback" not in said
    assert not (tmp_path / "lists").exists()
    assert stage("retrieve", {**options, "--index": "exact"}) == 0
    again = {"--export": path, "--index.kind": "hnsw", "--index.hnsw.build": 60, "--index.shards": 3}
    assert stage("index", again) == 0
    assert "Written" in capfd.readouterr().out
    assert stage("retrieve", {**options, "--output": tmp_path / "new"}) == 0
    assert stage("index", again) == 0
    assert "Already there" in capfd.readouterr().out


def test_a_file_that_is_another_index_than_promised_is_refused(kept, tmp_path):
    path = tmp_path / "e"
    shutil.copytree(kept["hnsw-1"].path, path)
    other = kept["flat-1"]

    def swap(manifest):
        shard = manifest["index"]["shards"][0]
        flat = json.loads(Path(other.path, "manifest.json").read_text())["index"]["shards"][0]
        shutil.copy(Path(other.path) / flat["path"], path / shard["path"])
        shard.update(bytes=flat["bytes"], checksums=flat["checksums"])

    change_json(path / "manifest.json", swap)
    export = open_export(str(path))
    with pytest.raises(InputError, match="is not the index that the manifest promises"):
        open_own_shards(export, index_of(export))
    (path / index_of(export).shards[0].path).write_bytes(b"no index")
    noise = index_files.IndexShard(
        path=index_of(export).shards[0].path, first=0, stop=ITEMS, bytes=8, checksums=["e6c6d3b4"]
    )
    with pytest.raises(InputError, match="another checksum|cannot be read by FAISS"):
        index_files.open_shards(str(path), index_of(export), [noise], DIM)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "tree"}, "index.kind is 'tree', it must be one of flat, ivf, ivf_pq, hnsw"),
        ({"shards": []}, "its index has 0 items, but the export 10"),
        ({"shards": [IndexShard(path="../x", first=0, stop=10, bytes=1, checksums=["0"])]}, "not a path below"),
        ({"shards": [IndexShard(path="x", first=1, stop=10, bytes=1, checksums=["0"])]}, "after 0 others"),
        ({"shards": [IndexShard(path="x", first=0, stop=10, bytes=1, checksums=[])]}, "0 checksums of x"),
        ({"parameters": {"ivf.probes": 1}}, "index.parameters has ivf.probes, it must have "),
        ({"kind": "ivf", "parameters": {"ivf.probes": -1, "ivf.clusters": 1}}, "index.parameters.ivf.probes is -1"),
        ({"kind": "ivf", "parameters": {"ivf.probes": 1, "ivf.clusters": 2**31}}, "ivf.clusters is 2147483648"),
        ({"measured": {"recall@10": 1.0}}, "index.measured has recall@10, it must have recall@10, recall@50"),
    ],
)
def test_a_manifest_of_an_impossible_index_is_refused(changes, message):
    good: dict[str, Any] = {
        "kind": "flat",
        "shards": [IndexShard(path="x", first=0, stop=10, bytes=1, checksums=["0"])],
    }
    IndexManifest(**good).check(10)
    with pytest.raises(ValueError, match=message):
        IndexManifest(**(good | changes)).check(10)


def test_on_a_store_files_are_read_whole(kept):
    import fsspec

    export = kept["ivf_pq-3"]
    memory = fsspec.filesystem("memory")
    memory.put(export.path, "/export", recursive=True)
    try:
        stored = open_export("memory://export")
        found, scores = searched(stored, vectors(9, DIM, seed=1), 10)
        expected, values = searched(export, vectors(9, DIM, seed=1), 10)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_allclose(scores, values, rtol=1e-6)
        index, _ = add_index(stored, settings("flat", shards=2))
        assert open_export("memory://export").manifest.index == index
        found, _ = searched(stored, vectors(9, DIM, seed=1), 10)
        np.testing.assert_array_equal(found, plain_lists(vectors(ITEMS, DIM), vectors(9, DIM, seed=1), 10))
    finally:
        memory.rm("/export", recursive=True)


# ----------------------------------------------------------------------------------------------------- several ranks


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


def test_finished_lists_stay_when_the_export_gets_an_index(tmp_path, capfd):
    path = write_vectors(tmp_path / "e", vectors(ITEMS, DIM), vectors(USERS, DIM, seed=1)).path
    given = {"--export": path, "--output": tmp_path / "lists", "--k": 5}
    assert stage("retrieve", given) == 0
    add_index(open_export(path), settings("ivf"))
    capfd.readouterr()
    assert stage("retrieve", given) == 0
    said = capfd.readouterr().out
    assert "Already there" in said and "index       exact, " in said
    for changes in ({"--index": "ivf"}, {"--ivf.probes": 7}):  # these ask for other lists
        assert stage("retrieve", given | changes) == 2
        assert "index: exact there, ivf now" in capfd.readouterr().err
    assert stage("retrieve", given | {"--k": 6}) == 2
    said = capfd.readouterr().err
    assert "k: 5 there, 6 now" in said and "ivf" not in said


@pytest.mark.parametrize(
    ("held", "options", "message"),
    [
        ("hnsw-1", {"pq": PQ(m=16)}, r"--pq\.m is 16, but the search of .* is hnsw .*; leave it out, or .* ivf_pq"),
        ("hnsw-1", {"ivf": IVF(probes=7)}, r"--ivf\.probes is 7, .* leave it out, or give --index ivf or ivf_pq"),
        ("hnsw-1", {"index": "exact", "hnsw": HNSW(neighbours=5)}, r"--hnsw\.neighbours is 5, .* is exact"),
        ("flat-1", {"hnsw": HNSW(search=5)}, r"--hnsw\.search is 5, .* is flat \(--index auto\)"),
        ("ivf-1", {"pq": PQ(refine=2)}, r"--pq\.refine is 2, .* is ivf"),
        ("hnsw-1", {"hnsw": HNSW(build=7)}, r"--hnsw\.build is 7, but the index in .* was built with 60"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(kept, held, options, message):
    with pytest.raises(InputError, match=message):
        retrieval(kept[held], **options)


def test_options_that_do_not_fit_the_old_shards_make_new_ones(tmp_path):
    export = write_vectors(tmp_path / "e", vectors(60, DIM), vectors(5, DIM))
    add_index(export, Index(kind="ivf", shards=3, sample=5))
    index, there = add_index(export, Index(kind="ivf", ivf=IVF(clusters=21), sample=5))
    assert not there and len(index.shards) == 1 and index.parameters["ivf.clusters"] == 21


def test_another_sample_is_measured_anew_and_may_be_more_than_a_batch_of_users(tmp_path):
    export = write_vectors(tmp_path / "e", vectors(90, DIM), vectors(USERS, DIM, seed=1), rows=7)
    first, _ = add_index(export, settings("flat"))
    assert first.measured["queries"] == 20
    for sample, queries in {25: 25, 1000: USERS}.items():
        index, there = add_index(export, settings("flat", sample=sample))
        assert not there and index.measured["queries"] == queries and index.shards == first.shards
        for same in (sample, 0):
            assert add_index(export, settings("flat", sample=same)) == (index, True)


def test_an_index_that_is_replaced_while_it_is_opened_is_not_called_damaged(tmp_path, monkeypatch):
    export = write_vectors(tmp_path / "e", vectors(ITEMS, DIM), vectors(USERS, DIM))
    add_index(export, settings("flat"))
    before = open_export(export.path)
    add_index(export, settings("flat", shards=2))
    with pytest.raises(InputError, match="its index was replaced while it was opened; run the same command again"):
        open_own_shards(before, index_of(before))
    files = read_files(tmp_path / "e")
    with pytest.raises(InputError, match="its index was replaced meanwhile; run the same command again"):
        commit_addition(before, "index", index_of(before))
    assert read_files(tmp_path / "e") == files

    def fail(path):
        raise OSError("no permission")

    monkeypatch.setattr(additions, "remove", fail)
    index, _ = add_index(export, settings("flat", shards=3))  # the old files stay, the index is whole
    assert open_export(export.path).manifest.index == index and len(list((tmp_path / "e").rglob("*.faiss"))) == 5


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
