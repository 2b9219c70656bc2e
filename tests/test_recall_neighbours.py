"""`evaluate` and `retrieve` with `--neighbours.path`: lists from the model and from neighbours, against plain loops."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from recgpt_torchrec.data.ragged import Ragged
from recgpt_torchrec.reports.comparing import compare_runs
from recgpt_torchrec.reports.quality import comparison_section
from recgpt_torchrec.retrieval.exports.reading import open_export
from recgpt_torchrec.retrieval.exports.vectors import vectors_of
from recgpt_torchrec.retrieval.weighed import Weighed
from tests.support import SMALL, change_json, stage, walks, write_dataset
from tools.ranks import run_ranks

USERS, ITEMS, INTERESTS, K, WEIGHT, MEMORY, RECENCY = 60, 30, 3, 7, 3.0, 4, 0.6
WALKS = walks(USERS, ITEMS, shortest=2, longest=14)
TRAIN = {**SMALL, "--model.max_len": 8, "--loss.candidates": "all", "--batch.tokens": 60, "--train.epochs": 2}
RAISING = {"--neighbours.weight": WEIGHT, "--neighbours.memory": MEMORY, "--neighbours.recency": RECENCY}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A dataset, its neighbours, a model, and an export before the test item."""
    folder = tmp_path_factory.mktemp("recall_neighbours")
    write_dataset(folder / "data", WALKS, items=ITEMS, rows_per_group=8, groups_per_part=2)
    assert stage("find_neighbours", {"--data": folder / "data", "--output": folder / "near", "--count": 6}) == 0
    assert stage("pretrain", {"--data": folder / "data", "--output": folder / "run", **TRAIN}) == 0
    options = {"--data": folder / "data", "--checkpoint": folder / "run", "--output": folder / "vectors"}
    assert stage("export", {**options, "--history": "test", "--interests": INTERESTS}) == 0
    return folder


def raised_by_hand(made: Path, history: list[int]) -> dict[int, float]:
    """What neighbours of a history raise, said again in plain Python."""
    rows = [row for part in sorted((made / "near/neighbours").glob("*")) for row in pq.read_table(part).to_pylist()]
    table = {row["item_id"]: list(zip(row["neighbour_ids"], row["scores"], strict=True)) for row in rows}
    sums: dict[int, float] = {}
    for age, item in enumerate(reversed(history[-MEMORY:])):
        for neighbour, score in table[item]:
            if neighbour not in history:
                sums[neighbour] = sums.get(neighbour, 0.0) + RECENCY**age * score
    return {item: WEIGHT * value / max(sums.values()) for item, value in sums.items()}


def scores_by_hand(made: Path, masked: bool = True, without: tuple[int, ...] = ()) -> dict[int, np.ndarray]:
    """[interests, items] score of each item for each user with an item held out."""
    export = open_export(str(made / "vectors"))
    items = export.item_vectors()[1].astype(np.float64)
    scores = {}
    for batch in export.users():
        for user, vectors in zip(batch["user_id"].to_pylist(), vectors_of(batch), strict=True):
            history = WALKS[user][:-1]
            scores[user] = vectors.astype(np.float64) @ items.T
            for item, value in raised_by_hand(made, history).items():
                scores[user][:, item] += value
            if masked:
                scores[user][:, history] = -np.inf
            else:
                scores[user][:, list(set(history))] += export.manifest.repeat_bias
            scores[user][:, list(without)] = -np.inf
    return scores


def best(row: np.ndarray, k: int = K) -> list[int]:
    return np.argsort(-row, kind="stable")[: min(k, int(np.isfinite(row).sum()))].tolist()


def evaluated(made: Path, output: Path, **more: Any) -> dict[str, Any]:
    given = {"--data": made / "data", "--checkpoint": made / "run", "--output": output, "--ks": [3, K]}
    given |= {"--neighbours.path": made / "near", "--recall.m": 5, **RAISING}
    assert stage("evaluate", given | {f"--{name}": value for name, value in more.items()}) == 0
    result: dict[str, Any] = json.loads(output.read_text())
    return result


def retrieved(made: Path, output: Path, **more: Any) -> dict[int, list[int]]:
    given = {"--export": made / "vectors", "--data": made / "data", "--output": output, "--k": K, "--index": "exact"}
    given |= {"--neighbours.path": made / "near", **RAISING}
    assert stage("retrieve", given | {f"--{name}": value for name, value in more.items()}) == 0
    table = pq.read_table(output / "lists")
    return dict(zip(table["user_id"].to_pylist(), table["item_ids"].to_pylist(), strict=True))


def test_the_path_of_evaluate_is_measured_by_the_raised_scores_and_the_other_paths_stay(made, tmp_path, capfd):
    told = evaluated(made, tmp_path / "with.json")
    for how in ("masked", "unmasked"):
        ranks = []
        for user, scores in scores_by_hand(made, how == "masked").items():
            order = np.argsort(-scores[0], kind="stable").tolist()
            reachable = np.isfinite(scores[0][WALKS[user][-1]])
            ranks.append(order.index(WALKS[user][-1]) if reachable else np.inf)
        for k in (3, K):
            hits = [rank < k for rank in ranks]
            gains = [1 / np.log2(rank + 2) if rank < k else 0.0 for rank in ranks]
            assert told["results"]["pretrain_neighbours"][how][f"HR@{k}"] == pytest.approx(np.mean(hits))
            assert told["results"]["pretrain_neighbours"][how][f"NDCG@{k}"] == pytest.approx(np.mean(gains))
    record = told["neighbours"]
    assert len(record.pop("fingerprint")) == 32
    assert record == {"weight": WEIGHT, "memory": MEMORY, "recency": RECENCY}
    said = capfd.readouterr().out
    assert "pretrain_neighbours" in said
    given = {"--data": made / "data", "--checkpoint": made / "run", "--ks": [3, K], "--recall.m": 5}
    assert stage("evaluate", {**given, "--output": tmp_path / "without.json"}) == 0
    plain = json.loads((tmp_path / "without.json").read_text())
    assert "neighbours" not in plain
    del told["results"]["pretrain_neighbours"]
    assert plain["results"] == told["results"]


@pytest.mark.parametrize("case", ["one", "three", "allowed", "weighed"])
def test_lists_of_retrieve_are_those_of_the_raised_scores(made, tmp_path, case, capfd):
    allowed = [item for item in range(ITEMS) if item % 3]
    if case == "three":
        found = retrieved(made, tmp_path / "lists", interests=3, merge="quota")
    elif case == "allowed":
        keys = {
            row["item_id"]: row["key"]
            for part in (made / "data/items").glob("*")
            for row in pq.read_table(part).to_pylist()
        }
        (tmp_path / "allowed.txt").write_text("".join(f"{keys[item]}\n" for item in allowed))
        found = retrieved(made, tmp_path / "lists", interests=1, merge="score", allow=tmp_path / "allowed.txt")
    else:
        weighed = {"seen": "weigh"} if case == "weighed" else {}
        found = retrieved(made, tmp_path / "lists", interests=1, merge="score", **weighed)
    without = tuple(set(range(ITEMS)) - set(allowed)) if case == "allowed" else ()
    expected = {}
    for user, scores in scores_by_hand(made, case != "weighed", without).items():
        expected[user] = best(scores[0])
        if case == "three":
            taken: list[int] = []
            for number, row in enumerate(scores):
                quota = K // INTERESTS + (number < K % INTERESTS)
                taken += [item for item in best(row, ITEMS) if item not in taken][:quota]
            expected[user] = taken
    assert found == expected
    said = capfd.readouterr().out
    assert f"neighbours from {made / 'near'} raised" in said
    plain = {"--export": made / "vectors", "--data": made / "data", "--output": tmp_path / "plain", "--k": K}
    assert stage("retrieve", {**plain, "--interests": 1, "--merge": "score"}) == 0
    assert pq.read_table(tmp_path / "plain/lists")["item_ids"].to_pylist() != list(found.values())


def test_evaluations_with_neighbours_of_another_weight_are_compared_with_a_word(made, tmp_path, capfd):
    evaluated(made, tmp_path / "one.json")
    for weight, told in ((WEIGHT, False), (1.0, True)):
        capfd.readouterr()
        given = {"compare": tmp_path / "one.json", "overwrite": "true", "neighbours.weight": weight}
        evaluated(made, tmp_path / "other.json", **given)
        said = f"in how these take part: weight {weight} and {WEIGHT}\n" in capfd.readouterr().out
        assert said == told
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "other"))
    compared = compare_runs(["a", "b"], [{str(tmp_path / "one.json"): first}, {str(tmp_path / "other.json"): second}])
    shown = comparison_section(compared, {"a": "#111", "b": "#222"})
    assert f"in how these take part: weight 1.0 and {WEIGHT}." in shown


def on_rank(rank: int, world_size: int, ports: list[int], runs: list[tuple[str, dict[str, Any]]]) -> list[int]:
    ended = []
    dist.destroy_process_group()  # each stage joins its own
    for port, (name, options) in zip(ports, runs, strict=True):
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ended.append(stage(name, options))
    return ended


def test_two_ranks_measure_and_list_the_same(made, tmp_path):
    evaluated(made, tmp_path / "one.json")
    one = retrieved(made, tmp_path / "one")
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    common = {"--data": made / "data", "--neighbours.path": made / "near", **RAISING}
    measuring = {"--checkpoint": made / "run", "--ks": [3, K], "--recall.m": 5, "--output": tmp_path / "two.json"}
    listing = {"--export": made / "vectors", "--k": K, "--index": "exact", "--output": tmp_path / "two"}
    runs = [("evaluate", {**common, **measuring}), ("retrieve", {**common, **listing})]
    assert run_ranks(on_rank, 2, ports, runs, timeout=120) == [[0, 0], [0, 0]]
    first, second = (json.loads((tmp_path / f"{name}.json").read_text())["results"] for name in ("one", "two"))
    for how, figures in first["pretrain_neighbours"].items():
        assert second["pretrain_neighbours"][how] == pytest.approx(figures)
    table = pq.read_table(tmp_path / "two/lists")
    assert dict(zip(table["user_id"].to_pylist(), table["item_ids"].to_pylist(), strict=True)) == one


def test_lists_of_other_neighbours_are_others_wherever_these_lie(made, tmp_path, capfd):
    retrieved(made, tmp_path / "lists")
    (tmp_path / "moved").symlink_to(made / "near")
    retrieved(made, tmp_path / "lists", **{"neighbours.path": tmp_path / "moved"})
    assert "Already there" in capfd.readouterr().out
    assert stage("find_neighbours", {"--data": made / "data", "--output": tmp_path / "fewer", "--count": 1}) == 0
    given = {"--export": made / "vectors", "--data": made / "data", "--output": tmp_path / "lists", "--k": K}
    capfd.readouterr()
    assert stage("retrieve", {**given, "--neighbours.path": tmp_path / "fewer", **RAISING}) == 2
    assert "content of --neighbours.path" in capfd.readouterr().err
    # Lists stay what they are, whatever index the export gets after them.
    assert stage("index", {"--export": made / "vectors", "--index.kind": "flat"}) == 0
    again = {**given, "--neighbours.path": made / "near", **RAISING}
    capfd.readouterr()
    assert stage("retrieve", again) == 0
    assert "Already there" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("name", "changed", "said"),
    [
        ("retrieve", {"--data": None}, "neighbours are those of a history's items; name the dataset with --data"),
        ("retrieve", {"--index": "flat"}, "neighbours raise items that --index flat does not find; give --index exact"),
        ("retrieve", {"--neighbours.weight": 0}, "--neighbours.weight"),
        ("evaluate", {"--neighbours.memory": 21}, "--neighbours.memory"),
        ("evaluate", {"--neighbours.path": None, "--neighbours.weight": 3}, "but there are no neighbours"),
        ("evaluate", {"--neighbours.path": "nowhere"}, "nowhere"),
        ("evaluate", {"--neighbours.path": "other"}, "they were found"),
        ("retrieve", {"--neighbours.path": "other"}, "they were found"),
    ],
)
def test_neighbours_that_cannot_be_used_are_refused_before_anything_is_written(
    made, tmp_path, capfd, name, changed, said
):
    given: dict[str, Any] = {"--data": made / "data", "--neighbours.path": made / "near", "--output": tmp_path / "out"}
    given |= {"--export": made / "vectors", "--k": K} if name == "retrieve" else {"--checkpoint": made / "run"}
    if changed.get("--neighbours.path") == "other":  # which has counted what this dataset holds out
        write_dataset(tmp_path / "all", WALKS, items=ITEMS)
        change_json(tmp_path / "all/manifest.json", lambda manifest: manifest.update(hold_out="none"))
        found = {"--data": tmp_path / "all", "--output": tmp_path / "other"}
        assert stage("find_neighbours", found) == 0
        changed = {"--neighbours.path": tmp_path / "other"}
    capfd.readouterr()
    assert stage(name, {key: value for key, value in (given | changed).items() if value is not None}) == 2
    told = capfd.readouterr()
    assert said in told.err and "Traceback" not in told.err and not (tmp_path / "out").exists()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_raised_items_beside_repeats_are_added_up_item_by_item(data):
    rows = data.draw(st.integers(1, 4))
    item = st.integers(0, 9)
    lists = data.draw(st.lists(st.lists(item, max_size=6, unique=True), min_size=rows, max_size=rows))
    repeated = data.draw(st.lists(st.lists(item, max_size=6), min_size=rows, max_size=rows))
    bias = data.draw(st.sampled_from([0.0, -2.0, 0.5]))
    raised = Ragged.from_lists(lists)
    values = np.arange(raised.values.size, dtype=np.float32) + 1
    together = Weighed(raised, values).beside(Weighed(Ragged.from_lists(repeated), bias))
    expected: list[dict[int, float]] = [
        dict(zip(row, part, strict=True))
        for row, part in zip(lists, raised.with_values(values).to_lists(), strict=True)
    ]
    for row, again in enumerate(repeated):
        for each in set(again) if bias else ():
            expected[row][each] = expected[row].get(each, 0.0) + bias
    found = zip(
        together.items.to_lists(), together.items.with_values(np.asarray(together.values)).to_lists(), strict=True
    )
    assert [dict(zip(*row, strict=True)) for row in found] == expected
