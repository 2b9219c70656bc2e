"""What the pipelines have in common: how much an epoch reads, and the values of configuration files."""

from pathlib import Path

from pipelines.experiment import inputs_of
from pipelines.steps import ROOT
from recgpt_torchrec import cli, config
from recgpt_torchrec.config.command_line import values_of
from tests.support import write_dataset


def test_inputs_are_the_entries_that_training_reads(tmp_path: Path) -> None:
    histories = [[1, 9, 2, 9, 3, 9, 4, 9, 5], [1, 2, 3, 4]]
    segments = [[0, 2, 0, 2, 0, 2, 0, 2, 0], [0, 0, 0, 0]]
    dataset = write_dataset(tmp_path / "data", histories, items=10, segments=segments)
    # trained on: 1 9 2 9 3 (four of them are input; without prompts 1 and 2) and 1 2 (one is)
    assert inputs_of(dataset, "newest", 9, prompts=True) == 5
    assert inputs_of(dataset, "newest", 9, prompts=False) == 3
    assert inputs_of(dataset, "newest", 3, prompts=True) == 4
    assert inputs_of(dataset, "windows", 3, prompts=True) == 5


def test_a_configuration_may_name_another_whose_groups_it_replaces(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("model: {dim: 8, layers: 2}\ntrain: {epochs: 3}\nseed: 1\n")
    (tmp_path / "mine.yaml").write_text("config: base.yaml\nmodel: {layers: 3}\n")
    assert values_of(tmp_path / "mine.yaml") == {"model": {"layers": 3}, "train": {"epochs": 3}, "seed": 1}
    parsed = cli.parse(config.Pretrain, "x", ["--config", str(tmp_path / "mine.yaml"), "--data", "d", "--output", "o"])
    assert (parsed.model.dim, parsed.model.layers) == (config.Model().dim, 3)
    assert (parsed.train.epochs, parsed.seed) == (3, 1)


def test_tuning_on_feedback_has_the_batches_of_its_pre_training() -> None:
    values = values_of(ROOT / "configs/ml100k_tune.yaml")
    assert values["batch"] == values_of(ROOT / "configs/ml100k.yaml")["batch"]
