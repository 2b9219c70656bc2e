"""The mean of several teachers' answers, against one that is computed item by item."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from recgpt_torchrec.prompts.averaging import mean_answers


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_every_item_counts_with_its_score_or_the_lowest_of_a_list_that_lacks_it(teachers, number, seed):
    draw = np.random.default_rng(seed)
    rows = 5
    lists = []
    for _ in range(teachers):
        ids = np.array([draw.permutation(9)[:number] for _ in range(rows)])
        scores = np.round(draw.normal(size=(rows, number)), 1).astype(np.float32)  # rounded, so that some are equal
        none = np.arange(number) >= draw.integers(0, number + 1, size=(rows, 1))
        lists.append((np.where(none, -1, ids), np.where(none, 0, scores).astype(np.float32)))
    ids, means = mean_answers(lists)
    assert ids.shape == means.shape == (rows, number) and means.dtype == np.float32
    for row in range(rows):
        known = [
            {i: s for i, s in zip(each[row].tolist(), of[row].tolist(), strict=True) if i >= 0} for each, of in lists
        ]
        lowest = [min(each.values(), default=0.0) for each in known]
        mean = {
            item: sum(each.get(item, low) for each, low in zip(known, lowest, strict=True)) / teachers
            for item in set().union(*known)
        }
        found = [item for item in ids[row].tolist() if item >= 0]
        assert len(found) == len(set(found)) == min(number, len(mean))
        np.testing.assert_allclose(means[row][: len(found)], [mean[item] for item in found], rtol=1e-5, atol=1e-6)
        best = sorted(mean.values(), reverse=True)[: len(found)]
        np.testing.assert_allclose(means[row][: len(found)], best, rtol=1e-5, atol=1e-6)
        assert not means[row][len(found) :].any()


def test_one_teacher_keeps_its_answers_and_equal_scores_are_in_the_order_of_ids():
    ids, scores = np.array([[7, 2, 5]]), np.array([[3.0, 2.0, 1.0]], np.float32)
    for found, means in (mean_answers([(ids, scores)]), mean_answers([(ids, scores)] * 3)):
        assert found.tolist() == [[7, 2, 5]] and means.tolist() == [[3.0, 2.0, 1.0]]
    found, means = mean_answers(
        [
            (np.array([[9, 1]]), np.array([[2.0, 1.0]], np.float32)),
            (np.array([[4, 1]]), np.array([[2.0, 1.0]], np.float32)),
        ]
    )
    assert found.tolist() == [[4, 9]] and means.tolist() == [[1.5, 1.5]]
