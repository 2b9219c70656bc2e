"""Initial values are drawn for a new run only: checkpoints fill the tables of all others."""

import shutil

import pytest
import torch

from recgpt_torchrec.checkpoints.folder import Checkpoints
from recgpt_torchrec.distributed import initial_values
from tests.support import SMALL, read_epochs, stage, walks, write_dataset


@pytest.fixture
def drawn(monkeypatch) -> list[int]:
    """Row blocks drawn."""
    blocks, draw = [], initial_values._draw

    def counted(values, key, row_block, column_block, std):
        blocks.append(row_block)
        draw(values, key, row_block, column_block, std)

    monkeypatch.setattr(initial_values, "_draw", counted)
    monkeypatch.setattr(initial_values, "BLOCK_ROWS", 4)
    return blocks


def test_a_run_that_resumes_and_prompt_tuning_draw_nothing(tmp_path, drawn):
    write_dataset(tmp_path / "data", walks(40, 30), items=30)
    output = tmp_path / "run"
    options = {**SMALL, "--data": tmp_path / "data", "--output": output, "--saving.every_steps": 1}
    assert stage("pretrain", options) == 0
    assert sorted(set(drawn)) == list(range(8))
    uninterrupted = read_epochs(output)

    drawn.clear()
    latest = Checkpoints(str(output), 2).latest()
    assert latest is not None
    shutil.rmtree(latest)
    assert stage("pretrain", options) == 0
    assert not drawn
    assert read_epochs(output)[-1]["loss"] == pytest.approx(uninterrupted[-1]["loss"])

    tune = {"--data": tmp_path / "data", "--checkpoint": output, "--output": tmp_path / "tuned"}
    torch.manual_seed(0)
    assert stage("prompt_tune", {**tune, "--tuning.prompts": "false", "--train.epochs": 1}) == 0
    assert not drawn
