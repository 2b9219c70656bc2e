"""`tools/comirec.py` against loops over users, items and interests, and on histories that can be learnt."""

import math

import numpy as np
import pytest
import torch

from recgpt_torchrec.data.ragged import Ragged
from tools import comirec
from tools.small_run import walks

LENGTHS = [5, 1, 3]


def drawn(routing: str) -> tuple[comirec.ComiRec, torch.Tensor, torch.Tensor]:
    """A model with large weights, so that interests differ, and padded histories; the padding is a real item."""
    torch.manual_seed(0)
    model = comirec.ComiRec(11, routing=routing, dim=6, length=7, interests=3)
    with torch.no_grad():
        for each in model.parameters():
            each.normal_()
    history = torch.randint(1, 11, (3, 5))
    for row, length in enumerate(LENGTHS):
        history[row, length:] = 0
    return model, history, torch.tensor(LENGTHS)


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def attended(model: comirec.ComiRec, items: list[int]) -> np.ndarray:
    """[interests, dim] by self-attention, a history at a time."""
    table, positions = model.items.detach().numpy(), model.positions.detach().numpy()
    weights, biases = ([part.detach().numpy() for part in layer.parameters()] for layer in (model.hidden, model.heads))
    vectors = np.array([table[item] for item in items])
    hidden = [np.tanh(weights[0] @ (vectors[n] + positions[n]) + weights[1]) for n in range(len(items))]
    scores = np.array([biases[0] @ each + biases[1] for each in hidden])  # [n, interests]
    return np.array([softmax(scores[:, k]) @ vectors for k in range(model.interests)])


def routed(model: comirec.ComiRec, items: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """[interests, dim] by dynamic routing as in algorithm 1, and the last weights [n, interests]."""
    table, bilinear = model.items.detach().numpy(), model.bilinear.detach().numpy()
    votes = {(n, k): bilinear[n, k] @ table[item] for n, item in enumerate(items) for k in range(model.interests)}
    logits = np.zeros((len(items), model.interests))
    for _ in range(3):
        weights = np.array([softmax(row) for row in logits])
        capsules = []
        for k in range(model.interests):
            total = sum(weights[n, k] * votes[n, k] for n in range(len(items)))
            length = np.linalg.norm(total)
            capsules.append(length**2 / (1 + length**2) * total / length)
        logits += np.array([[votes[n, k] @ capsules[k] for k in range(model.interests)] for n in range(len(items))])
    return np.array(capsules), weights


@pytest.mark.parametrize("routing", ["SA", "DR"])
def test_interests_and_scores_are_those_of_a_loop_over_one_history(routing):
    model, history, lengths = drawn(routing)
    interests, scores = model(history, lengths).detach().numpy(), model.score(history, lengths).numpy()
    table = model.items.detach().numpy()
    for row, length in enumerate(LENGTHS):
        items = history[row, :length].tolist()
        expected = attended(model, items) if routing == "SA" else routed(model, items)[0]
        np.testing.assert_allclose(interests[row], expected, rtol=1e-4, atol=1e-5)
        for item in range(11):
            assert scores[row, item] == pytest.approx(max(each @ table[item] for each in expected), abs=1e-4)
    assert np.ptp(interests[0], axis=0).max() > 0.1  # they differ


def test_gradients_pass_the_last_step_of_the_routing_alone():
    model, history, lengths = drawn("DR")
    model(history, lengths)[:, 1].sum().backward()
    assert model.bilinear.grad is not None
    found = model.bilinear.grad.clone()
    model.bilinear.grad = None
    total = torch.zeros(())
    for row, length in enumerate(LENGTHS):
        items = history[row, :length].tolist()
        weights = torch.from_numpy(routed(model, items)[1]).float()  # constants
        votes = [weights[n, 1] * (model.bilinear[n, 1] @ model.items[item]) for n, item in enumerate(items)]
        total = total + comirec.squash(torch.stack(votes).sum(0)).sum()
    total.backward()
    torch.testing.assert_close(found, model.bilinear.grad, rtol=1e-3, atol=1e-5)


def test_the_sampled_softmax_is_that_of_a_loop_over_users():
    model, history, lengths = drawn("SA")
    targets, negatives = torch.tensor([2, 5, 9]), torch.tensor([1, 5, 7])
    expected_counts = torch.rand(11) + 0.1
    interests = model(history, lengths)
    found = comirec.sampled_softmax(model, interests, targets, negatives, expected_counts)
    losses = []
    for row, target in enumerate(targets.tolist()):
        own = model.items[target]
        nearest = max(interests[row], key=lambda each: float((each @ own).detach()))
        competing = [target, *(item for item in negatives.tolist() if item != target)]
        scores = [float((nearest @ model.items[item]).detach()) - math.log(expected_counts[item]) for item in competing]
        losses.append(math.log(sum(map(math.exp, scores))) - scores[0])
    assert found.item() == pytest.approx(np.mean(losses), rel=1e-4)


def test_negatives_are_training_items_drawn_as_often_as_expected():
    torch.manual_seed(0)
    counts = np.array([0, 9, 3, 0, 27, 1, 5])
    sampler = comirec.LogUniform(counts, 4)
    drawn = np.zeros(7)
    for _ in range(4000):
        items, expected = sampler.draw()
        assert len(set(items.tolist())) == len(items)
        drawn[items.numpy()] += 1
    assert drawn[[0, 3]].sum() == 0
    np.testing.assert_allclose(drawn / 4000, expected.numpy(), atol=0.03)
    by_rank = [math.log((rank + 2) / (rank + 1)) / math.log(6) for rank in range(5)]
    assert expected[[4, 1, 6, 2, 5]].tolist() == pytest.approx([1 - (1 - p) ** 4 for p in by_rank], rel=1e-4)


def test_targets_come_after_what_is_drawn_before_them_and_all_are_drawn():
    lists = [[1, 2, 3, 4, 5, 6], [7], [8, 9], [10, 11, 12]]
    draws = comirec.TargetDraws(Ragged.from_lists(lists), 2, 3, seed=0)
    assert draws.per_epoch == 4  # 8 targets, 2 users at a time
    seen = set()
    for _ in range(300):
        history, lengths, targets = draws.draw()
        for row, length, target in zip(history.tolist(), lengths.tolist(), targets.tolist(), strict=True):
            (items,) = [items for items in lists if target in items]
            place = items.index(target)
            assert row[:length] == items[max(0, place - 3) : place]
            seen.add(target)
    assert seen == {2, 3, 4, 5, 6, 9, 11, 12}


@pytest.mark.parametrize("routing", ["SA", "DR"])
def test_it_learns_which_items_follow(routing):
    torch.manual_seed(0)
    histories = Ragged.from_lists(walks(300, 30, longest=8))
    model = comirec.ComiRec(30, routing=routing, dim=8, length=8, interests=2)
    draws = comirec.TargetDraws(histories, 64, 8, seed=0)
    negatives = comirec.LogUniform(np.bincount(histories.values, minlength=30), 40)
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    for _ in range(100):
        history, lengths, targets = draws.draw()
        optimizer.zero_grad()
        comirec.sampled_softmax(model, model(history, lengths), targets, *negatives.draw()).backward()
        optimizer.step()
    history, lengths, targets = draws.draw()
    ranks = (model.score(history, lengths) > model.score(history, lengths).gather(1, targets[:, None])).sum(1)
    assert (ranks < 5).float().mean() > 0.5  # chance: a sixth
