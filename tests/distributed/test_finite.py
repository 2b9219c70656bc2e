"""One value that is not finite is enough, wherever it stands and on whichever rank: then no table gets a gradient."""

from typing import Any

import torch
from torch import Tensor, nn

from recgpt_torchrec.training.finite import DECODER, PARTS, FiniteGuard
from tests.distributed.launch import run_ranks

BAD = (float("nan"), float("inf"), float("-inf"))


class Decoder(nn.Module):
    """Rows [bags, dim] in, loss out; one value of the loss, of the rows' gradients or of its own is put in by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        self.part: str | None = None
        self.value = 0.0
        self.weight.register_hook(lambda gradient: self.spoilt(gradient, DECODER))

    def spoilt(self, tensor: Tensor, part: str) -> Tensor:
        if part == self.part:
            tensor = tensor.clone()
            tensor.view(-1)[-1] = self.value
        return tensor

    def forward(self, rows: Tensor) -> tuple[Tensor, None]:
        rows.register_hook(lambda gradient: self.spoilt(gradient, PARTS[1]))
        loss = (rows @ self.weight).sum()
        return loss + self.spoilt(torch.zeros(()), PARTS[0]), None


def guarded(rank: int, world_size: int) -> dict[Any, tuple[list[str], bool, list[list[float]]]]:
    """What the guard says, and the gradients that the rows get, where the last rank has something not finite."""
    decoder = Decoder()
    guard = FiniteGuard(decoder)
    seen = {}
    for part, value in [(None, 0.0), *((part, value) for part in PARTS for value in BAD), (None, 1.0)]:
        decoder.part, decoder.value = (part if rank == world_size - 1 else None), value
        decoder.weight.grad = None
        rows = torch.ones(2, 3, requires_grad=True)
        decoder(rows)[0].backward()
        assert rows.grad is not None
        seen[part, str(value)] = guard.here, guard.found, rows.grad.tolist()
    return seen


def test_one_value_that_is_not_finite_takes_the_gradients_of_all_ranks_from_the_tables():
    ranks = run_ranks(guarded, 2)
    assert len(ranks[0]) == 2 + len(PARTS) * len(BAD)
    for rank, seen in enumerate(ranks):
        for (part, value), (here, found, gradients) in seen.items():
            assert here == ([part] if part and rank == 1 else []), (rank, part, value)
            assert found == (part is not None), (rank, part, value)
            assert gradients == ([[0.0] * 3] * 2 if part else [[1.0, -2.0, 3.0]] * 2), (rank, part, value)
