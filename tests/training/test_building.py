"""What is checked before a model is trained: memory for the candidates."""

import socket

import pytest
import torch

from recgpt_torchrec.config import Loss
from recgpt_torchrec.data.packed import Capacity
from recgpt_torchrec.distributed import memory
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.training import building

CPU = torch.device("cpu")


def test_a_catalogue_that_memory_does_not_hold_is_refused_with_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    capacity = Capacity(users=100, items=1000, item_keys=10)
    needed = 1000 * 16 * 4 * 2
    monkeypatch.setattr(memory, "available_bytes", lambda device: needed)
    building.check_memory(Loss(candidates="all"), capacity, 16, CPU)
    monkeypatch.setattr(memory, "available_bytes", lambda device: needed - 1)
    building.check_memory(Loss(candidates="sampled"), capacity, 16, CPU)
    with pytest.raises(InputError) as error:
        building.check_memory(Loss(candidates="all"), capacity, 16, CPU)
    assert str(error.value) == (
        "--loss.candidates all looks up 1,000 items on each rank, whose vectors and gradients take at least 128,000 "
        f"bytes on {socket.gethostname()}, where 127,999 are available; give --loss.candidates sampled, or more ranks"
    )
