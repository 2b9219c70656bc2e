"""Soft targets from neighbours against plain loops, and folders of neighbours that training must not take."""

import json
import pickle
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from recgpt_torchrec.config import Loss, Model, Neighbours
from recgpt_torchrec.data.batch import make_batch
from recgpt_torchrec.data.candidates import AllItems
from recgpt_torchrec.data.dataset import Vocabulary
from recgpt_torchrec.data.histories import Histories, no_histories
from recgpt_torchrec.data.neighbours import answering
from recgpt_torchrec.data.neighbours.answering import NeighbourAnswers
from recgpt_torchrec.data.neighbours.folder import NeighboursManifest, open_neighbours
from recgpt_torchrec.data.neighbours.table import NONE, NeighbourTable
from recgpt_torchrec.data.packed import Capacity
from recgpt_torchrec.data.ragged import offsets_of
from recgpt_torchrec.data.targets import SoftShares
from recgpt_torchrec.data.windows import Position
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.model.dense import Dense
from recgpt_torchrec.storage.buffers import Buffer
from recgpt_torchrec.storage.folders import write_manifest
from recgpt_torchrec.storage.parts import write_parts
from tests.data.stream_helpers import stream_of
from tests.support import change_json, items_of, promise_of, walks, write_dataset

ITEMS = 12
"""That the table knows; histories have three newer ones."""
Lists = list[list[tuple[int, float]]]


def table_of(lists: Lists, count: int) -> NeighbourTable:
    content = np.zeros(8 * len(lists) * count, np.uint8)
    ids, scores = NeighbourTable.view((len(lists), count), content)
    ids.fill(NONE)
    for item, found in enumerate(lists):
        for place, (neighbour, score) in enumerate(found):
            ids[item, place], scores[item, place] = neighbour, score
    return NeighbourTable(ids, scores, Buffer(content))


def answers_of(lists: Lists, count: int = 4, **options: Any) -> NeighbourAnswers:
    # With a recency of a half and scores in eighths, sums are exact and ties are ties.
    values: dict[str, Any] = {"share": 0.4, "memory": 3, "recency": 0.5, "answers": 3, **options}
    return NeighbourAnswers(table=table_of(lists, count), **values)


def plain_answers(
    lists: Lists, history: list[int], own: set[int], memory: int, recency: float, answers: int
) -> list[tuple[int, float]]:
    """The best neighbours after a history, by the formula of `NeighbourAnswers`, best first."""
    sums: Counter[int] = Counter()
    for age, item in enumerate(history[::-1][:memory]):
        for neighbour, score in lists[item] if item < len(lists) else []:
            sums[neighbour] += recency**age * score  # type: ignore[assignment]
    ranked = sorted((-score, item) for item, score in sums.items() if item not in own)
    return [(item, -score) for score, item in ranked[:answers]]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Lists, list[list[tuple[int, int, bool]]], dict[str, Any]]:
    """Neighbours of every item; histories of entries with a segment, of which some are left out; options."""
    entry = st.tuples(st.integers(0, ITEMS - 1), st.integers(1, 4).map(lambda eighths: eighths / 8))
    lists = draw(st.lists(st.lists(entry, max_size=4, unique_by=lambda each: each[0]), min_size=ITEMS, max_size=ITEMS))
    best_first = [sorted(each, key=lambda pair: -pair[1]) for each in lists]
    history = st.lists(
        st.tuples(st.integers(0, ITEMS + 2), st.sampled_from([0, 0, 0, 1, 2]), st.booleans()), max_size=9
    )
    options = {"memory": draw(st.integers(1, 5)), "answers": draw(st.sampled_from([1, 3, 25]))}
    return best_first, draw(st.lists(history, max_size=6)), options


@given(cases(), st.sampled_from([2, 1000]))
def test_answers_are_those_of_a_plain_loop(case, at_once):
    lists, drawn, options = case
    flat = [entry for each in drawn for entry in each]
    whole = Histories(
        users=np.arange(len(drawn)) // 2 * 7,  # two pieces of a user
        items=np.array([item for item, _, _ in flat], np.int64),
        offsets=offsets_of(np.array([len(each) for each in drawn], np.int64)),
        segments=np.array([segment for _, segment, _ in flat], np.int8),
    )
    thinned = whole.keep(np.array([kept for _, _, kept in flat], bool))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answering, "ENTRIES", at_once)
        found = answers_of(lists, **options).attach(thinned, whole)
    assert found.neighbours is not None and found.neighbour_scores is not None
    assert found.neighbours.shape == found.neighbour_scores.shape == (thinned.items.size, options["answers"])
    place = 0
    for number, entries in enumerate(drawn):
        first = number // 2 * 2
        own = {item for piece in drawn[first : first + 2] for item, _, _ in piece}
        history: list[int] = []
        for item, segment, kept in entries:
            if not kept:
                continue
            history += [item] if segment == 0 else []
            expected = plain_answers(lists, history, own, recency=0.5, **options) if segment == 0 else []
            padding = options["answers"] - len(expected)
            assert found.neighbours[place].tolist() == [item for item, _ in expected] + [NONE] * padding
            assert found.neighbour_scores[place].tolist() == [score for _, score in expected] + [0] * padding
            place += 1


def test_items_that_are_newer_than_the_table_are_of_nobody_else():
    """The second user's own items are told from the first one's by a number that a newer item must not reach."""
    lists: Lists = [[(1, 0.5)], [], []]
    histories = Histories(users=np.arange(2), items=np.array([4, 0]), offsets=np.array([0, 1, 2]))
    found = answers_of(lists, count=1).attach(histories, histories)
    assert found.neighbours is not None and found.neighbours[:, 0].tolist() == [NONE, 1]


def test_lists_without_histories_have_no_answers():
    found = answers_of([[]] * ITEMS).attach(no_histories(), no_histories())
    assert found.neighbours is not None and found.neighbours.shape == (0, 3)


def test_a_table_is_the_same_in_another_process():
    table = table_of([[(1, 0.5)], [(0, 0.25)]], 2)
    other = pickle.loads(pickle.dumps(table))
    assert other.ids.tolist() == table.ids.tolist() and other.scores.tolist() == table.scores.tolist()
    assert other.ids.base is not None and np.shares_memory(other.ids, other.buffer.bytes)


@pytest.mark.parametrize("shares", [SoftShares(0.25, 0.5), SoftShares(0.0, 0.4), SoftShares(0.3, 0.0), SoftShares()])
def test_answers_and_neighbours_are_torchs_cross_entropy_with_probabilities(shares):
    """From histories to the loss: what each target's weight goes to, written out as probabilities."""
    histories = Histories(
        users=np.array([0]),
        items=np.array([2, 3, 5, 4]),
        offsets=np.array([0, 4]),
        answers=np.array([[3, 8], [6, -1], [7, 9], [0, 0]]),  # of the first entry one is the target
        answer_scores=np.array([[2.0, 1.0], [0.5, 0.0], [1.0, 0.0], [9.0, 9.0]], np.float32),
        neighbours=np.array([[9, 1], [-1, -1], [4, 10], [0, 0]]),  # of the third entry one is the target
        neighbour_scores=np.array([[3.0, 1.0], [0.0, 0.0], [5.0, 0.5], [9.0, 9.0]], np.float32),
    )
    batch = make_batch(
        histories,
        row_length=8,
        capacity=Capacity(users=1, items=ITEMS),
        predict=True,
        soft_shares=shares,
        draw=lambda targets: AllItems(ITEMS).draw(targets, np.random.default_rng(0)),
    )
    expected = F.one_hot(torch.tensor([3, 5, 4]), ITEMS).float()
    soft = torch.tensor([1.0, 0.0]).softmax(0)
    for row, ids, weights, share in [
        (0, [8], [1.0], shares.answers),
        (1, [6], [1.0], shares.answers),
        (2, [7, 9], soft.tolist(), shares.answers),
        (0, [9, 1], [0.75, 0.25], shares.neighbours),
        (2, [10], [1.0], shares.neighbours),
    ]:
        for item, weight in zip(ids, weights, strict=True):
            expected[row, item] += share * weight
            expected[row, torch.tensor([3, 5, 4])[row]] -= share * weight
    h = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    catalogue = torch.randn(ITEMS, 8, generator=torch.Generator().manual_seed(1))
    loss = Dense(Model(dim=8), Loss(candidates="all")).sum_of_losses(h, catalogue[items_of(batch)], batch)
    torch.testing.assert_close(loss, F.cross_entropy(h @ catalogue.t(), expected, reduction="sum"))


def test_any_number_of_ranks_and_workers_trains_the_same_soft_targets(tmp_path):
    lists, random = walks(users=40, items=ITEMS, seed=3), np.random.default_rng(0)
    dataset = write_dataset(tmp_path, lists, items=ITEMS)
    neighbours: Lists = [[(int(j), 0.5) for j in random.permutation(ITEMS)[:4] if j != i] for i in range(ITEMS)]
    found = []
    for ranks, workers in ((1, 0), (2, 0), (3, 0), (1, 1)):
        reads: dict[str, Any] = {"neighbours": answers_of(neighbours), "thinning": (0.3, 0.5), "workers": workers}
        stream = stream_of(dataset, max_len=8, tokens=40, **reads)
        targets: Counter[tuple[Any, ...]] = Counter()
        for rank in range(ranks):
            for batch in stream.batches(1, Position(1), rank, ranks):
                items = items_of(batch)
                answers, weights = items[batch.soft_bag], batch.soft_weight
                for target, ids, shares in zip(items[batch.target_bag], answers, weights, strict=True):
                    targets[(int(target), *ids.tolist(), *shares.tolist())] += 1
        found.append(targets)
    assert found[0] == found[1] == found[2] == found[3]
    assert sum(any(key[-3:]) for key in found[0]) > 20


def write_neighbours(folder: Path, rows: list[dict[str, Any]] | None = None, **changed: Any) -> None:
    """Write a folder of neighbours of three items, as found in the dataset of `known_dataset`."""
    rows = rows or [{"item_id": item, "neighbour_ids": [(item + 1) % 3], "scores": [0.5]} for item in range(3)]
    fs = pyarrow.fs.LocalFileSystem()
    folder.mkdir()
    groups = [pa.Table.from_pylist(rows[:2]), pa.Table.from_pylist(rows[2:])]
    values: dict[str, Any] = {"dataset": "data", "vocabulary": "test", "hold_out": "last", "interactions": 8}
    values |= {"items": 3, "count": 2, **changed}
    manifest = NeighboursManifest(**values, parts=write_parts(fs, str(folder), "neighbours", groups, 1))
    write_manifest(fs, str(folder), manifest.to_json())


def known_dataset(folder: Path, **changed: Any) -> Any:
    dataset = write_dataset(folder, [[0, 1, 2, 0], [2, 1, 0, 1]])
    for name, value in changed.items():
        setattr(dataset.manifest, name, value)
    return dataset


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"item_id": 2}, "item ids are not in order"),
        ({"neighbour_ids": [3]}, "a neighbour whose id is not from 0 to 2"),
        ({"neighbour_ids": [-1]}, "a neighbour whose id is not from 0 to 2"),
        ({"neighbour_ids": [0, 1, 2], "scores": [0.5] * 3}, "more than 2 neighbours"),
        ({"scores": [0.5, 0.5]}, "not a score for each"),
        ({"scores": [0.0]}, "a score that is not more than 0"),
        ({"scores": [float("nan")]}, "a score that is not more than 0"),
        ({"neighbour_ids": [0, 2], "scores": [0.25, 0.5]}, "not best first"),
        ({"neighbour_ids": [1]}, "its own neighbour"),
        ({"neighbour_ids": None}, "lists are null"),
    ],
)
def test_a_damaged_part_is_named(row, message, tmp_path):
    rows = [{"item_id": item, "neighbour_ids": [(item + 1) % 3], "scores": [0.5]} for item in range(3)]
    write_neighbours(tmp_path / "found", [rows[0], {**rows[1], **row}, rows[2]])
    manifest = open_neighbours(str(tmp_path / "found"), known_dataset(tmp_path / "data"))
    with pytest.raises(InputError, match=r"the part neighbours/part-\d+.parquet is damaged .*" + message):
        NeighbourTable.open(str(tmp_path / "found"), manifest)


def put(values: dict[str, Any], more: dict[str, Any]) -> None:
    values.update(more)


def test_a_damaged_folder_is_refused(tmp_path):
    dataset, path = known_dataset(tmp_path / "data"), tmp_path / "found"
    write_neighbours(path)
    table = NeighbourTable.open(str(path), open_neighbours(str(path), dataset))
    assert table.ids.tolist() == [[1, NONE], [2, NONE], [0, NONE]]
    whole = (path / "manifest.json").read_text()
    changes: list[tuple[dict[str, Any], str]] = [
        ({"count": 0}, "count is 0, it must be from 1 to 100"),
        ({"count": 2**50}, "it must be from 1 to 100"),
        ({"items": 4}, "promises 4 items, but 3 rows"),
        ({"pairs": -1}, "pairs"),
        ({"neighbours_version": 9}, "version 9"),
        ({"more": 1}, "more"),
        ({"day": "x"}, "day"),
    ]
    for change, message in changes:
        change_json(path / "manifest.json", partial(put, more=change))
        with pytest.raises(InputError, match=message):
            open_neighbours(str(path), dataset)
        (path / "manifest.json").write_text(whole)
    part = path / "neighbours" / sorted(each.name for each in (path / "neighbours").iterdir())[0]
    content = part.read_bytes()
    part.write_bytes(content[:-1])
    with pytest.raises(InputError, match="the part neighbours/part-"):
        open_neighbours(str(path), dataset)
    part.write_bytes(b"x" * len(content))
    change_json(path / "manifest.json", lambda values: values["parts"][0].update(promise_of(part)))
    with pytest.raises(InputError, match="the part neighbours/part-.* is damaged"):
        NeighbourTable.open(str(path), open_neighbours(str(path), dataset))
    part.unlink()
    with pytest.raises(InputError, match="the part neighbours/part-"):
        open_neighbours(str(path), dataset)
    assert json.loads(whole)["neighbours_version"] == 1


TIME, FROM_7 = {"hold_out": "time"}, {"preparation": {"split": {"validation_from": 7}}}
EARLIER = {"vocabulary": "test, and more", "lineage": [Vocabulary(fingerprint="test", users=2, items=3)]}


@pytest.mark.parametrize(
    ("found", "dataset", "message"),
    [
        ({}, {}, None),
        ({"vocabulary": "another"}, {}, "they are of other items"),
        ({"hold_out": "none"}, {}, "with --hold_out none, and the dataset has --hold_out last"),
        ({"interactions": 9}, {}, "in 9 interactions, and the dataset has 8"),
        ({"split": {"test_from": 5}}, {}, "in another part of the same interactions"),
        ({"interactions": 6}, EARLIER, None),
        ({"interactions": 6, "hold_out": "none"}, EARLIER, "with --hold_out none"),
        ({"interactions": 6}, {**EARLIER, "hold_out": "none"}, None),
        ({}, {"vocabulary": "more", "lineage": [Vocabulary(fingerprint="test", users=2, items=2)]}, "has 2;"),
        ({**TIME, "split": {"validation_from": 7}}, {**EARLIER, **TIME, **FROM_7}, None),
        ({**TIME, "split": {"validation_from": 8}}, {**EARLIER, **TIME, **FROM_7}, "in what came before 8"),
        ({**TIME, "split": {"validation_from": 8}, "day": 1}, {**TIME, **FROM_7}, "in what came before 8"),
        ({"hold_out": "given"}, {**EARLIER, "hold_out": "given"}, "whose parts may be other ones"),
    ],
)
def test_neighbours_that_would_tell_what_is_held_out_are_refused(found, dataset, message, tmp_path):
    write_neighbours(tmp_path / "found", **found)
    opened = known_dataset(tmp_path / "data", **dataset)
    if message is None:
        assert open_neighbours(str(tmp_path / "found"), opened).items == 3
        return
    with pytest.raises(InputError, match=message) as caught:
        open_neighbours(str(tmp_path / "found"), opened)
    assert "ind them again: " in str(caught.value) and "find_neighbours --data" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": 1.1}, "--neighbours.share"),
        ({"memory": 0}, "--neighbours.memory"),
        ({"recency": 0.0}, "--neighbours.recency"),
        ({"answers": 21}, "--neighbours.answers"),
    ],
)
def test_options_that_cannot_be_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Neighbours(**values)


def test_a_loss_that_cannot_share_a_weight_is_refused():
    with pytest.raises(ValueError, match="bce has no softmax"):
        Neighbours(path="found").check("bce", ("--soft_targets", 0.0))
    with pytest.raises(ValueError, match="together they must be at most 1"):
        Neighbours(path="found", share=0.8).check("all", ("--tuning.soft_targets", 0.3))
    Neighbours(path="found", share=0.7).check("all", ("--tuning.soft_targets", 0.3))
    Neighbours().check("bce", ("--soft_targets", 1.0))
