"""The files of configs/ are options of a stage: every name is known and every value allowed."""

from pathlib import Path

import pytest

from recgpt_torchrec import cli
from recgpt_torchrec.config import GeneratePrompts, Pretrain, PromptTune
from recgpt_torchrec.model.flops import step_flops

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(path.name for path in CONFIGS.glob("*.yaml"))


def stage_of(name: str) -> type:
    if name.endswith("_tune.yaml"):
        return PromptTune
    return GeneratePrompts if name.endswith(("_prompts.yaml", "_answers.yaml", "_answers_several.yaml")) else Pretrain


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_read(name: str) -> None:
    words = ["--config", str(CONFIGS / name), "--data", "d", "--output", "o"]
    config = stage_of(name)
    cli.parse(config, "stage", words if config is Pretrain else [*words, "--checkpoint", "c"])


@pytest.mark.parametrize("name", ["gpu_small.yaml", "gpu_large.yaml"])
def test_the_presets_for_gpus_allow_varlen_attention(name: str) -> None:
    config = cli.parse(Pretrain, "stage", ["--config", str(CONFIGS / name), "--data", "d", "--output", "o"])
    assert config.model.attention_dropout == 0
    assert config.model.dim // config.model.heads % 8 == 0


def test_the_large_preset_has_the_operations_that_its_comment_says() -> None:
    config = cli.parse(Pretrain, "stage", ["--config", str(CONFIGS / "gpu_large.yaml"), "--data", "d", "--output", "o"])
    tokens, length = config.batch.tokens, config.model.max_len
    assert tokens != "auto"
    attended = tokens / length * length * (length + 1) / 2
    total = step_flops(
        config.model,
        config.loss,
        tokens=tokens,
        targets=tokens,
        candidates=config.loss.negatives,
        attended=attended,
    ).total
    assert total == pytest.approx(17e12, rel=0.02)
    assert total / (0.4 * 989e12) == pytest.approx(0.043, rel=0.02)
