"""FAISS indexes in an export: what is kept, replaced and measured anew; what is refused as damaged or foreign."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from recgpt_torchrec.config import IVF, Index
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.retrieval.exports import additions
from recgpt_torchrec.retrieval.exports.additions import commit_addition
from recgpt_torchrec.retrieval.exports.index_manifest import IndexManifest, IndexShard
from recgpt_torchrec.retrieval.exports.reading import Export, open_export
from recgpt_torchrec.retrieval.search import index_files
from recgpt_torchrec.retrieval.search.indexing import add_index, open_own_shards
from tests.retrieval.index_helpers import DIM, ITEMS, USERS, index_of, settings, vectors, write_vectors
from tests.support import change_json, read_files, stage


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
