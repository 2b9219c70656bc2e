"""Options of every stage that computes with torch, or that runs on several ranks."""

from dataclasses import dataclass
from typing import Literal

from recgpt_torchrec.config.checks import at_least
from recgpt_torchrec.config.fields import changeable

Device = Literal["auto", "cpu", "cuda"]


@dataclass(kw_only=True)
class Computing:
    """Where a stage computes."""

    device: Device = changeable("auto")
    """Device to compute on. auto: CUDA where torch sees a GPU, else the CPU. On CUDA each process of a node needs a GPU
    of its own."""


@dataclass(kw_only=True)
class Watched:
    """When a stage on several ranks ends itself; where a stage trains, `--train.stall_seconds` says so."""

    stall_seconds: float = changeable(600.0)
    """Seconds without progress on any rank, or without a sign of one of them, after which a rank reports where each
    rank is and ends the stage; 0: never."""

    def __post_init__(self) -> None:
        at_least("--stall_seconds", self.stall_seconds, 0)
