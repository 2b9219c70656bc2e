"""The loss of prompt-tuning (paper, equation 5), worked by hand."""

import math

import numpy as np
import pytest
import torch

from recgpt_torchrec.config import Loss, Model
from recgpt_torchrec.data.batch import make_batch
from recgpt_torchrec.data.candidates import AllItems
from recgpt_torchrec.data.histories import Histories
from recgpt_torchrec.data.packed import Capacity
from recgpt_torchrec.data.targets import SoftShares
from recgpt_torchrec.model.dense import Dense


@pytest.mark.parametrize(
    ("predict_from", "soft_targets", "by_hand"),
    [
        # Entry 0 hears a, (1, 0): logits a 2, b 0, and b came next. Entry 2 hears a b b, (1/3, 2/3): a 2/3, b 2/3.
        ("interacted", 0.0, (math.log(1 + math.exp(2)) + math.log(2)) / 2),
        # Entry 1 hears a b, (1/2, 1/2): a 1, b 1/2, and b came next. Entry 3 hears a b b a, the same, and a came next.
        (
            "last",
            0.0,
            (math.log(1 + math.exp(0.5)) + math.log(1 + math.exp(-0.5))) / 2,
        ),
        (
            "every",
            0.0,
            sum(math.log(1 + math.exp(x)) for x in (2, 0.5, 0, -0.5)) / 4,
        ),
        # Half of b's weight after entry 0 goes to the answer there, a; the answer after entry 2 is the target itself.
        ("interacted", 0.5, (math.log(1 + math.exp(2)) - 0.5 * 2 + math.log(2)) / 2),
    ],
)
def test_equation_5_on_a_catalogue_of_two_items(predict_from, soft_targets, by_hand):
    """A decoder that only averages what it hears, on the history a b a with the prompts b and a.

    Items a = (1, 0) and b = (0, 1) are heard; W_l scores by a = (2, 0) and b = (0, 1).
    """
    a, b, none = 0, 1, -1
    histories = Histories(
        users=np.array([0]),
        items=np.array([a, b, b, a, a]),
        offsets=np.array([0, 5]),
        segments=np.array([0, 1, 0, 1, 0], dtype=np.int8),
        answers=np.array([[a], [none], [a], [none], [none]]),
        answer_scores=np.zeros((5, 1), dtype=np.float32),
    )
    batch = make_batch(
        histories,
        row_length=8,
        capacity=Capacity(users=1, items=2),
        predict=True,
        predict_from=predict_from,
        soft_shares=SoftShares(soft_targets),
        draw=lambda targets: AllItems(2).draw(targets, np.random.default_rng(0)),
    )
    dense = Dense(Model(dim=2, heads=1, layers=1, history_in=False), Loss(candidates="all"), segments=True).eval()
    for parameter in dense.parameters():
        torch.nn.init.zeros_(parameter)  # norms of weight 0 silence the block; forgetting 0: equal weights
    torch.nn.init.ones_(dense.decoder.mean_out)
    heard, w_l = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    loss, _ = dense(torch.zeros(1, 2), heard, w_l, batch)
    assert float(loss) == pytest.approx(by_hand, rel=1e-6)
