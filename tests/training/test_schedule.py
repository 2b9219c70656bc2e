"""Learning-rate schedule: warm-up by steps, at most a tenth of the run, then a cosine."""

import math

import pytest

from recgpt_torchrec.config import Optimizer
from recgpt_torchrec.training.schedule import learning_rate_share


@pytest.mark.parametrize("total", [1, 40, 400, 1000, 5000])
def test_warm_up_takes_its_steps_or_a_tenth_of_the_run(total: int) -> None:
    config = Optimizer(warmup_steps=100, final_lr=0.0)
    warm = min(100, total / 10)
    for step in range(total):
        peak = 0.5 * (1 + math.cos(math.pi * step / total))
        share = learning_rate_share(config, step, step / total)
        if step >= warm:
            assert share == pytest.approx(peak)
        else:
            assert peak * step / warm - 1e-9 <= share <= peak * (step + 1) / warm + 1e-9


def test_ends_at_the_final_share_and_needs_no_warm_up() -> None:
    assert learning_rate_share(Optimizer(warmup_steps=0, final_lr=0.2), 0, 0.0) == 1.0
    assert learning_rate_share(Optimizer(warmup_steps=0, final_lr=0.2), 10, 1.0) == pytest.approx(0.2)
    assert learning_rate_share(Optimizer(warmup_steps=0, final_lr=0.2), 10, 1.5) == pytest.approx(0.2)
