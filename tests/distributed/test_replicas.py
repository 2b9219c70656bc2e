"""Groups of ranks that each hold all tables: they train what one group does, and save their average."""

import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torchrec.distributed import comm

from recgpt_torchrec.checkpoints.state import table_tensors
from recgpt_torchrec.config import Pretrain
from recgpt_torchrec.data.bags import table_name, tables_of
from recgpt_torchrec.data.dataset import Dataset, Manifest
from recgpt_torchrec.distributed.replicas import Replicas, group_size
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.training.building import build
from tests.distributed.training_helpers import (
    CAPACITY,
    ITEMS,
    USERS,
    Case,
    FixedStream,
    Trained,
    check_equal,
    gather_table,
    make_batches,
    make_trainer,
    train,
)
from tools.ranks import run_ranks
from tools.reshard import load_latest


@dataclass(frozen=True)
class GroupCase(Case):
    shard_ranks: int = 2
    sync_steps: int = 1
    local_world_size: int = 2

    @property
    def config(self) -> Pretrain:
        config = super().config
        config.tables.shard_ranks, config.tables.sync_steps = self.shard_ranks, self.sync_steps
        return config


CASES = [
    GroupCase("row_wise", "sgd", "sampled"),
    GroupCase("column_wise", "sgd", "sampled"),
    GroupCase("table_wise", "sgd", "sampled", idle=True),
    GroupCase("data_parallel", "adagrad", "sampled"),
    GroupCase("row_wise", "sgd", "sampled", weighted=True, pooling="mean", timed=True, refused=True),
    # A group of two nodes of one rank.
    GroupCase("grid", "sgd", "sampled", local_world_size=1),
    GroupCase("table_row_wise", "sgd", "sampled", local_world_size=1),
]


def train_groups(rank: int, world_size: int, folder: str) -> tuple[list[Trained], dict[str, Any]]:
    trained = []
    for case in CASES:
        os.environ["LOCAL_WORLD_SIZE"] = str(case.local_world_size)
        comm._INTRA_PG_2D = comm._CROSS_PG_2D = None
        trained.append(train(case, rank, world_size))
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    return trained, fit_groups(rank, world_size, folder)


def fit_groups(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """Train with the trainer, with an average only where one is needed; the average of the groups' tables before it."""
    case = GroupCase("row_wise", "rowwise_adagrad", "sampled", sync_steps=10**6)
    dataset = Dataset(path="", manifest=Manifest(users=USERS, items=ITEMS))
    model, optimizer = build(case.config, case.config.model, dataset, capacity=CAPACITY, device=torch.device("cpu"))
    run = make_trainer(model, optimizer, FixedStream(make_batches(case, rank, world_size), case), folder)
    run.replicas = Replicas(table_tensors(model, optimizer), 2, case.config.tables.sync_steps)
    own = [shard.tensor for value in tables_of(model).values() for shard in value.local_shards()]
    seen: dict[str, Any] = {}

    def validate() -> dict[str, float]:
        seen["in validation"] = {table_name(n): gather_table(v) for n, v in tables_of(model).items()}
        return {"NDCG@10": 0.0}

    average = run.replicas.average

    def noted() -> None:
        values: list[Any] = [None] * world_size
        dist.all_gather_object(values, [tensor.clone() for tensor in own])
        if rank == 0 and "apart" not in seen:
            seen["apart"] = max(float((a - b).abs().max()) for a, b in zip(values[0], values[2], strict=True))
            seen["mean"] = [(a + b) / 2 for a, b in zip(values[0], values[2], strict=True)]
        average()
        if rank == 0 and "averaged" not in seen:
            seen["averaged"] = [tensor.clone() for tensor in own]

    run.replicas.average = noted  # type: ignore[method-assign]
    run.fit(validate)
    seen["trained"] = {table_name(n): gather_table(v) for n, v in sorted(tables_of(model).items())}
    seen["saved"] = load_latest(folder)
    return seen


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Trained], dict[str, Any]]:
    return run_ranks(train_groups, 4, str(tmp_path_factory.mktemp("run")), timeout=200)[0]


@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_two_groups_that_average_each_step_of_sgd_train_what_a_plain_loop_does(results, number):
    check_equal(CASES[number], results[0][number])


def test_groups_drift_apart_and_are_averaged_before_validation_and_in_checkpoints(results):
    _, seen = results
    assert seen["apart"] > 1e-3
    for averaged, mean in zip(seen["averaged"], seen["mean"], strict=True):
        torch.testing.assert_close(averaged, mean)
    for name, table in seen["trained"].items():  # gather_table checked that the groups have the same
        (saved,) = (
            value for key, value in seen["saved"].items() if key.endswith(f"model.tables.embedding_bags.{name}.weight")
        )
        assert torch.equal(saved, table)


def test_groups_must_be_equal():
    assert [group_size(*sizes) for sizes in ((0, 6), (6, 6), (3, 6), (1, 6))] == [6, 6, 3, 1]
    with pytest.raises(InputError, match=r"--tables.shard_ranks 4: 6 ranks are not equal groups of 4. Give 3, or"):
        group_size(4, 6)
