"""The stage find_neighbours against a plain loop over pairs, and what it does with folders that are there already."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recgpt_torchrec.config import FindNeighbours
from recgpt_torchrec.data.neighbours.folder import NeighboursManifest
from recgpt_torchrec.data.neighbours.table import NONE, NeighbourTable
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation import neighbours
from recgpt_torchrec.preparation.neighbours import find_neighbours
from tests.support import read_files, stage, training_part, walks, write_dataset


def plain_scores(lists: list[list[int]], items: int, window: int) -> np.ndarray:
    """[items, items] float64: the formula of `data.neighbours.pairs`, pair by pair."""
    counts = [max(1, sum(each.count(i) for each in lists)) for i in range(items)]
    scores = np.zeros((items, items))
    for each in lists:
        for p, i in enumerate(each):
            for q in range(max(0, p - window), min(len(each), p + window + 1)):
                if (j := each[q]) != i:
                    scores[i, j] += abs(p - q) ** -0.5 * (1 if q > p else 0.25)
    for i in range(items):
        for j in range(items):
            scores[i, j] *= counts[i] ** -0.5 * counts[j] ** -0.15
    return scores


def check(folder: Path, lists: list[list[int]], items: int, count: int, window: int) -> NeighboursManifest:
    """Check a folder of neighbours against the training lists that they were found in."""
    manifest = NeighboursManifest.read(str(folder))
    table, expected = NeighbourTable.open(str(folder), manifest), plain_scores(lists, items, window)
    assert manifest.pairs == np.count_nonzero(expected) and table.ids.shape == (items, count)
    for i in range(items):
        ids, scores = table.ids[i][table.ids[i] != NONE].tolist(), table.scores[i]
        assert len(ids) == len(set(ids)) == min(count, np.count_nonzero(expected[i]))
        np.testing.assert_allclose(scores[: len(ids)], expected[i, ids], rtol=2e-6)
        assert (np.diff(scores) <= 0).all() and not scores[len(ids) :].any()
        left_out = np.delete(expected[i], ids)
        assert not len(ids) or left_out.max(initial=0) <= scores[len(ids) - 1] * (1 + 2e-6)
    return manifest


def find(data: Path, output: Path, **options: Any) -> neighbours.Result:
    return find_neighbours(FindNeighbours(data=str(data), output=str(output), **options))


@settings(max_examples=8)
@given(
    st.lists(st.lists(st.integers(0, 7), max_size=9), min_size=1, max_size=9).filter(any),
    st.integers(1, 10),
    st.sampled_from([1, 2, 20]),
)
def test_neighbours_are_those_of_a_loop_over_pairs(tmp_path_factory, lists, count, window):
    folder = tmp_path_factory.mktemp("found")
    write_dataset(folder / "data", lists, items=9, hold_out="none", rows_per_group=2)
    if not plain_scores(lists, 9, window).any():
        with pytest.raises(InputError, match="train without --neighbours.path"):
            find(folder / "data", folder / "out", count=count, window=window)
        return
    find(folder / "data", folder / "out", count=count, window=window)
    check(folder / "out", lists, 9, count, window)


def test_several_row_groups_and_parts_of_either_side_and_a_long_history(tmp_path, monkeypatch):
    monkeypatch.setattr(neighbours, "BATCH_ROWS", 4)
    monkeypatch.setattr(neighbours, "GROUPS_PER_PART", 2)
    lists = [*walks(users=40, items=30, seed=1, shortest=1), np.random.default_rng(0).integers(0, 29, 400).tolist()]
    write_dataset(tmp_path / "data", lists, items=31, hold_out="none", rows_per_group=3)
    find(tmp_path / "data", tmp_path / "out", count=5)
    manifest = check(tmp_path / "out", lists, 31, 5, 20)
    assert [part.rows for part in manifest.parts] == [8, 8, 8, 7]
    rows = pq.read_table(tmp_path / "out" / manifest.parts[-1].path).to_pylist()
    assert rows[-1] == {"item_id": 30, "neighbour_ids": [], "scores": []}  # nobody had it


@pytest.mark.parametrize("hold_out", ["last", "none", "time"])
def test_only_the_training_part_is_counted(hold_out, tmp_path):
    lists = walks(users=20, items=12, seed=2, shortest=4, longest=9)
    starts = [(len(each) // 2, len(each) - 1) for each in lists] if hold_out == "time" else None
    parts: dict[str, list[list[int]]] = {
        "last": [[*training_part(each)] for each in lists],
        "none": lists,
        "time": [each[: len(each) // 2] for each in lists],
    }
    assert len({json.dumps(each) for each in parts.values()}) == 3
    write_dataset(tmp_path / "data", lists, items=12, hold_out=hold_out, starts=starts)
    find(tmp_path / "data", tmp_path / "out", count=4)
    check(tmp_path / "out", parts[hold_out], 12, 4, 20)


def test_of_equal_scores_the_smaller_id_comes_first(tmp_path):
    # Each of 3, 5, 1 and 4 follows 2 once, as the last of two.
    write_dataset(tmp_path / "data", [[2, 3], [2, 5], [2, 1], [2, 4]], hold_out="none")
    find(tmp_path / "data", tmp_path / "out", count=3)
    manifest = NeighboursManifest.read(str(tmp_path / "out"))
    table = NeighbourTable.open(str(tmp_path / "out"), manifest)
    assert table.ids[2].tolist() == [1, 3, 4] and len({*table.scores[2].tolist()}) == 1
    assert table.ids[0].tolist() == [NONE] * 3


def test_prompts_are_not_counted(tmp_path):
    write_dataset(tmp_path / "plain", [[0, 1, 2, 3], [3, 2, 1, 0]], items=6)
    entries, segments = [[0, 5, 1, 2, 4, 3], [3, 2, 1, 5, 0, 5]], [[0, 1, 0, 0, 1, 0], [0, 0, 0, 2, 0, 1]]
    write_dataset(tmp_path / "prompts", entries, items=6, segments=segments)
    for name in ("plain", "prompts"):
        find(tmp_path / name, tmp_path / f"of {name}", count=1)
        table = NeighbourTable.open(str(tmp_path / f"of {name}"), NeighboursManifest.read(str(tmp_path / f"of {name}")))
        assert table.ids.tolist() == [[1], [0], [3], [2], [NONE], [NONE]]


def test_the_same_again_does_nothing_and_another_result_is_never_overwritten(tmp_path, capfd):
    lists = walks(users=10, items=8, seed=4)
    write_dataset(tmp_path / "data", lists, items=8)
    options: dict[str, Any] = {"--data": tmp_path / "data", "--output": tmp_path / "out", "--count": 4}
    assert stage("find_neighbours", options) == 0
    assert "kept        the best 4 neighbours of each of 8 items" in capfd.readouterr().out
    before = read_files(tmp_path / "out")
    assert stage("find_neighbours", {**options, "--scratch": tmp_path, "--memory_limit": "1GB"}) == 0
    assert "nothing to do" in capfd.readouterr().out
    write_dataset(tmp_path / "other", [*lists[1:], lists[0]], items=8)
    (tmp_path / "file").write_text("mine")
    cases = [
        ({"--count": 5}, "count: 4 there, 5 now"),
        ({"--window": 3}, "window: 20 there, 3 now"),
        ({"--data": tmp_path / "other"}, "other ones in"),
        ({"--output": tmp_path / "data"}, "holds something other than a neighbours folder"),
        ({"--count": 0}, "--count"),
        ({"--window": 101}, "--window"),
        ({"--data": tmp_path / "out", "--output": tmp_path / "new"}, "is a neighbours folder, not a dataset"),
    ]
    for changed, message in cases:
        assert stage("find_neighbours", {**options, **changed}) == 2
        assert message in capfd.readouterr().err
    assert read_files(tmp_path / "out") == before and not (tmp_path / "new").exists()
    assert not [each for each in tmp_path.iterdir() if each.name.startswith(".")]
