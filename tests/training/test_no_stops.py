"""A steady training step asks the device for nothing: every operation that would wait for it is counted.

Without a GPU the host's tensors are the device's, so what is counted is told apart by who asks: torchrec's exchange of
splits, and the host's own numbers in `data` and `lockstep`, which are never on a device.
"""

import sys
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from recgpt_torchrec import pretrain
from recgpt_torchrec.catalogue.softmax import SharedSoftmax
from recgpt_torchrec.config import Loss, Model, Pretrain, Tables, Train, TrainingBatch
from recgpt_torchrec.data.candidates import Candidates
from recgpt_torchrec.data.histories import join
from recgpt_torchrec.data.packed import Capacity, pack_histories
from recgpt_torchrec.distributed.processes import process_group
from recgpt_torchrec.model import waiting
from recgpt_torchrec.model.dense import Dense
from recgpt_torchrec.model.losses import shared_loss
from recgpt_torchrec.training.meter import LOG_EVERY
from recgpt_torchrec.training.schedule import Schedule
from tests.model.test_no_leaks import INPUTS, ITEMS, LONGEST, USERS, draw
from tests.support import walks, write_dataset

WAITING_OPERATIONS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::equal", "aten::is_nonzero", "aten::repeat_interleave.Tensor", "aten::lift_fresh",
}  # fmt: skip
"""Operations that read a value of the device to go on: the size of their result, or a number for Python. `lift_fresh`:
a tensor is made of numbers of Python, and would be copied from memory that is not pinned."""
WAITING_METHODS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
ON_HOST = ("recgpt_torchrec/data/", "recgpt_torchrec/distributed/lockstep.py")
FIRST, LAST = LOG_EVERY + 2, LOG_EVERY + 12
"""Steps that are watched: after the first ones, and none in which a loss is logged."""


class Waits(TorchDispatchMode):
    """Counts what would wait for the device, by the place in this project or torchrec that asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()
        self.operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        if function._schema.name in WAITING_OPERATIONS or f"{function}".replace(".", "::", 1) in WAITING_OPERATIONS:
            self.ask(str(function))
        return function(*args, **(kwargs or {}))

    def ask(self, what: str) -> None:
        """Count a question by the innermost frame of this project or of torchrec."""
        for frame in reversed(traceback.extract_stack(sys._getframe(2))):
            name = frame.filename
            if "/fbgemm_gpu/" in name:  # kernels for CPU
                return
            if "/torchrec/" in name or "/recgpt_torchrec/" in name:
                place = name[max(name.rfind("/torchrec/"), name.rfind("/recgpt_torchrec/")) + 1 :]
                if not place.startswith(ON_HOST):
                    self.asked[f"{what} in {place}:{frame.lineno}"] += 1
                return
        self.asked[f"{what} elsewhere"] += 1


def watch_steps(monkeypatch: pytest.MonkeyPatch) -> Waits:
    """Count what steps `FIRST` to `LAST` of the next run ask for, with everything kept on the device as on CUDA."""
    waits, set_rates = Waits(), Schedule.set_rates
    for name in WAITING_METHODS:
        plain = getattr(torch.Tensor, name)

        def asked(self: torch.Tensor, *args: Any, name: str = name, plain: Any = plain) -> Any:
            if watching:
                waits.ask(name)
            return plain(self, *args)

        monkeypatch.setattr(torch.Tensor, name, asked)
    watching: list[bool] = []

    def watched(self: Schedule, steps: int, progress: float) -> float:
        if steps == FIRST:
            waits.__enter__()
            watching.append(True)
        if steps == LAST and watching:
            watching.clear()
            waits.__exit__(None, None, None)
        return set_rates(self, steps, progress)

    monkeypatch.setattr(Schedule, "set_rates", watched)
    monkeypatch.setattr(waiting, "WITHOUT_WAITING", ())
    return waits


@pytest.mark.parametrize("candidates", ["all", "sampled"])
def test_a_steady_step_waits_for_nothing_but_torchrecs_splits(
    tmp_path: Path, monkeypatch: Any, candidates: Any
) -> None:
    write_dataset(tmp_path / "data", walks(400, 30, longest=14), items=30)
    waits = watch_steps(monkeypatch)
    pretrain.main(
        Pretrain(
            data=str(tmp_path / "data"),
            output=str(tmp_path / "run"),
            model=Model(dim=8, max_len=10, layers=2),
            loss=Loss(candidates=candidates, negatives=10),
            batch=TrainingBatch(tokens=64),
            tables=Tables(sharding="row_wise"),
            train=Train(epochs=1),
        )
    )
    assert waits.operations > 100 * (LAST - FIRST), "the steps were not watched"
    ours = {place: count for place, count in waits.asked.items() if " in torchrec/" not in place}
    assert not ours
    per_step = sum(waits.asked.values()) / (LAST - FIRST)
    # Per collection: the lengths of row-wise buckets, the splits of lengths and of values, what arrives of both.
    assert 0 < per_step <= 10, waits.asked


@pytest.mark.parametrize("held", [2**24, 0])
def test_the_loss_over_the_candidates_of_all_ranks_waits_for_nothing(monkeypatch: Any, held: int) -> None:
    monkeypatch.setattr(waiting, "WITHOUT_WAITING", ())
    monkeypatch.setattr(shared_loss, "LOGITS", {"cpu": held})
    h, positive, candidates = (torch.randn(rows, 8, requires_grad=True) for rows in (5, 5, 9))
    batch: Any = SimpleNamespace(
        target_item=torch.tensor([3, 1, 8, 8, 2]),
        candidate_item=torch.arange(9),
        candidate_log_q=torch.zeros(9),
        most_targets=7,
        target_weight=None,
    )
    waits = Waits()
    with process_group():
        softmax = SharedSoftmax(each_once=True)
        with waits:
            softmax(h, positive, candidates, batch, torch.float32).backward()
    assert waits.operations > 30 and not waits.asked and candidates.grad is not None


def test_a_step_with_all_inputs_waits_for_nothing(monkeypatch: Any) -> None:
    """Features, attributes with dropout of ids, and feedback that enters apart."""
    monkeypatch.setattr(waiting, "WITHOUT_WAITING", ())
    rng = np.random.default_rng(0)
    histories = join([draw(rng, user) for user in range(3)])
    histories = replace(histories, weights=rng.random(histories.items.size).astype(np.float32))
    batch, _ = pack_histories(
        histories,
        row_length=LONGEST,
        capacity=Capacity(USERS, ITEMS),
        predict=True,
        draw=lambda _: Candidates(np.arange(9), np.zeros(9, np.float32)),
        inputs=INPUTS,
    )
    model = Model(dim=8, heads=2, layers=1, max_len=LONGEST)
    dense = Dense(model, Loss(candidates="sampled"), segments=True, inputs=replace(INPUTS, id_dropout=0.5)).train()
    users, items, of_users, of_items = (torch.randn(n, 8, requires_grad=True) for n in (USERS, ITEMS, USERS, ITEMS))
    waits = Waits()
    with waits:
        dense(users, items, items, batch, of_users, of_items)[0].backward()
    assert waits.operations > 300 and not waits.asked
    assert dense.decoder.refused is not None and dense.decoder.refused.at_input.grad is not None
