"""Peaks of matrix products: what a GPU's maker rates it at, and what this machine reaches. Needs torch alone."""

import time
from typing import Literal

import torch

Precision = Literal["fp32", "tf32", "bf16"]

PARTS = 25
"""Parts of a measurement, so many that each is shorter than the turn of another process on the core. On a shared core
bf16 was 1.2 to 4.4 times as fast as float32 in 25 measurements of five parts, and 2.2 to 2.3 times with 25."""
RATED: dict[str, dict[Precision, float]] = {
    "B200": {"bf16": 2250, "tf32": 1125, "fp32": 75},
    "GH200": {"bf16": 989, "tf32": 494, "fp32": 67},
    "H200": {"bf16": 989, "tf32": 494, "fp32": 67},
    "H100 PCIe": {"bf16": 756, "tf32": 378, "fp32": 51},
    "H100 NVL": {"bf16": 835, "tf32": 417, "fp32": 60},
    "H100": {"bf16": 989, "tf32": 494, "fp32": 67},
    "H800": {"bf16": 989, "tf32": 494, "fp32": 67},
    "A100": {"bf16": 312, "tf32": 156, "fp32": 19.5},
    "A800": {"bf16": 312, "tf32": 156, "fp32": 19.5},
    "L40S": {"bf16": 362, "tf32": 183, "fp32": 91.6},
    "L40": {"bf16": 181, "tf32": 90.5, "fp32": 90.5},
    "L4": {"bf16": 121, "tf32": 60, "fp32": 30.3},
    "A40": {"bf16": 149.7, "tf32": 74.8, "fp32": 37.4},
    "A10G": {"bf16": 70, "tf32": 35, "fp32": 31.5},
    "A10": {"bf16": 125, "tf32": 62.5, "fp32": 31.2},
    "A6000": {"bf16": 154.8, "tf32": 77.4, "fp32": 38.7},
    "RTX 4090": {"bf16": 165.2, "tf32": 82.6, "fp32": 82.6},
    "RTX 3090": {"bf16": 71, "tf32": 35.6, "fp32": 35.6},
    "V100": {"fp32": 15.7},
    "T4": {"fp32": 8.1},
}
"""TFLOP/s of dense matrix products (no sparsity, sums in float32), by part of the device's name; the first that is
found in it counts."""


def rated_peak(device_name: str, precision: Precision) -> float | None:
    """Operations per second that the maker rates a device at; None: the device is unknown, or has no such unit.

    Example: `rated_peak("NVIDIA H100 80GB HBM3", "bf16")` is 989e12.
    """
    words = f" {device_name.replace('-', ' ')} "
    for name, rates in RATED.items():
        if f" {name} " in words:
            return rates[precision] * 1e12 if precision in rates else None
    return None


def measured_peak(
    device: torch.device, precision: Precision, *, size: int | None = None, seconds: float = 0.3
) -> float:
    """Operations per second of square matrix products here, with as many threads as torch uses now.

    Args:
        device: to measure.
        precision: of the factors; sums are in float32.
        size: rows and columns of the factors; None: 8192 on CUDA, 1024 on CPU.
        seconds: to go on for; the fastest of `PARTS` counts, because others may use the machine as well.
    """
    size = size or (8192 if device.type == "cuda" else 1024)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:

        def run(count: int) -> float:
            since = time.perf_counter()
            for _ in range(count):
                torch.mm(a, b, out=out)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return time.perf_counter() - since

        run(1)
        count = max(1, int(seconds / PARTS / max(run(1), 1e-9)))
        fastest = min(run(count) for _ in range(PARTS))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return 2.0 * size**3 * count / fastest
