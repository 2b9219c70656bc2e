"""`--batch.tokens auto` follows the data's size, not the number of ranks, and a resumed run keeps what it chose."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recgpt_torchrec.config import Model, Pretrain, TrainingBatch
from recgpt_torchrec.config.defaults import FEWEST, MOST, MULTIPLE, STEPS, tokens_of_rank, tokens_of_step
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.reading.histories import HistoryReader
from recgpt_torchrec.data.windows import row_groups
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.training import building
from recgpt_torchrec.training.building import choose_tokens
from recgpt_torchrec.training.execution import Execution
from recgpt_torchrec.training.run import RUN
from tests.support import SMALL, change_json, read_epochs, stage, walks, write_dataset

CPU = torch.device("cpu")
AUTO = {**SMALL, "--batch.tokens": "auto"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("epoch", [0, 10, 1000, 17_929, 85_465, 1_000_000, 10**9])
def test_a_step_has_as_many_tokens_as_give_the_steps_within_its_bounds(epoch: int, device: str) -> None:
    for ranks in (1, 2, 3, 8):
        step = tokens_of_step(epoch, ranks, device)
        assert FEWEST <= step <= MOST[device] * ranks
        if FEWEST < step < MOST[device] * ranks:
            assert STEPS - 1 <= epoch / step <= STEPS
            assert step == tokens_of_step(epoch, 1, device) or step > MOST[device]  # one rank cannot hold that many
        rank = tokens_of_rank(step, ranks, max_len=10)
        assert rank % MULTIPLE == 0 and step <= rank * ranks < step + MULTIPLE * ranks


def test_a_rank_holds_the_longest_history_at_least() -> None:
    assert tokens_of_rank(256, 2, max_len=50) == 128
    assert tokens_of_rank(256, 8, max_len=10) == 32
    assert tokens_of_rank(256, 8, max_len=50) == 50
    assert tokens_of_rank(256, 2, max_len=200) == 200


def lengths_read(dataset: Dataset, max_len: int, long_histories: Any = "newest") -> int:
    reader = HistoryReader(dataset=dataset, split="training", max_len=max_len, long_histories=long_histories)
    return int(np.maximum(reader.read(row_groups(dataset)).lengths - 1, 0).sum())


def test_tokens_of_an_epoch_are_about_those_that_are_read(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, walks(users=200, items=20, shortest=5, longest=60), items=20)
    count = dataset.manifest.count_training_tokens
    assert count(None, prompts=False) == lengths_read(dataset, 100) == lengths_read(dataset, 7, "windows")
    assert lengths_read(dataset, 7) <= count(7, prompts=False) <= 1.05 * lengths_read(dataset, 7)
    assert lengths_read(dataset, 30) <= count(30, prompts=False) <= 1.35 * lengths_read(dataset, 30)


def test_prompts_count_where_they_are_read(tmp_path: Path) -> None:
    histories = [[1, 9, 2, 9, 3, 9, 4, 9, 5]] * 3
    dataset = write_dataset(tmp_path, histories, items=10, segments=[[0, 2, 0, 2, 0, 2, 0, 2, 0]] * 3)
    object.__setattr__(dataset.manifest, "interactions", 15)  # as prepare and generate_prompts record it
    assert dataset.manifest.count_training_tokens(None, prompts=False) == 15 - 3 * 3
    assert dataset.manifest.count_training_tokens(None, prompts=True) == (15 - 3 * 3) * 27 / 15


def config_of(folder: Path, tokens: Any = "auto", max_len: int = 10) -> Pretrain:
    return Pretrain(
        data=str(folder / "data"),
        output=str(folder / "run"),
        model=Model(dim=8, max_len=max_len),
        batch=TrainingBatch(tokens=tokens),
    )


def test_a_run_keeps_the_tokens_of_a_step_on_any_number_of_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_dataset(tmp_path / "data", walks(users=60, items=20), items=20)
    options = {"--data": tmp_path / "data", "--output": tmp_path / "run", **AUTO}
    assert stage("pretrain", options) == 0
    assert "tokens 128 per rank (auto: 3 steps an epoch)" in " ".join(capsys.readouterr().out.split())
    assert read_epochs(tmp_path / "run")[0]["step"] == 3
    config = config_of(tmp_path)
    monkeypatch.setattr(building, "tokens_of_step", lambda *_: 1024)  # a later version may choose otherwise
    for ranks, wanted in ((1, 128), (2, 64), (8, 32)):
        monkeypatch.setattr(building, "world_size", lambda ranks=ranks: ranks)
        chosen = choose_tokens(config, config.model, dataset, CPU)
        assert (chosen.rank, chosen.step) == (wanted, 128)
    monkeypatch.setattr(building, "world_size", lambda: 1)
    assert stage("pretrain", options) == 0  # finished
    assert stage("pretrain", {**options, "--batch.tokens": 128}) == 2
    assert "--batch.tokens: auto there, 128 now" in capsys.readouterr().err


def test_auto_resumes_a_run_that_was_given_a_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = write_dataset(tmp_path / "data", walks(users=60, items=20), items=20)
    options = {"--data": tmp_path / "data", "--output": tmp_path / "run", **SMALL}
    assert stage("pretrain", options) == 0  # 60 tokens
    config = config_of(tmp_path)
    chosen = choose_tokens(config, config.model, dataset, CPU)
    assert (chosen.rank, chosen.step) == (60, None)
    assert stage("pretrain", {**options, "--batch.tokens": "auto"}) == 0
    assert "is already trained" in capsys.readouterr().out


@pytest.mark.parametrize("tokens", [0, -5, 2**60, "many", None, True])
def test_a_number_of_tokens_in_a_record_is_checked(
    tmp_path: Path, tokens: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "data", walks(users=60, items=20), items=20)
    options = {"--data": tmp_path / "data", "--output": tmp_path / "run", **AUTO}
    assert stage("pretrain", options) == 0
    record = tmp_path / "run" / RUN
    change_json(record, lambda values: values["config"]["batch"].update(tokens=tokens))
    assert stage("pretrain", options) == 2
    assert "--batch.tokens: " in capsys.readouterr().err
    change_json(record, lambda values: values["config"]["batch"].update(tokens="auto"))
    change_json(record, lambda values: values.update(step_tokens=tokens))
    assert stage("pretrain", options) == (0 if tokens is None else 2)
    assert tokens is None or "run.json" in capsys.readouterr().err


def test_users_per_batch_give_it_the_tokens_of_their_longest_histories(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "data", walks(users=60, items=20), items=20)
    config = config_of(tmp_path, max_len=7)
    config.batch = TrainingBatch(users=16)
    chosen = choose_tokens(config, config.model, dataset, CPU)
    assert (chosen.rank, chosen.step) == (16 * 7, None)
    options = {"--data": tmp_path / "data", "--output": tmp_path / "run", **AUTO, "--batch.users": 16}
    assert stage("pretrain", options) == 0
    assert read_epochs(tmp_path / "run")[0]["step"] == 4  # 60 users
    with pytest.raises(ValueError, match="--batch.users is -1; it must be at least 0"):
        TrainingBatch(users=-1)


def test_a_number_that_is_given_stays_one_per_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write_dataset(tmp_path / "data", walks(users=60, items=20), items=20)
    monkeypatch.setattr(building, "world_size", lambda: 4)
    config = config_of(tmp_path, tokens=60)
    chosen = choose_tokens(config, config.model, dataset, CPU)
    assert (chosen.rank, chosen.step) == (60, None)
    with pytest.raises(ValueError, match="--batch.tokens is 0; it must be at least 1"):
        TrainingBatch(tokens=0)
    with pytest.raises(InputError, match="--batch.tokens 60 is less than --model.max_len 61"):
        long = config_of(tmp_path, tokens=60, max_len=61)
        building.training_stream(long, long.model, dataset, 60, Execution("cpu"))
