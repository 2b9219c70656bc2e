"""The same global batches give the same losses, tables and decoder on one and two ranks with any sharding."""

import pytest
import torch

from tests.distributed.training_helpers import USERS, Case, Trained, check_equal, train_cases
from tools.ranks import run_ranks

CASES = [
    Case(sharding, "adagrad" if sharding == "column_wise" else "rowwise_adagrad", candidates)
    for sharding in ("data_parallel", "table_wise", "row_wise", "column_wise")
    for candidates in ("all", "sampled", "in_batch")
] + [
    Case("row_wise", "rowwise_adagrad", "sampled", idle=True),
    Case("table_wise", "adagrad", "all", few=True),
    Case("row_wise", "rowwise_adagrad", "all", idle=True),
    Case("row_wise", "rowwise_adagrad", "all", weighted=True),
    Case("table_wise", "adagrad", "sampled", weighted=True),
    Case("row_wise", "rowwise_adagrad", "sampled", timed=True),
    Case("row_wise", "rowwise_adagrad", "all", weighted=True, pooling="mean", timed=True, refused=True),
    Case("table_wise", "adagrad", "in_batch", idle=True, weighted=True, pooling="sum", timed=True, refused=True),
]
NODE_CASES = [
    Case("table_row_wise", "rowwise_adagrad", "all"),
    Case("table_row_wise", "adagrad", "sampled", idle=True),
    Case("table_row_wise", "sgd", "sampled"),
    Case("grid", "adagrad", "all"),
    Case("grid", "adagrad", "sampled", few=True),
    Case("row_wise", "rowwise_adagrad", "sampled"),
    Case("planner", "adagrad", "all"),
]
"""Trained on two nodes of two ranks."""


@pytest.fixture(scope="module")
def trained() -> dict[int, list[Trained]]:
    """What rank 0 of one rank, and of two, ends with, case by case."""
    return {world: run_ranks(train_cases, world, CASES, timeout=200)[0] for world in (1, 2)}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_training_equals_a_plain_loop_on_one_rank_and_on_two(trained, number, world_size):
    check_equal(CASES[number], trained[world_size][number])


@pytest.fixture(scope="module")
def trained_on_nodes() -> list[Trained]:
    """What rank 0 of two nodes of two ranks ends with, case by case."""
    return run_ranks(train_cases, 4, NODE_CASES, 2, timeout=200)[0]


@pytest.mark.parametrize("number", range(len(NODE_CASES)), ids=[str(case) for case in NODE_CASES])
def test_training_on_two_nodes_equals_a_plain_loop(trained_on_nodes, number):
    check_equal(NODE_CASES[number], trained_on_nodes[number])


def test_a_run_starts_from_the_same_values_whatever_the_sharding_and_the_number_of_ranks(trained):
    first = trained[1][0]
    assert 0.015 < first.tables_before["item"].std() < 0.025
    for results in trained.values():
        for other in results:
            for name, table in first.tables_before.items():
                assert torch.equal(other.tables_before[name], table), name
            for name, value in first.dense_before.items():
                assert torch.equal(other.dense_before[name], value), name
    assert not torch.equal(first.tables_before["user"], first.tables_before["item"][:USERS])
