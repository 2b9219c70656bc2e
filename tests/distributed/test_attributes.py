"""Attributes on one rank and on two, with any sharding: equal to a plain loop over dense matrices."""

from typing import Any

import numpy as np
import pytest
import torch

from recgpt_torchrec.catalogue.catalogue import Catalogue
from recgpt_torchrec.config.tables import TableChoice
from recgpt_torchrec.data.bags import table_name, tables_of
from recgpt_torchrec.data.dataset import Dataset, Manifest
from recgpt_torchrec.model.tabled.base import unwrapped
from recgpt_torchrec.training.building import build
from tests.distributed.training_helpers import (
    ATTRIBUTES,
    CAPACITY,
    ITEMS,
    UNTRAINED,
    USERS,
    WEIGHTS,
    Case,
    Trained,
    check_equal,
    gather_table,
    train_cases,
)
from tools.check_reshard import is_wrong
from tools.ranks import run_ranks
from tools.reshard import ATTRIBUTES as ATTRIBUTES_OF_LAYOUT
from tools.reshard import Layout, load_latest, output_folder, reshard

CASES = [
    Case("data_parallel", "rowwise_adagrad", "sampled", pooling="mean"),
    Case("table_wise", "rowwise_adagrad", "all", pooling="sum"),
    Case("table_wise", "adagrad", "in_batch", pooling="mean"),
    Case("row_wise", "rowwise_adagrad", "sampled", pooling="mean"),
    Case("row_wise", "rowwise_adagrad", "all", pooling="mean", idle=True),
    Case("row_wise", "sgd", "in_batch", pooling="sum"),
    Case("column_wise", "adagrad", "all", pooling="mean"),
    Case("column_wise", "adagrad", "sampled", pooling="sum"),
    Case("auto", "rowwise_adagrad", "sampled", pooling="mean"),
]
NODE_CASES = [
    Case("table_row_wise", "rowwise_adagrad", "sampled", pooling="mean"),
    Case("grid", "adagrad", "all", pooling="mean"),
    Case("grid", "adagrad", "sampled", pooling="sum", idle=True),
    Case("planner", "adagrad", "all", pooling="mean"),
]
"""Trained on two nodes of two ranks."""


@pytest.fixture(scope="module")
def trained() -> dict[int, list[Trained]]:
    """What rank 0 of one rank, and of two, ends with, case by case."""
    return {world: run_ranks(train_cases, world, CASES, timeout=200)[0] for world in (1, 2)}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_training_with_attributes_equals_a_plain_loop(trained, number, world_size):
    ours = trained[world_size][number]
    assert ours.tables.keys() == {"user", "item", *(each.described.table for each in ATTRIBUTES)}
    check_equal(CASES[number], ours)
    np.testing.assert_array_equal(ours.tables["item"][list(UNTRAINED)], ours.tables_before["item"][list(UNTRAINED)])


@pytest.fixture(scope="module")
def trained_on_nodes() -> list[Trained]:
    return run_ranks(train_cases, 4, NODE_CASES, 2, timeout=200)[0]


@pytest.mark.parametrize("number", range(len(NODE_CASES)), ids=[str(case) for case in NODE_CASES])
def test_training_with_attributes_on_two_nodes_equals_a_plain_loop(trained_on_nodes, number):
    check_equal(NODE_CASES[number], trained_on_nodes[number])


SOURCES = [
    Layout(2, "column_wise", "rowwise_adagrad", attributes=True),
    Layout(1, "table_wise", "rowwise_adagrad", attributes=True),
]
TARGETS = [
    Layout(2, "row_wise", "rowwise_adagrad", attributes=True),
    Layout(1, "data_parallel", "rowwise_adagrad", attributes=True),
]


def test_tables_of_attributes_are_restored_with_any_sharding(tmp_path):
    """With their moments: the losses of the next two steps are those of the saved model."""
    differences = run_ranks(reshard, 2, str(tmp_path), SOURCES, TARGETS, timeout=240)[0]
    assert {(each.source, each.target) for each in differences} == {(s, t) for s in SOURCES for t in TARGETS}
    assert not [each for each in differences if is_wrong(each)]
    saved = load_latest(output_folder(str(tmp_path), SOURCES[0]))
    for each in ATTRIBUTES_OF_LAYOUT:
        assert saved[f"model.tables.embedding_bags.{each.described.table}.weight"].any()
        assert saved[f"optimizer.state.tables.embedding_bags.{each.described.table}.weight.sum"].any()


def look_up(rank: int, world_size: int) -> tuple[dict[str, Any], Any, Any, Any]:
    """All tables, drawn, and what the model looks up of a user and the catalogue of all items, blocks at a time."""
    case = Case("row_wise", "rowwise_adagrad", "sampled", pooling="mean")
    config = case.config
    config.tables.attributes = TableChoice(sharding="column_wise")
    dataset, device = Dataset(path="", manifest=Manifest(users=USERS, items=ITEMS)), torch.device("cpu")
    model, _ = build(config, config.model, dataset, capacity=CAPACITY, device=device, **case.opened)
    torch.manual_seed(rank)
    for value in tables_of(model).values():
        for part in [shard.tensor for shard in value.local_shards()] if hasattr(value, "local_shards") else [value]:
            part.normal_()
    tables = {table_name(name): gather_table(value) for name, value in tables_of(model).items()}
    catalogue = Catalogue.of_model(unwrapped(model), ITEMS, device)
    queries = torch.eye(config.model.dim)
    scores = catalogue.top_k(queries, ITEMS)
    users = unwrapped(model).look_up(device, users=np.arange(rank, USERS, world_size), room=(USERS, 0)).users
    return tables, scores, users.numpy(), rank


@pytest.mark.parametrize("world_size", [1, 2])
def test_vectors_of_users_and_of_the_catalogue_equal_dense_sums(world_size):
    def dense(tables: dict[str, Any], entity: str, rows: int) -> np.ndarray:
        vectors = tables[entity].numpy().copy()
        if entity == "item":
            vectors[list(UNTRAINED)] = 0
        for each in ATTRIBUTES:
            if each.described.entity == entity:
                table = tables[each.described.table].numpy()
                for row, values in enumerate(each.lists):
                    if values:
                        vectors[row] += WEIGHTS.get(each.described.table, 1.0) * table[values].mean(0)
        assert len(vectors) == rows
        return vectors

    for tables, found, users, rank in run_ranks(look_up, world_size):
        np.testing.assert_allclose(users, dense(tables, "user", USERS)[rank::world_size], rtol=1e-5, atol=1e-6)
        vectors = dense(tables, "item", ITEMS)
        by_item = np.empty_like(vectors)
        for column, (scores, ids) in enumerate(zip(found.scores.numpy(), found.items.numpy(), strict=True)):
            by_item[ids, column] = scores
        np.testing.assert_allclose(by_item, vectors, rtol=1e-5, atol=1e-6)
