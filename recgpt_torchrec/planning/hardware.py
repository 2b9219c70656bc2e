"""What a rank runs on: memory, peak of matrix products, bandwidth of memory and links.

Peaks are those of `model.peaks`. Rates of links are per GPU and direction. What a transfer or a pass over memory
reaches of a rated bandwidth is assumed (`MEMORY_SHARE`, `LINK_SHARE`), and printed with every estimate.
"""

import time
from dataclasses import dataclass, replace

import torch

from recgpt_torchrec.config.reports.plan import Plan
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.model.peaks import Precision, measured_peak, rated_peak

GIB = 2**30
MEMORY_SHARE = 0.7
"""Share of the rated memory bandwidth that gathers of rows and elementwise passes reach."""
LINK_SHARE = 0.7
"""Share of the rated bandwidth of a link that all-to-all exchanges reach."""
CPU_LINK = 1.5
"""GB/s between two CPU ranks of a node, by gloo over the loopback."""
COPY_BYTES = 2**27
"""Size of the tensor that is copied to measure a CPU's memory bandwidth."""


@dataclass(frozen=True)
class Rating:
    """A kind of GPU as its maker rates it."""

    name: str
    """As `model.peaks` knows it."""
    hbm: float
    """GiB."""
    bandwidth: float
    """GB/s of its memory."""
    nvlink: float
    """GB/s to the other GPUs of the node, per direction."""


RATINGS = {
    "h100": Rating("H100", 80, 3350, 450),
    "h200": Rating("H200", 141, 4800, 450),
    "b200": Rating("B200", 180, 8000, 900),
    "a100": Rating("A100", 80, 2039, 300),
    "l4": Rating("L4", 24, 300, 32),  # PCIe 4.0 x16
}


@dataclass(frozen=True)
class Hardware:
    """A rank's device and its links."""

    kind: str
    """`cpu`, or a name of `RATINGS`."""
    precision: Precision
    """Of matrix products in training."""
    hbm: float
    """GiB of the device; on CPU the rank's share of the node's memory."""
    host: float
    """GiB of host memory of the rank's node."""
    peak: float
    """FLOP/s of matrix products in the precision."""
    efficiency: float
    """Share of the peak that is assumed."""
    bandwidth: float
    """B/s of the device's memory, as rated or measured."""
    within: float
    """B/s to ranks of the same node."""
    between: float
    """B/s to ranks of other nodes."""

    @property
    def device_type(self) -> str:
        """`cpu` or `cuda`."""
        return "cpu" if self.kind == "cpu" else "cuda"

    @property
    def memory_rate(self) -> float:
        """B/s assumed for gathers and elementwise passes."""
        return self.bandwidth * (MEMORY_SHARE if self.kind != "cpu" else 1.0)  # of a CPU it is measured

    @property
    def flop_rate(self) -> float:
        """FLOP/s assumed for matrix products."""
        return self.peak * self.efficiency

    def __str__(self) -> str:
        """One line for the report."""
        memory = f"{self.hbm:,.0f} GiB" if self.kind != "cpu" else f"{self.host:,.0f} GiB per node"
        return (
            f"{self.kind} {memory}, {self.precision} {self.peak / 1e12:,.3g} TFLOP/s x {self.efficiency:.0%}, memory "
            f"{self.bandwidth / 1e9:,.4g} GB/s x {self.memory_rate / self.bandwidth:.0%}, links "
            f"{self.within / 1e9:,.3g} GB/s within a node and {self.between / 1e9:,.3g} between x {LINK_SHARE:.0%}"
        )


def hardware_of(plan: Plan) -> Hardware:
    """The hardware that the options describe; with `--gpu cpu`, what is not given is measured here (under a second).

    Raises:
        InputError: the kind of GPU has no units for the precision.
    """
    rating = RATINGS.get(plan.gpu)
    precision = precision_of(plan)
    peak = None if plan.peak is None else plan.peak * 1e12
    if rating is None:
        bandwidth = measured_bandwidth() if plan.hbm_bandwidth is None else plan.hbm_bandwidth * 1e9
        peak = peak or measured_peak(torch.device("cpu"), precision, size=512, seconds=0.1)
        hbm, within = plan.memory / plan.gpus, CPU_LINK
    else:
        peak = peak or rated_peak(rating.name, precision)
        bandwidth = (plan.hbm_bandwidth or rating.bandwidth) * 1e9
        hbm, within = plan.hbm or rating.hbm, rating.nvlink
    if peak is None:
        raise InputError(f"--gpu {plan.gpu} has no units for {precision}; give another --train.precision, or --peak")
    return Hardware(
        kind=plan.gpu,
        precision=precision,
        hbm=hbm,
        host=plan.memory,
        peak=peak,
        efficiency=plan.efficiency,
        bandwidth=bandwidth,
        within=(plan.nvlink or within) * 1e9,
        between=plan.interconnect * 1e9,
    )


def of_cluster(hardware: Hardware, ranks_per_node: int) -> Hardware:
    """The same hardware with another number of ranks per node, which share a node's memory on CPU."""
    return replace(hardware, hbm=hardware.host / ranks_per_node) if hardware.device_type == "cpu" else hardware


def precision_of(plan: Plan) -> Precision:
    """The precision of matrix products in training: the option's, or what `auto` is likely to choose."""
    if plan.train.precision != "auto":
        return plan.train.precision
    return "fp32" if plan.gpu == "cpu" else "bf16"


def measured_bandwidth() -> float:
    """B/s of this machine's memory, read and written by one thread that copies 128 MiB; the fastest of five."""
    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)
    fastest = float("inf")
    for _ in range(5):
        since = time.perf_counter()
        target.copy_(source)
        fastest = min(fastest, time.perf_counter() - since)
    return 2 * COPY_BYTES / fastest
