"""Answers of a model and of neighbours together, against a plain loop that computes every score from scratch."""

from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
import torch

from recgpt_torchrec.catalogue.catalogue import Catalogue
from recgpt_torchrec.config import Loss, Model, Prompts
from recgpt_torchrec.data.neighbours.answering import NeighbourAnswers
from recgpt_torchrec.model.dense import Dense
from recgpt_torchrec.prompts import boosting
from recgpt_torchrec.prompts.boosting import NeighbourBoost
from recgpt_torchrec.prompts.intervals import intervals_of, table_of
from recgpt_torchrec.prompts.prompting import Prompter
from tests.data.test_neighbours import plain_answers
from tests.data.test_neighbours import table_of as neighbours_of
from tests.prompts.test_prompting import DIM, ITEMS, MAX_LEN, random_rows, random_user_vectors, rows_of, score

ANSWERS, MEMORY, RECENCY, WEIGHT = 4, 3, 0.5, 3.0
LENGTHS = [4, 0, 6, 1, 2, 5, 3, 6]
KNOWN = ITEMS - 2
"""Items that have neighbours; the others are newer."""


@pytest.fixture(scope="module")
def model() -> tuple[Dense, Catalogue]:
    torch.manual_seed(0)
    dense = Dense(Model(dim=DIM, heads=2, layers=2, max_len=MAX_LEN), Loss())
    for parameter in dense.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return dense.eval(), Catalogue.of_vectors(torch.randn(ITEMS, DIM, generator=torch.Generator().manual_seed(1)))


@pytest.fixture(scope="module")
def lists() -> list[list[tuple[int, float]]]:
    """Neighbours of each item, best first; of some there are none."""
    rng = np.random.default_rng(4)
    rows = [rng.permutation(KNOWN)[: rng.integers(0, 5)].tolist() for _ in range(KNOWN)]
    return [[(item, 1.0 - 0.125 * place) for place, item in enumerate(row)] for row in rows]


def fill(
    model: tuple[Dense, Catalogue],
    lists: list[list[tuple[int, float]]] | None,
    table: pa.Table,
    hold_out: Literal["last", "time", "none"] = "last",
    batch_users: int = 3,
    **prompts: Any,
) -> pa.Table:
    boost = None
    if lists is not None:
        found = NeighbourAnswers(
            table=neighbours_of(lists, 5), memory=MEMORY, recency=RECENCY, answers=boosting.CANDIDATES
        )
        boost = NeighbourBoost(neighbours=found, weight=WEIGHT, hold_out=hold_out)
    options = Prompts(answers=ANSWERS, **prompts)
    histories = intervals_of(table, options.k, MAX_LEN, (), ANSWERS)
    Prompter(*model, options, MAX_LEN, batch_users, boost).fill(histories, random_user_vectors(len(table)))
    return table_of(histories)


def starts_of(rows: list[list[int]], hold_out: str) -> list[int]:
    """Number of items of the training part of each row."""
    if hold_out == "time":
        return [len(row) * 2 // 3 for row in rows]
    return [len(row) - 2 if hold_out == "last" and len(row) >= 3 else len(row) for row in rows]


def with_starts(rows: list[list[int]], hold_out: str) -> pa.Table:
    table = rows_of(rows)
    if hold_out != "time":
        return table
    starts = starts_of(rows, hold_out)
    for name, values in (
        ("validation_start", starts),
        ("test_start", [min(s + 1, len(row)) for s, row in zip(starts, rows, strict=True)]),
    ):
        table = table.append_column(name, pa.array(values, pa.int64()))
    return table


def answers_of(made: pa.Table, row: int) -> tuple[Any, Any]:
    """The answers after each interacted item of a row, and their scores, [items, answers] each."""
    ids, scores = (np.array(made[name][row].as_py()) for name in ("answer_ids", "answer_scores"))
    return ids.reshape(-1, ANSWERS), scores.reshape(-1, ANSWERS)


@pytest.mark.parametrize(("hold_out", "exclude_seen"), [("last", True), ("none", False), ("time", True)])
def test_answers_are_the_best_by_logit_and_co_occurrence_that_the_users_training_part_lacks(
    model, lists, hold_out, exclude_seen
):
    rows = random_rows(LENGTHS, seed=3)
    rows += [] if hold_out == "time" else random_rows([9, 12], seed=5)  # longer than the model reads
    options = {"k": 0, "exclude_seen": exclude_seen}
    made = fill(model, lists, with_starts(rows, hold_out), hold_out, **options)
    users, raised = random_user_vectors(len(rows)), 0
    for u, (row, training) in enumerate(zip(rows, starts_of(rows, hold_out), strict=True)):
        answers, scores = answers_of(made, u)
        first = max(0, len(row) - MAX_LEN)
        assert made["item_ids"][u].as_py() == row
        assert len(answers) == len(row) and (answers[:first] == -1).all() and (answers[-1:] == -1).all()
        for place in range(first, len(row) - 1):
            read = row[first : place + 1]
            expected = score(model[0], model[1], users[u], read, [*range(len(read))])
            out = {*row[:training], *row[: place + 1]}
            found = plain_answers(lists, row[: place + 1], {*row[:training]}, MEMORY, RECENCY, 50)
            for item, value in found:
                expected[item] += WEIGHT * value / found[0][1]
                raised += item not in out
            expected[list(out)] = -torch.inf
            best = expected.topk(min(ANSWERS, ITEMS - len(out)))
            assert answers[place].tolist() == best.indices.tolist() + [-1] * (ANSWERS - len(best.indices))
            assert scores[place, : len(best.values)].tolist() == pytest.approx(best.values.tolist(), rel=1e-4, abs=1e-5)
    assert raised > 20


def test_prompts_are_the_models_alone(model, lists):
    table = rows_of(random_rows(LENGTHS, seed=3))
    alone, together = fill(model, None, table, k=2), fill(model, lists, table, k=2)
    for name in ("item_ids", "segment_ids"):
        assert together[name].equals(alone[name])
    assert not together["answer_ids"].equals(alone["answer_ids"])


@pytest.mark.parametrize("hold_out", ["last", "time"])
def test_answers_after_items_of_the_training_part_do_not_depend_on_what_is_held_out(model, lists, hold_out):
    rows = random_rows([6] * 8, seed=7)
    before = fill(model, lists, with_starts(rows, hold_out), hold_out, k=1)
    others = [list(row) for row in rows]
    for row in others:
        left = [item for item in range(ITEMS) if item not in row]
        row[4:] = left[:2]
    after, held_out = fill(model, lists, with_starts(others, hold_out), hold_out, k=1), 0
    assert starts_of(rows, hold_out) == [4] * 8
    for u in range(len(rows)):
        (mine, my_scores), (theirs, their_scores) = answers_of(before, u), answers_of(after, u)
        assert (mine[:4] == theirs[:4]).all() and my_scores[:4] == pytest.approx(their_scores[:4], rel=1e-4, abs=1e-5)
        held_out += int((mine[4] != theirs[4]).any())
    assert held_out > 4  # what follows the first item that is held out did change


def test_answers_do_not_depend_on_who_is_decoded_beside(model, lists, monkeypatch):
    table = rows_of(random_rows(LENGTHS, seed=3))
    made = [fill(model, lists, table, batch_users=n, k=1)["answer_ids"].to_pylist() for n in (1, 3)]
    monkeypatch.setattr(boosting, "ENTRIES", 2)  # neighbours are summed for two items at once
    assert made[0] == made[1] == fill(model, lists, table, batch_users=100, k=1)["answer_ids"].to_pylist()
