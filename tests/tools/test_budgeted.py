"""`tools/budgeted.py`: when a training ends, which state of the model is measured, and against which users."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recgpt_torchrec.data.ragged import Ragged
from tools import budgeted


def plain_metrics(part: budgeted.Part, scores: np.ndarray, k: int, masked: bool) -> tuple[float, float]:
    """HR and NDCG by a plain loop over users and items; `scores` [users, items] by user id."""
    hits = gains = 0.0
    for user, seen, target in zip(part.users, part.history.to_lists(), part.targets, strict=True):
        own = scores[user]
        others = [i for i in range(len(own)) if i != target and not (masked and i in seen)]
        rank = sum((own[item] > own[target]) + (own[item] == own[target]) / 2 for item in others)
        if rank < k and not (masked and target in seen):
            hits, gains = hits + 1, gains + 1 / math.log2(rank + 2)
    return hits / len(part.users), gains / len(part.users)


def draw_part(users: int, items: int) -> budgeted.Part:
    rng = np.random.default_rng(1)
    lists = [rng.integers(0, items, rng.integers(1, 6)).tolist() for _ in range(users)]
    return budgeted.Part(rng.permutation(2 * users)[:users], Ragged.from_lists(lists), rng.integers(0, items, users))


def test_scores_in_any_order_of_users_are_ranked_as_a_plain_loop_does():
    part = draw_part(50, 20)
    scores = np.random.default_rng(2).integers(0, 6, (100, 20)).astype(np.float32)  # with many ties
    order = np.random.default_rng(3).permutation(part.users)
    batches = [(users, torch.from_numpy(scores[users])) for users in np.split(order, [7, 31])]
    found = budgeted.measure(batches, part, (1, 5))
    assert found["users"] == 50
    for how in ("masked", "unmasked"):
        for k in (1, 5):
            expected = plain_metrics(part, scores, k, how == "masked")
            assert (found[how][f"HR@{k}"], found[how][f"NDCG@{k}"]) == pytest.approx(expected)
    assert found["masked"] != found["unmasked"]
    for wrong in (batches[:2], [*batches, batches[0]]):
        with pytest.raises(ValueError, match="not scored once"):
            budgeted.measure(wrong, part, (5,))
    with pytest.raises(ValueError, match="no item held out"):
        stranger = np.setdiff1d(np.arange(100), part.users)[:1]
        budgeted.measure([(stranger, torch.zeros(1, 20))], part, (5,))


class Fake(torch.nn.Module):
    """A model with one weight; with weight w, the target of a user is at the rank that `ranks` has for w."""

    def __init__(self, part: budgeted.Part, ranks: list[int]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.part, self.ranks = part, ranks

    def score(self, split: str) -> budgeted.Scored:
        rank = self.ranks[min(int(self.weight), len(self.ranks) - 1)]
        scores = torch.arange(100, 0, -1).float().repeat(len(self.part.users), 1)
        scores[torch.arange(len(scores)), torch.from_numpy(self.part.targets)] = 100.5 - rank
        yield self.part.users, scores


@pytest.fixture
def job(tmp_path: Path) -> budgeted.Job:
    users = np.arange(3)
    part = budgeted.Part(users, Ragged.from_lists([[90], [91], [92]]), np.array([99, 98, 97]))
    arrays: dict[str, Any] = {}
    for split in budgeted.HELD_OUT:
        values = (part.users, part.history.values, part.history.offsets, part.targets)
        arrays |= {f"{split}_{n}": v for n, v in zip(("users", "values", "offsets", "targets"), values, strict=True)}
    np.savez(tmp_path / "parts.npz", **arrays)
    names: dict[str, Any] = {"log": str(tmp_path), "scratch": str(tmp_path), "result": str(tmp_path / "result.json")}
    return budgeted.Job(model="Fake", items=100, minutes=5.0, seed=0, threads=1, started=0.0, **names)


class Clock:
    """A clock that moves where a test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(budgeted.time, "perf_counter", made)
    return made


def train(job: budgeted.Job, clock: Clock, ranks: list[int], batches: int) -> tuple[Fake, dict]:
    """Train with batches of 10 seconds and validations of 7."""
    budget = budgeted.Budget(job, batches)
    model = Fake(budgeted.read_part(job.log, "test"), ranks)

    def train_epoch(epoch: int) -> None:
        for _ in range(batches):
            budget.tick(40)
            clock.now += 10
        model.weight.data += 1

    def score(split: str) -> budgeted.Scored:
        yield from model.score(split)
        clock.now += 7

    return model, budgeted.train(budget, model, train_epoch, score)


def test_the_best_state_is_measured_and_ten_validations_without_a_better_one_end_the_training(job, clock):
    model, found = train(job, clock, [50, 9, 3, 7], 1)  # best after two epochs
    assert int(model.weight) == 2 and found["stopped"] == "early" and found["epochs"] == 12
    assert found["best"] == found["curve"][1] and found["best"]["epochs"] == 2
    assert found["best"]["masked"] == found["masked"]["NDCG@10"] == pytest.approx(1 / math.log2(3 + 2))
    assert found["masked"]["HR@5"] == 1 and [point["epochs"] for point in found["curve"]] == list(range(1, 13))


def test_time_that_is_over_within_an_epoch_is_validated_too_and_validations_are_told_apart(job, clock):
    _, found = train(job, clock, [5], 5)  # epochs of 50 s and 7 s of validation: the sixth begins at 285 of 300 s
    assert found["stopped"] == "minutes" and [point["epochs"] for point in found["curve"]] == [1, 2, 3, 4, 5, 5.4]
    assert (found["seconds"], found["train_s"]) == (305, 305 - 5 * 7)
    assert found["best"] == {"epochs": 1, "seconds": 50, "train_s": 50} | {
        how: found["curve"][0][how] for how in ("masked", "unmasked")
    }


def test_a_state_is_not_validated_twice_where_time_is_over_between_epochs(job, clock):
    job.minutes = 2 * 47 / 60
    _, found = train(job, clock, [5], 4)
    assert found["stopped"] == "minutes" and [point["epochs"] for point in found["curve"]] == [1, 2]


def test_progress_names_rate_and_time_left(job, clock, capsys):
    train(job, clock, [5], 4)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Fake: epoch 1, batch 2 of 4, 4 targets/s, 0.3 minutes, at most 4.7 left"
    # between this line and the one before: two batches of 10 s and a validation of 7, which the rate leaves out
    assert lines[1].startswith(
        "Fake: epoch 2, batch 0 of 4, 4 targets/s, 0.8 minutes, at most 4.2 left; best validation"
    )


def test_a_phase_has_its_share_of_the_minutes(job, clock):
    budget = budgeted.Budget(job, 10)
    budget.start("pre-training, ", 0.5)
    clock.now = 149
    budget.tick(1)
    clock.now = 150
    with pytest.raises(budgeted.TimeUp):
        budget.tick(1)
    budget.start("", 1.0)
    assert budget.epochs == 0
    budget.tick(1)
    clock.now = 300
    with pytest.raises(budgeted.TimeUp):
        budget.tick(1)
