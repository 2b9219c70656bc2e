"""Tables and communication in half precision end close to float32's, and what would not is refused."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from recgpt_torchrec.config import Pretrain, Tables
from recgpt_torchrec.data.bags import tables_of
from recgpt_torchrec.data.dataset import Dataset, Manifest
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.training.building import build
from tests.distributed.training_helpers import CAPACITY, ITEMS, USERS, Case, Trained, train
from tools.ranks import run_ranks


@dataclass(frozen=True)
class HalfCase(Case):
    precision: Any = "fp32"
    communication: Any = "fp32"

    @property
    def config(self) -> Pretrain:
        config = super().config
        config.tables.precision, config.tables.communication = self.precision, self.communication
        return config


FULL = [HalfCase(sharding, "rowwise_adagrad", "all") for sharding in ("table_wise", "row_wise", "column_wise")]
FULL.append(HalfCase("row_wise", "rowwise_adagrad", "all", weighted=True, pooling="mean", timed=True, refused=True))
HALF = [replace(case, precision="fp16") for case in FULL]
SENT = [replace(case, communication="fp16") for case in FULL]
REFUSED = {
    "data_parallel": Tables(sharding="data_parallel", precision="fp16"),
    "adam": Tables(optimizer="adam", precision="fp16"),
    "bf16": Tables(communication="bf16"),
}


def train_all(rank: int, world_size: int) -> tuple[list[Trained], dict[str, str], dict[str, Any]]:
    trained = [train(case, rank, world_size) for case in [*FULL, *HALF, *SENT]]
    errors = {}
    dataset = Dataset(path="", manifest=Manifest(users=USERS, items=ITEMS))
    config, device = FULL[0].config, torch.device("cpu")
    for name, tables in REFUSED.items():
        config.tables = tables
        try:
            build(config, config.model, dataset, capacity=CAPACITY, device=device)
        except InputError as error:
            errors[name] = str(error)
    config.tables = Tables(precision="fp16")  # auto
    model, _ = build(config, config.model, dataset, capacity=CAPACITY, device=device)
    return trained, errors, {name: str(value.dtype) for name, value in tables_of(model).items()}


@pytest.fixture(scope="module")
def results() -> tuple[list[Trained], dict[str, str], dict[str, Any]]:
    return run_ranks(train_all, 2, timeout=200)[0]


@pytest.mark.parametrize("number", range(len(FULL)), ids=[str(case) for case in FULL])
@pytest.mark.parametrize("kind", ["tables", "communication"])
def test_training_ends_close_to_float32(results, number, kind):
    trained, _, _ = results
    full, half = trained[number], trained[number + len(FULL) * (1 if kind == "tables" else 2)]
    np.testing.assert_allclose(half.losses, full.losses, rtol=2e-4)
    assert half.losses != full.losses, "nothing was rounded: the comparison proves nothing"
    for name, table in full.tables.items():
        torch.testing.assert_close(half.tables[name], table, rtol=5e-3, atol=2e-3, msg=name)
    if kind == "tables":
        for table in half.tables.values():
            assert torch.equal(table, table.half().float())


def test_what_cannot_be_trained_in_half_precision_is_refused(results):
    _, errors, dtypes = results
    assert "the moments of a trained copy would be fp16" in errors["data_parallel"]
    assert "row_wise would fit" in errors["data_parallel"]
    assert "fp16 needs a --tables.optimizer that is fused into the backward" in errors["adam"]
    assert errors["bf16"] == "--tables.communication bf16 needs CUDA: gloo sends fp32 and fp16. Give fp16"
    assert set(dtypes.values()) == {"torch.float16"}  # auto copies no table that is trained in float16
