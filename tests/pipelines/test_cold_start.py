"""`pipelines/cold_start.py`: what is cold is never trained, exported and listed all the same; the report."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipelines import cold_start
from recgpt_torchrec.catalogue.ranks import both_ranks
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.ragged import Ragged
from tests.pipelines.test_inputs import CONFIG, table_words
from tests.pipelines.test_inputs import log as log
from tests.pipelines.test_paper import InProcess, executor
from tests.support import walks, write_dataset

__all__ = ["executor", "log"]  # fixtures


def read_rows(path: Path) -> dict[str, list[tuple[int, str]]]:
    """Time and item of each row, by user."""
    rows: dict[str, list[tuple[int, str]]] = {}
    for row in pq.read_table(path).to_pylist():
        rows.setdefault(row["user_id"], []).append((row["timestamp"], row["item_id"]))
    return rows


def test_rows_are_split_as_a_plain_loop_splits_them(tmp_path: Path) -> None:
    histories = [*walks(120, 40, longest=20), [5], [7, 7]]
    dataset = write_dataset(tmp_path / "data", histories, items=41)
    cold_start.split_rows(dataset, tmp_path / "rows", 0.25, seed=1)
    words = (tmp_path / "rows/cold.csv").read_text().split("\n")
    cold = {int(word.removeprefix("item ")) for word in words[1:] if word}
    assert words[0] == "item_id" and len(cold) == 10
    expected: dict[str, dict[str, list[tuple[int, str]]]] = {"train": {}, "validation": {}, "test": {}}
    for user, items in enumerate(histories):
        rows = list(enumerate(items))
        last = max((time for time, item in rows if item in cold), default=-1)
        before = [row for row in rows if row[1] not in cold and row[0] < last]
        parts = {"train": [row for row in rows if row[1] not in cold]}
        if len(before) >= 3:
            parts = {"train": before[:-1], "validation": before[-1:], "test": [rows[last]]}
        for name, some in parts.items():
            if some:
                expected[name][f"user {user}"] = [(time, f"item {item}") for time, item in some]
    assert len(expected["test"]) > 30
    for name, rows_of_users in expected.items():
        assert read_rows(tmp_path / f"rows/{name}.parquet") == rows_of_users
    written = (tmp_path / "rows/test.parquet").stat().st_mtime_ns
    cold_start.split_rows(dataset, tmp_path / "rows", 0.25, seed=1)  # done before
    assert (tmp_path / "rows/test.parquet").stat().st_mtime_ns == written
    cold_start.split_rows(dataset, tmp_path / "other", 0.25, seed=2)
    assert (tmp_path / "other/cold.csv").read_text() != (tmp_path / "rows/cold.csv").read_text()


def test_popularity_among_cold_items_is_that_of_ranking_by_counts() -> None:
    rng = np.random.default_rng(0)
    counts, items = np.arange(100) * 100 + rng.permutation(100), np.sort(rng.permutation(100)[:30])  # no ties
    targets = rng.choice(items, 50)
    scores = torch.full((50, 100), -1.0)
    scores[:, items] = torch.from_numpy(counts[items]).float()
    _, ranks = both_ranks(scores, torch.from_numpy(targets), Ragged.from_lists([[]] * 50))
    hits = (ranks < 10).double()
    expected = {"HR@10": hits.mean().item(), "NDCG@10": (hits / torch.log2(ranks.double() + 2)).mean().item()}
    assert cold_start.popularity_among(counts, items, targets) == pytest.approx(expected)
    equal = cold_start.popularity_among(np.zeros(100, np.int64), items, targets)
    assert equal == pytest.approx(cold_start.chance(30))
    assert equal["HR@10"] == pytest.approx(1 / 3)


def test_cold_items_are_never_trained_and_exported_ranked_and_listed_all_the_same(
    log: Path,  # noqa: F811
    tmp_path: Path,
    executor: InProcess,  # noqa: F811
) -> None:
    configs, out = tmp_path / "configs", tmp_path / "out"
    configs.mkdir()
    (configs / "tiny.yaml").write_text(CONFIG)
    words = [*table_words(log), "--output", str(out), "--configs", str(configs), "--name", "tiny", "--seeds", "1"]
    cold_start.main(words)
    options = cold_start.parse(words)
    assert len(executor.ran) == len(options.planned())
    seed = out / "tiny/seed0"
    cold = set((seed / "rows/cold.csv").read_text().split()[1:])
    dataset = Dataset.open(str(seed / "data"))
    items = {row["key"]: row for part in dataset.manifest.item_parts for row in read(seed / "data" / part.path)}
    assert len(items) == 320 and len(cold) > 20  # items that no row has are there too
    assert all(items[key]["train_count"] == 0 for key in cold)

    vectors = vectors_of(seed / "attributes_export")
    assert set(vectors) == set(items)
    by_attributes: dict[Any, list[str]] = {}
    for key in cold:
        by_attributes.setdefault((*items[key]["attribute_category"], -1, *items[key]["attribute_tags"]), []).append(key)
    for alike in by_attributes.values():  # the attributes alone make a cold item's vector
        assert all((vectors[key] == vectors[alike[0]]).all() for key in alike)
    assert len({vectors[keys[0]].tobytes() for keys in by_attributes.values()}) > 5
    assert all(np.isfinite(vector).all() and np.abs(vector).sum() > 0 for vector in vectors.values())

    listed = [key for part in sorted((seed / "attributes_lists").rglob("*.parquet")) for key in keys_in(part)]
    assert set(listed) <= cold and len(set(listed)) > 5

    report = json.loads((out / "report.json").read_text())
    test = json.loads((seed / "attributes_test.json").read_text())
    groups = test["groups"]["pretrain"]["masked"]["by_popularity"]
    (never,) = (line for line in groups if line["to"] == 0)
    assert never["users"] == test["users"] == report["draws"][0]["rows"]["test"] > 20  # a group of its own, and all are
    lists = json.loads((seed / "attributes_lists/manifest.json").read_text())
    figures = report["results"]["attributes"]
    assert figures["cold items"]["masked"]["HR@10"]["mean"] == lists["measured"]["hits"]["HR@10"]
    assert figures["all items"]["masked"]["HR@10"]["mean"] == test["results"]["pretrain"]["masked"]["HR@10"]
    assert report["baselines"]["popularity"]["HR@10"]["mean"] == 0
    assert report["baselines"]["chance"]["HR@10"]["mean"] == pytest.approx(10 / len(cold))
    text = (out / "report.md").read_text()
    assert "10% of the items are cold" in text and "Cold test items among cold items" in text
    cold_start.main(words)
    assert len(executor.ran) == len(options.planned())  # a second run starts no stage


def read(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def vectors_of(export: Path) -> dict[str, Any]:
    """The item vectors of an export by key."""
    found = {}
    for part in json.loads((export / "manifest.json").read_text())["item_parts"]:
        for row in read(export / part["path"]):
            found[row["key"]] = np.array(row["vector"], dtype=np.float32)
    return found


def keys_in(lists: Path) -> list[str]:
    return [key for row in read(lists) for key in row["item_keys"]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give --items and --item_attributes"),
        (["--items", __file__, "--item_attributes", "a", "--share", "1"], "between 0 and 1"),
        (["--items", __file__, "--item_attributes", "a", "--seeds", "0"], "at least 1"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(words, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cold_start.main(["--input", __file__, *words, "--output", str(tmp_path / "out")])
    assert ended.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
