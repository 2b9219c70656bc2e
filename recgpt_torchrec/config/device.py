"""The option of every stage that computes with torch."""

from dataclasses import dataclass
from typing import Literal

from recgpt_torchrec.config.fields import changeable

Device = Literal["auto", "cpu", "cuda"]


@dataclass(kw_only=True)
class Computing:
    """Where a stage computes."""

    device: Device = changeable("auto")
    """Device to compute on. auto: CUDA where torch sees a GPU, else the CPU. On CUDA each process of a node needs a GPU
    of its own."""
