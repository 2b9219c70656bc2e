"""Metrics by item popularity and history length, against numpy on the same users one by one."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recgpt_torchrec.data.dataset import Dataset, Manifest
from recgpt_torchrec.data.reading.counts import read_counts
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.evaluation import groups
from recgpt_torchrec.evaluation.groups import GroupedMetrics, Grouping, count_values, popularity_bounds
from recgpt_torchrec.evaluation.metrics import RankingMetrics
from tests.support import promise_of, training_part, walks, write_dataset
from tools.ranks import run_ranks

ITEMS, USERS = 41, 150
LISTS = walks(USERS, 30, shortest=3, longest=60, seed=2)
"""The items 30 to 40 are never interacted with."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("groups") / "data", LISTS, items=ITEMS, rows_per_group=9)


def counts_of_items() -> Any:
    """[items] training interactions, independent of the package."""
    return np.bincount([item for history in LISTS for item in training_part(history)], minlength=ITEMS)


def groups_by_sorting(counts: Any, shares: int) -> list[set[int]]:
    """The items of each group: a plain loop over items from the most popular on, equal counts kept together."""
    total, before = counts.sum(), 0
    result: list[set[int]] = [set() for _ in range(shares + 1)]
    for count in sorted(set(counts.tolist()), reverse=True):
        items = np.flatnonzero(counts == count)
        result[shares if count == 0 else int(shares * before / total)] |= set(items.tolist())
        before += int(count) * len(items)
    return [group for group in result if group]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=60))
def test_popularity_groups_have_equal_shares_of_the_interactions(drawn: list[int]) -> None:
    counts = np.array(drawn)
    bounds = popularity_bounds(*count_values(counts))
    found = [set(np.flatnonzero((counts >= low) & (counts <= high)).tolist()) for low, high in bounds]
    assert found == groups_by_sorting(counts, groups.SHARES)
    assert sorted(item for group in found for item in group) == list(range(len(drawn)))


def test_the_histogram_of_counts_is_exact_below_and_above_its_array(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "COUNTED", 5)
    monkeypatch.setattr(groups, "BLOCK", 4)
    counts = np.array([0, 9, 4, 4, 5, 9, 9, 0, 1_000_000_007])
    values, number = count_values(counts)
    expected = np.unique(counts, return_counts=True)
    assert values.tolist() == expected[0].tolist() and number.tolist() == expected[1].tolist()


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_counts_are_read_by_range(dataset: Dataset, ranks: int) -> None:
    bounds = [ITEMS * rank // ranks for rank in range(ranks + 1)]
    parts = [read_counts(dataset, first, stop) for first, stop in zip(bounds, bounds[1:], strict=False)]
    assert np.concatenate(parts).tolist() == counts_of_items().tolist()


def drawn_ranks(rank: int, world_size: int) -> dict[str, Any]:
    """This rank's users with random ranks of their targets; some targets were never trained."""
    rng = np.random.default_rng(0)
    drawn = {
        "targets": rng.integers(0, ITEMS, 500),
        "lengths": rng.integers(1, 70, 500),
        "masked": rng.integers(0, 14, 500),
        "unmasked": rng.integers(0, 30, 500),
    }
    return {name: values[rank::world_size] for name, values in drawn.items()}


def grouped_on_ranks(rank: int, world_size: int, path: str) -> dict[str, Any]:
    grouping = Grouping.read(Dataset.open(path))
    metrics, drawn = GroupedMetrics(grouping, (5, 10)), drawn_ranks(rank, world_size)
    find_all = grouping.gather()
    for start in range(0, 500, 64):  # the last batches of a rank are empty
        batch = {name: values[start : start + 64] for name, values in drawn.items()}
        found = grouping.find(batch["targets"], batch["lengths"])
        alone = find_all(batch["targets"], batch["lengths"])
        assert found.popularity.tolist() == alone.popularity.tolist() and found.length.tolist() == alone.length.tolist()
        for how in ("masked", "unmasked"):
            metrics.update(found, how, torch.from_numpy(batch[how]).float())
    return metrics.result()


def expected_line(ranks: Any) -> dict[str, float]:
    """HR and NDCG at 5 and 10 from ranks, by their formulas."""
    figures = {}
    for k in (5, 10):
        figures[f"HR@{k}"] = float((ranks < k).mean())
        figures[f"NDCG@{k}"] = float(np.where(ranks < k, 1 / np.log2(ranks + 2), 0).mean())
    return figures


@pytest.mark.parametrize("world_size", [1, 3])
def test_figures_of_groups_equal_those_of_their_users_on_any_number_of_ranks(dataset: Dataset, world_size: int) -> None:
    drawn, counts = drawn_ranks(0, 1), counts_of_items()
    of_popularity = groups_by_sorting(counts, groups.SHARES)
    assert len(of_popularity) == groups.SHARES + 1 and counts[list(of_popularity[-1])].sum() == 0
    for result in run_ranks(grouped_on_ranks, world_size, dataset.path):
        for how in ("masked", "unmasked"):
            lines = result[how]["by_popularity"]
            for line, items in zip(lines, of_popularity, strict=True):
                own = np.isin(drawn["targets"], list(items))
                of_items = counts[list(items)]
                expected = {"from": of_items.min(), "to": of_items.max(), "users": own.sum()}
                assert line == pytest.approx(expected | expected_line(drawn[how][own]))
            lines = result[how]["by_length"]
            for line, (low, high) in zip(lines, [(1, 5), (6, 10), (11, 20), (21, 50), (51, None)], strict=True):
                own = (drawn["lengths"] >= low) & (drawn["lengths"] <= (high or 10**9))
                assert (line.pop("from"), line.pop("to")) == (low, high)
                assert line == pytest.approx({"users": own.sum()} | expected_line(drawn[how][own]))


def test_a_group_without_users_has_no_figures_and_no_line_in_the_table(dataset: Dataset) -> None:
    grouping = Grouping.read(dataset)
    metrics = GroupedMetrics(grouping, (5,))
    metrics.update(grouping.find(np.array([3]), np.array([7])), "masked", torch.tensor([0.0]))
    result = metrics.result()["masked"]
    assert result["by_length"][0] == {"from": 1, "to": 5, "users": 0}
    assert result["by_length"][1] == {"from": 6, "to": 10, "users": 1, "HR@5": 1.0, "NDCG@5": 1.0}
    table = [line.split() for line in groups.group_table("pretrain", result).splitlines()]
    assert ["6", "to", "10", "1", "1.0000", "1.0000"] in table
    assert not any(line[:3] == ["51", "or", "more"] or line[:1] == ["never"] for line in table)


def test_an_item_that_is_not_in_the_vocabulary_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(dataset.path, folder)
    (path,) = (folder / "items").iterdir()
    table = pq.read_table(path)
    pq.write_table(table.set_column(0, "item_id", pa.array([99, *range(1, ITEMS)], pa.int64())), path)
    opened = Dataset(path=str(folder), manifest=Manifest.read(str(folder)))
    vars(opened.manifest.item_parts[0]).update(promise_of(path))
    with pytest.raises(InputError, match="an item has no count, or an id outside 0 to 40"):
        read_counts(opened, 0, ITEMS)


def test_totals_are_those_of_the_groups_together(dataset: Dataset) -> None:
    grouping = Grouping.read(dataset)
    metrics, drawn = GroupedMetrics(grouping, (5, 10)), drawn_ranks(0, 1)
    total = RankingMetrics((5, 10))
    ranks = torch.from_numpy(drawn["masked"]).float()
    total.update(ranks)
    metrics.update(grouping.find(drawn["targets"], drawn["lengths"]), "masked", ranks)
    for lines in metrics.result()["masked"].values():
        assert sum(line["users"] for line in lines) == total.users
        for name, value in total.result().items():
            assert sum(line["users"] * line.get(name, 0) for line in lines) / total.users == pytest.approx(value)
