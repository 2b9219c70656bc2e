"""Memory that a rank may still use: of its GPU, or its share of the node's."""

import os
from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int:
    """Bytes that this rank can still allocate on `device`; on CPU an equal share for each process of the node."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(_of_machine(), _of_container()) // processes


def _of_machine() -> int:
    """Bytes that Linux can give without swapping; elsewhere no limit is known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 2**62
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 2**62)


def _of_container() -> int:
    """Bytes that the container's limit leaves, if it has one; its page cache can be dropped."""
    try:
        limit, used = ((CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        statistics = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return 2**62 if limit == "max" else max(0, int(limit) - int(used) + int(statistics.get("file", 0)))
    except (OSError, ValueError):
        return 2**62
