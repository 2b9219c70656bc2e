"""Drawn prompts: their frequencies are the softmax, and nothing but seed, user, place, slot and item decides."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recgpt_torchrec.config import Prompts
from recgpt_torchrec.prompts.sampling import draw_items

ITEMS = torch.tensor([7, 2, 11, 5, -1])
SCORES = torch.tensor([2.0, 1.0, 0.5, -1.0, 9.0])


def draw(rows: int, *, temperature: float = 1.0, seed: int = 0, slot: int = 0, users=None, places=None) -> np.ndarray:
    users = np.arange(rows) if users is None else users
    places = np.zeros(rows, np.int64) if places is None else places
    prompts = Prompts(temperature=temperature, seed=seed)
    return draw_items(ITEMS.expand(rows, -1), SCORES.expand(rows, -1), prompts, users, places, slot).numpy()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("over", ["users", "places"])
def test_items_are_drawn_as_often_as_the_softmax_says(temperature, over):
    rows = 40_000
    numbers, same = np.arange(rows), np.zeros(rows, np.int64)
    users, places = (numbers, same) if over == "users" else (same, numbers)
    drawn = draw(rows, temperature=temperature, users=users, places=places)
    expected = torch.softmax(SCORES[:4] / temperature, 0).numpy()
    seen = np.array([(drawn == item).mean() for item in ITEMS[:4].tolist()])
    assert np.abs(seen - expected).max() < 5 * np.sqrt(0.25 / rows)


def test_seed_slot_place_and_user_each_draw_anew_and_independently():
    rows = 20_000
    first = draw(rows)
    same = (torch.softmax(SCORES[:4], 0) ** 2).sum().item()  # how often two independent draws agree
    for other in (draw(rows, seed=1), draw(rows, slot=1), draw(rows, places=np.ones(rows, np.int64))):
        assert abs((first == other).mean() - same) < 0.02
    assert abs((first == np.roll(first, 1)).mean() - same) < 0.02
    assert (draw(rows) == first).all()


def test_a_low_temperature_gives_the_best_item_and_a_high_one_every_item_alike():
    assert set(draw(1000, temperature=1e-6).tolist()) == {7}
    counts = np.bincount(draw(8000, temperature=1e6), minlength=12)[[7, 2, 11, 5]]
    assert counts.min() > 1800


def test_a_row_without_items_has_none():
    items, scores = torch.full((2, 3), -1), torch.full((2, 3), -torch.inf)
    rows = np.zeros(2, np.int64)
    assert draw_items(items, scores, Prompts(temperature=1.0), rows, rows, 0).tolist() == [-1, -1]


@settings(max_examples=50, deadline=None)
@given(
    users=st.lists(st.integers(-1, 2**62), min_size=1, max_size=8),
    seed=st.integers(0, 2**31 - 1),
    place=st.integers(0, 2**40),
    slot=st.integers(0, 7),
)
def test_a_draw_depends_neither_on_the_rows_beside_it_nor_on_the_order_of_its_candidates(users, seed, place, slot):
    ids, places = np.array(users), np.full(len(users), place)
    together = draw(len(users), seed=seed, slot=slot, users=ids, places=places)
    order = torch.tensor([3, 0, 4, 2, 1])
    for row in range(len(users)):
        one = slice(row, row + 1)
        prompts = Prompts(temperature=1.0, seed=seed)
        alone = draw_items(ITEMS[order][None], SCORES[order][None], prompts, ids[one], places[one], slot)
        assert alone.item() == together[row]
