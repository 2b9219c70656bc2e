"""Whole runs on other paths end where the plain one does: sequences end to end, fixed shapes, compiled, in bfloat16."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from recgpt_torchrec import pretrain
from recgpt_torchrec.config import Loss, Model, Pretrain, Train, TrainingBatch
from recgpt_torchrec.training.execution import Execution
from tests.support import walks, write_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, walks(120, 30, longest=14), items=30)
    return str(folder)


def train(data: str, output: Path, execution: Execution | None, **train: Any) -> list[dict[str, Any]]:
    """The epochs of a run, with `execution` instead of what its options would choose; in float32 unless they say so."""
    train = {"precision": "fp32", **train}
    with pytest.MonkeyPatch.context() as patch:
        if execution is not None:
            patch.setattr(Execution, "choose", lambda *_: execution)
        pretrain.main(
            Pretrain(
                data=data,
                output=str(output),
                model=Model(dim=8, max_len=10, layers=2, dropout=0, attention_dropout=0, user_dropout=0),
                loss=Loss(candidates="in_batch"),  # the number of candidates differs from batch to batch
                batch=TrainingBatch(tokens=64),
                train=Train(epochs=2, **train),
            )
        )
    return [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(data: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return train(data, tmp_path_factory.mktemp("plain") / "run", None)


@pytest.mark.parametrize("compiled", [False, True])
def test_sequences_end_to_end_train_the_same_model(data, plain, tmp_path, monkeypatch, compiled):
    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_with(function, backend="aot_eager", fullgraph=True))
    torch._dynamo.reset()
    epochs = train(data, tmp_path / "run", Execution("cpu", attention="varlen", compile=compiled))
    for ours, theirs in zip(epochs, plain, strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["NDCG@10"] == pytest.approx(theirs["NDCG@10"], abs=0.01)


def test_bfloat16_trains_nearly_the_same_model(data, plain, tmp_path):
    epochs = train(data, tmp_path / "run", None, precision="bf16")
    for ours, theirs in zip(epochs, plain, strict=True):
        assert ours["loss"] != theirs["loss"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.01)
