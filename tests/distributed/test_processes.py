"""What a process sets up before it computes."""

import os
import subprocess
import sys

import pytest

MULTIPLY = """
import torch
from recgpt_torchrec.distributed.processes import process_group

def held():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

with process_group():
    torch.set_num_threads(1)
    weight = torch.randn(64, 64, dtype=torch.bfloat16)
    sizes = []
    for rows in range(900, 2400):
        torch.randn(rows, 64, dtype=torch.bfloat16) @ weight
        if rows in (1649, 2399):
            sizes.append(held())
print(sizes[1] - sizes[0])
"""
"""Products of 1,500 shapes; by how many MiB the process grows in the second half of them."""
CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def grown(**environment: str) -> float:
    own = {name: value for name, value in os.environ.items() if name not in CAPACITIES}
    command = [sys.executable, "-c", MULTIPLY]
    return float(subprocess.run(command, env=own | environment, capture_output=True, text=True, check=True).stdout)


def test_batches_of_ever_other_shapes_do_not_fill_the_memory_with_kernels() -> None:
    without = grown(**dict.fromkeys(CAPACITIES, "4096"))  # what the environment says comes first
    if without < 100:
        pytest.skip(f"this CPU keeps small kernels: {without:.0f} MiB for 750 shapes")
    assert grown() < without / 4
