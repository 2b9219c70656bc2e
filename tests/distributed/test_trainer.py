"""The trainer on several ranks: tables that its pipeline bypasses, saving by a clock, ranks without data."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recgpt_torchrec.config import Loss, Model, Pretrain, Tables, TrainingBatch
from recgpt_torchrec.data.batch import SequenceBatch
from recgpt_torchrec.data.dataset import Dataset, Manifest
from recgpt_torchrec.distributed.initial_values import initialise_tables
from recgpt_torchrec.distributed.sharding import shard
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.model import recgpt
from recgpt_torchrec.model.recgpt import RecGPT
from recgpt_torchrec.training.building import build, training_stream
from recgpt_torchrec.training.execution import Execution
from recgpt_torchrec.training.optimizers import fuse_optimizers, is_fused, optimizers_of
from tests.distributed.training_helpers import (
    CAPACITY,
    ITEMS,
    STEPS,
    USERS,
    Case,
    FixedStream,
    make_batches,
    make_trainer,
)
from tests.support import write_dataset
from tools.ranks import run_ranks


class ModifiesItsInput(RecGPT):
    """Looks ids up that were not in the batch as they are: torchrec cannot start their communication early."""

    def forward(self, batch: SequenceBatch) -> Any:
        values, lengths = batch.bags.values() + 0, batch.bags.lengths().clone()
        bags = KeyedJaggedTensor(keys=batch.bags.keys(), values=values, lengths=lengths)
        vectors = recgpt.vectors_of(self.tables(bags), bags, [])
        return self.dense(vectors[0], vectors[1], vectors[2], batch)


def check_the_pipeline(rank: int, world_size: int, folder: str) -> str:
    case = Case("table_wise", "rowwise_adagrad", "all")
    config, device = case.config, torch.device("cpu")
    unsharded = ModifiesItsInput(config.model, config.loss, USERS, ITEMS, item_keys=CAPACITY.item_keys)
    fuse_optimizers(unsharded, config.tables, device, frozen=set())
    fused = is_fused(config.tables.optimizer, device)
    model = shard(unsharded, config.tables, bags=ITEMS, device=device, fused=fused)
    initialise_tables(model, config.tables.init_std_of, seed=0)
    optimizer = optimizers_of(model, config.tables, config.optimizer, frozen=set())
    stream = FixedStream(make_batches(case, rank, world_size), case)
    try:
        make_trainer(model, optimizer, stream, folder).fit(lambda: {"NDCG@10": 0.0})
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_table_that_the_pipeline_bypasses_ends_the_run_with_an_error(tmp_path):
    for message in run_ranks(check_the_pipeline, 2, str(tmp_path)):
        assert "found 0 of the model's 1 sharded tables" in message


def save_by_the_clock(rank: int, world_size: int, folder: str) -> list[int]:
    case = Case("row_wise", "rowwise_adagrad", "all")
    dataset = Dataset(path="", manifest=Manifest(users=USERS, items=ITEMS))
    model, optimizer = build(case.config, case.config.model, dataset, capacity=CAPACITY, device=torch.device("cpu"))
    run = make_trainer(model, optimizer, FixedStream(make_batches(case, rank, world_size), case), folder, minutes=1e-9)
    saved: list[int] = []
    save = run.saver.save

    def noted(step: int, state: dict[str, Any], metadata: dict[str, Any]) -> None:
        saved.append(step)
        save(step, state, metadata)

    run.saver.save = noted  # type: ignore[method-assign]
    run.fit(lambda: {"NDCG@10": 0.0})
    return saved


def test_all_ranks_save_at_the_steps_that_one_ranks_clock_chooses(tmp_path):
    first, second = run_ranks(save_by_the_clock, 2, str(tmp_path))
    assert first == second  # rank 1 never looks at its own
    assert len(first) > 2 and first[-1] == 2 * STEPS


def train_two_items(rank: int, world_size: int, data: str, output: str) -> dict[str, Any]:
    dataset = Dataset.open(data)
    answers: dict[str, Any] = {}
    losses = {
        "sampled": Loss(candidates="sampled", negatives=5),
        "different": Loss(negatives=5, negatives_across_ranks="different"),
        "all": Loss(candidates="all"),
        "in_batch": Loss(candidates="in_batch"),
    }
    ways: list[tuple[Any, str]] = [("row_wise", "sampled"), *product(("data_parallel", "table_wise"), losses)]
    for sharding, loss in ways:
        config = Pretrain(
            data=data,
            output=output,
            model=Model(dim=8, max_len=6),
            loss=losses[loss],
            batch=TrainingBatch(tokens=12),
            tables=Tables(sharding=sharding),
        )
        stream = training_stream(config, config.model, dataset, 12, Execution("cpu"))
        try:
            model, optimizer = build(
                config, config.model, dataset, capacity=stream.maker.capacity, device=torch.device("cpu")
            )
        except InputError as error:
            answers[f"{sharding}-{loss}"] = str(error)
            continue
        run = make_trainer(
            model, optimizer, stream, f"{output}/{sharding}-{loss}", entries=dataset.manifest.interactions
        )
        run.fit(lambda: {"NDCG@10": 0.0})
        answers[f"{sharding}-{loss}"] = run.progress.finished, run.progress.step, run.progress.read
    return answers


def test_fewer_items_than_ranks_and_ranks_without_data(tmp_path):
    histories = [[0, 1, 0, 1, 1, 0], [1, 0, 1], [0, 0, 1, 1], [1]]
    dataset = write_dataset(
        tmp_path / "data", histories, items=2, rows_per_group=2
    )  # one window: two ranks get nothing
    answers = run_ranks(train_two_items, 3, str(tmp_path / "data"), str(tmp_path))
    assert answers[0] == answers[1] == answers[2]
    refused = "the item table cannot be sharded row_wise: it has 2 rows, fewer than the 3 ranks. "
    assert answers[0]["row_wise-sampled"] == refused + "--tables.item.sharding table_wise would fit"
    assert len(answers[0]) == 9
    for way in set(answers[0]) - {"row_wise-sampled"}:
        finished, steps, read = answers[0][way]
        assert finished and steps >= 2 and read == pytest.approx(2 * dataset.manifest.interactions)
        assert (Path(tmp_path) / way / "best.json").exists()
