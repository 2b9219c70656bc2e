"""The structured logs follow the rules that their docstring tells, and their truth is that of a plain loop."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tools import structured_log
from tools.structured_log import GROUP, PAUSE, Options, World, generate, measure_truth


def make(folder: Path, structure: str, **options: object) -> Path:
    words = ["--structure", structure, "--output", str(folder), "--users", "150"]
    options = {"items": 320, **options}
    structured_log.main([*words, *(word for name, value in options.items() for word in (f"--{name}", str(value)))])
    return folder


def rows_of(folder: Path) -> list[list[dict[str, Any]]]:
    """The rows of each user, in the order of the file."""
    users: dict[str, list[dict[str, Any]]] = {}
    for row in pq.read_table(folder / "log.parquet").to_pylist():
        users.setdefault(row["user_id"], []).append(row)
    return list(users.values())


def table_of(path: Path, key: str) -> dict[str, dict[str, Any]]:
    return {row[key]: row for row in pq.read_table(path).to_pylist()}


def pairs_of(folder: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [pair for rows in rows_of(folder) for pair in pairwise(rows)]


def values_by_key(pairs: list[tuple[Any, Any]]) -> dict[Any, set[Any]]:
    found: dict[Any, set[Any]] = {}
    for key, value in pairs:
        found.setdefault(key, set()).add(value)
    return found


def test_attributes_decide_the_next_category_and_brand(tmp_path: Path) -> None:
    folder = make(tmp_path, "attributes", follow=1, mean_events=30, items=1200)
    items, users = table_of(folder / "items.parquet", "item_id"), table_of(folder / "users.parquet", "user_id")
    categories, brands, shared = [], [], 0
    pairs = pairs_of(folder)
    cells = {(row["category"], row["brand"]) for row in items.values()}
    ruled = 0
    for last, following in pairs:
        before, after = items[last["item_id"]], items[following["item_id"]]
        country = users[last["user_id"]]["country"]
        categories.append(((country, before["category"]), after["category"]))
        brands.append((before["brand"], after["brand"]))
        shared += bool(set(before["tags"]) & set(after["tags"]))
    # An item whose following cell is empty is followed by a start; most cells of so few items are not.
    next_brand = {
        brand: max(values, key=[b for a, b in brands if a == brand].count)
        for brand, values in values_by_key(brands).items()
    }
    assert sorted(next_brand.values()) == sorted(next_brand)  # a permutation
    next_category = {
        key: max(values, key=[b for a, b in categories if a == key].count)
        for key, values in values_by_key(categories).items()
    }
    for (key, category), (brand, following) in zip(categories, brands, strict=True):
        if (next_category[key], next_brand[brand]) in cells:
            ruled += (category, following) == (next_category[key], next_brand[brand])
    possible = sum(
        (next_category[key], next_brand[brand]) in cells
        for (key, _), (brand, _) in zip(categories, brands, strict=True)
    )
    assert ruled > 0.9 * possible > 100
    assert len({next_category[key] for key in next_category if key[1] == "category0"}) > 1  # countries differ
    at_random = np.mean(
        [bool(set(a["tags"]) & set(b["tags"])) for a in list(items.values())[:60] for b in list(items.values())[60:120]]
    )
    assert shared / len(pairs) > at_random + 0.05


def test_after_a_pause_a_series_of_that_time_begins_and_within_a_visit_it_continues(tmp_path: Path) -> None:
    pairs = pairs_of(make(tmp_path, "time", follow=1, leave=0.5, mean_events=40))
    within, begun = [], []
    for last, following in pairs:
        gap = following["timestamp"] - last["timestamp"]
        if gap <= PAUSE:
            within.append((last["item_id"], following["item_id"]))
        else:
            day = np.datetime64(following["timestamp"], "s").astype("datetime64[D]")
            weekend = (day.astype(int) + 3) % 7 >= 5
            begun.append(((weekend, following["timestamp"] % 86_400 // 21_600), following["item_id"]))
    assert all(len(items) == 1 for items in values_by_key(within).values())
    starts = values_by_key(begun)
    assert len(starts) == 8 and all(len(items) <= 2 for items in starts.values())  # 320 items: 16 series, 8 cells
    assert len(set.union(*starts.values())) == sum(map(len, starts.values()))


def test_a_buy_is_of_the_last_group_and_a_view_of_one_that_the_last_event_decides(tmp_path: Path) -> None:
    pairs = pairs_of(make(tmp_path, "events", follow=1, mean_events=200))
    following = values_by_key([((a["item_id"], a["event"], b["event"]), b["item_id"]) for a, b in pairs])
    assert max(map(len, following.values())) <= GROUP
    bought = [(item, items) for (item, _, event), items in following.items() if event == "buy" and len(items) == GROUP]
    assert len(bought) > 10 and all(item in items for item, items in bought)
    views = {key[:2]: items for key, items in following.items() if key[2] == "view"}
    both = [item for item, event in views if event == "view" and (item, "buy") in views]
    differing = sum(not views[item, "view"] & views[item, "buy"] for item in both)
    assert differing > 0.8 * len(both) > 100


def test_without_a_structure_the_item_alone_decides(tmp_path: Path) -> None:
    pairs = pairs_of(make(tmp_path, "none", follow=1))
    following = values_by_key([(a["item_id"], b["item_id"]) for a, b in pairs])
    assert all(len(items) == 1 for items in following.values())
    assert json.loads((tmp_path / "truth.json").read_text())["best"] == {"HR@10": 1.0, "NDCG@10": 1.0}


@pytest.mark.parametrize("structure", ["attributes", "time", "events", "none"])
def test_the_truth_is_that_of_ranking_by_the_chances(structure: str) -> None:
    """Each target is ranked by its chance, and equal items in every place that they can have, in a plain loop."""
    options = Options(structure=structure, users=40, items=320, follow=0.6, mean_events=8)
    rng = np.random.default_rng(3)
    world = World(options, rng)
    log = generate(world, rng)
    moment, targets = log.last_moments()
    chances = world.chances(moment)
    assert chances.sum(1) == pytest.approx(np.ones(40))
    stops = np.cumsum(log.lengths)
    hits, gains = [], []
    for user, target in enumerate(targets):
        history = set(log.item[stops[user] - log.lengths[user] : stops[user] - 1].tolist())
        others = [chances[user, item] for item in range(320) if item != target and item not in history]
        own = chances[user, target]
        better = sum(other > own * (1 + 1e-9) for other in others)
        ties = sum(abs(other - own) <= own * 1e-9 for other in others)
        places = [better + place for place in range(ties + 1)]
        hits.append(np.mean([place < 10 for place in places]))
        gains.append(np.mean([1 / np.log2(place + 2) if place < 10 else 0 for place in places]))
    expected = {"HR@10": pytest.approx(np.mean(hits)), "NDCG@10": pytest.approx(np.mean(gains))}
    assert measure_truth(world, log) == expected


def test_who_does_not_know_the_request_is_worse_where_it_decides_and_only_there() -> None:
    for structure, decides in (("time", True), ("events", True), ("none", False)):
        options = Options(structure=structure, users=300, items=320, mean_events=8)
        rng = np.random.default_rng(0)
        world = World(options, rng)
        log = generate(world, rng)
        best, blind = measure_truth(world, log), measure_truth(world, log, knows_request=False)
        assert (blind["NDCG@10"] < best["NDCG@10"] - 0.05) == decides
        assert decides or blind == pytest.approx(best)


def test_the_same_seed_gives_the_same_log_and_another_seed_another(tmp_path: Path) -> None:
    one, two, other = (make(tmp_path / name, "time", seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert rows_of(one) == rows_of(two) != rows_of(other)


@pytest.mark.parametrize("words", [["--items", "0"], ["--follow", "2"], ["--mean_events", "4"], ["--users", "0"]])
def test_bad_options_are_refused(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        structured_log.main(["--structure", "time", "--output", str(tmp_path / "x"), *words])
    assert ended.value.code == 2 and not (tmp_path / "x").exists()
    assert words[0] in capsys.readouterr().err.splitlines()[-1]
