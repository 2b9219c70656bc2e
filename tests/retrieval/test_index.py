"""FAISS indexes in an export: against plain sorting and with filters, what the manifest says, which one is chosen."""

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from recgpt_torchrec.catalogue.rounds import Rounds
from recgpt_torchrec.catalogue.vectors import HeldVectors
from recgpt_torchrec.config import HNSW, IVF, PQ, Index, Retrieve
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.retrieval.exports.reading import Export, open_export
from recgpt_torchrec.retrieval.search import choosing, stored
from recgpt_torchrec.retrieval.search.choosing import choose_kind, resolve
from recgpt_torchrec.retrieval.search.indexing import add_index, open_own_shards
from recgpt_torchrec.retrieval.search.sharded_index import ShardedIndex
from tests.retrieval.index_helpers import (
    DIM,
    ITEMS,
    KINDS,
    USERS,
    index_of,
    plain_lists,
    recall,
    settings,
    vectors,
    write_vectors,
)
from tests.support import change_json


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
