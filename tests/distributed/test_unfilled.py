"""Making a sharded model draws nothing: torchrec's own initial values are left out, whatever the sharding."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from recgpt_torchrec.distributed.processes import silence_libraries
from tools.ranks import run_ranks
from tools.reshard import Layout, build_model


class Draws(TorchDispatchMode):
    """Counts the random numbers that tensors are filled with."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        kinds = (torch.ops.aten.uniform_, torch.ops.aten.normal_, torch.ops.aten.randn)
        if func.overloadpacket in kinds and made.device.type != "meta":
            self.numbers += made.numel()
        return made


def count_draws(rank: int, world_size: int) -> list[int]:
    """Numbers drawn for models with few and with many rows, under each sharding and kernel."""
    silence_libraries()
    counted = []
    for sharding in ("data_parallel", "table_wise", "column_wise", "row_wise"):
        for kind in ("rowwise_adagrad", "adam"):
            for rows in (13, 1013):
                with Draws() as draws:
                    build_model(Layout(world_size, sharding, kind), rows, rows, restored=True)
                counted.append(draws.numbers)
    return counted


@pytest.mark.parametrize("ranks", [1, 2])
def test_as_many_numbers_are_drawn_for_many_rows_as_for_few(ranks):
    for counted in run_ranks(count_draws, ranks):
        assert len(set(counted)) == 1 and counted[0] > 0  # those of the decoder
