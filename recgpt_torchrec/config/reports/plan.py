"""Options of the program plan: those of pretrain, the catalogue's sizes, and the cluster."""

from dataclasses import dataclass
from typing import Literal

from recgpt_torchrec.config.checks import at_least, within
from recgpt_torchrec.config.training import Pretrain

MOST_NODES = 64
"""Largest number of nodes that is searched for the smallest cluster that fits."""


@dataclass(kw_only=True)
class Plan(Pretrain):
    """Estimate sharding, memory, traffic and time of a pretrain run, on the meta device: without GPUs, in seconds.

    Example: recgpt plan --items 1e8 --users 1e9 --nodes 8 --gpus 8 --gpu h100
    """

    data: str | None = None  # type: ignore[assignment]
    """Folder of a dataset, as written by prepare, whose items, users, interactions and mean history are taken where
    they are not given; null: --items and --users must be given."""
    output: str | None = None  # type: ignore[assignment]
    """Not used: an option of pretrain, whose files of options are read here too."""
    items: int | None = None
    """Number of items."""
    users: int | None = None
    """Number of users."""
    interactions: int | None = None
    """Number of interactions of an epoch, for its time; null: that of the dataset, or no epoch is estimated."""
    history: float | None = None
    """Mean number of tokens per sequence, which decides how many users a batch looks up; null: that of the dataset,
    interactions per user, or half of model.max_len."""
    nodes: int = 1
    """Number of nodes."""
    gpus: int = 8
    """Number of GPUs per node, each with a rank of its own; with --gpu cpu the number of ranks per node."""
    gpu: Literal["h100", "h200", "b200", "a100", "l4", "cpu"] = "h100"
    """Kind of GPU, which sets what is null among hbm, hbm_bandwidth, nvlink and peak. cpu: ranks on the CPU; peak and
    bandwidth are measured on this machine."""
    hbm: float | None = None
    """Memory of each GPU, in GiB; null: by the kind. Not used with --gpu cpu."""
    memory: float = 1000.0
    """Host memory of each node, in GiB."""
    interconnect: float = 50.0
    """Bandwidth between nodes per GPU and direction, in GB/s; 50 is a 400 Gbit/s adapter per GPU."""
    nvlink: float | None = None
    """Bandwidth between GPUs of a node, per GPU and direction, in GB/s; null: by the kind."""
    hbm_bandwidth: float | None = None
    """Bandwidth of a GPU's memory, in GB/s; null: by the kind."""
    peak: float | None = None
    """Peak of matrix products in the run's precision, in TFLOP/s; null: by the kind."""
    efficiency: float = 0.4
    """Share of the peak that matrix products are assumed to reach."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("items", "users", "interactions", "history", "hbm", "nvlink", "hbm_bandwidth", "peak"):
            value = getattr(self, name)
            if value is None and name in ("items", "users") and self.data is None:
                raise ValueError(f"--{name} must be given, or --data DIR to take it from a dataset")
            if value is not None:
                at_least(f"--{name}", value, 1 if name in ("items", "users", "interactions", "history") else 1e-6)
        for name in ("items", "users"):
            if (getattr(self, name) or 0) > 2**40:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at most 2^40")
        within("--nodes", self.nodes, 1, 4096)
        within("--gpus", self.gpus, 1, 64)
        within("--efficiency", self.efficiency, 0.001, 1)
        for name in ("memory", "interconnect"):
            at_least(f"--{name}", getattr(self, name), 1e-6)
        if self.device != "auto" and (self.device == "cpu") != (self.gpu == "cpu"):
            raise ValueError(f"--device {self.device} contradicts --gpu {self.gpu}; leave --device out")

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.nodes * self.gpus
