"""Memory that a rank may still use, of its GPU or its share of the node's, and whether what it needs fits."""

import socket
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from recgpt_torchrec.distributed.processes import gather_objects, local_world_size, rank
from recgpt_torchrec.errors import InputError

if TYPE_CHECKING:  # its import takes 2.5 s, and without tables nobody needs it
    from torchrec.distributed.types import ParameterSharding, ShardingPlan

CGROUP = Path("/sys/fs/cgroup")
MOMENT_BYTES = 4
"""Moments are float32 whatever the table is."""


def available_bytes(device: torch.device) -> int:
    """Bytes that this rank can still allocate on `device`; on CPU an equal share for each process of the node."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return min(_of_machine(), _of_container()) // local_world_size()


@dataclass(frozen=True)
class Shortage:
    """Memory that does not suffice."""

    place: str
    """Where, in words."""
    needed: int
    """Bytes."""
    available: int
    """Bytes."""


def find_shortage(needed: int, device: torch.device) -> Shortage | None:
    """The first place where the ranks need more memory than is available; None: there is none (collective).

    Processes of a node share its memory, however much each of them needs.

    Args:
        needed: bytes that this rank is going to allocate.
        device: where, a GPU or the CPU.
    """
    totals: dict[str, Counter[str]] = {}
    place = f"rank {rank()}" if device.type == "cuda" else socket.gethostname()
    for where, amounts in gather_objects((place, {"needed": needed, "available": available_bytes(device)})):
        totals.setdefault(where, Counter()).update(amounts)
    for where, total in totals.items():
        if total["needed"] > total["available"]:
            return Shortage(where, total["needed"], total["available"])
    return None


def parts_of(sharding: "ParameterSharding", rows: int, dim: int) -> list[tuple[int, int, int]]:
    """The parts of a table [rows, dim] by its plan: the rank that holds each, its rows, its columns."""
    from torchrec.distributed.types import EnumerableShardingSpec

    spec = sharding.sharding_spec
    if isinstance(spec, EnumerableShardingSpec):
        return [(shard.placement.rank(), *shard.shard_sizes) for shard in spec.shards]
    return [(holder, rows, dim) for holder in sharding.ranks or []]


def table_bytes(plan: "ShardingPlan", model: nn.Module, optimizer: str | None) -> Counter[tuple[int, str]]:
    """Bytes that each rank needs for tables by a plan: weights, and in training moments and gradients of whole tables.

    Args:
        plan: of the model.
        model: not sharded yet; its tables may be on the meta device.
        optimizer: of the tables, as in `--tables.optimizer`; None: they are not trained.

    Returns:
        Bytes by (rank, where): `device`, or `host` for kernels that keep a table in unified memory.
    """
    from torchrec import EmbeddingBagCollection
    from torchrec.modules.embedding_configs import data_type_to_dtype

    configs = {
        config.name: config
        for module in model.modules()
        if isinstance(module, EmbeddingBagCollection)
        for config in module.embedding_bag_configs()
    }
    needed: Counter[tuple[int, str]] = Counter()
    for module_plan in plan.plan.values():
        for name, sharding in module_plan.items():
            config = configs[name]
            itemsize = data_type_to_dtype(config.data_type).itemsize
            for holder, rows, columns in parts_of(sharding, config.num_embeddings, config.embedding_dim):
                numbers = rows * columns
                gradients = numbers if optimizer is not None and sharding.compute_kernel == "dense" else 0
                where = "host" if "uvm" in sharding.compute_kernel else "device"
                needed[holder, where] += (numbers + gradients) * itemsize + moment_bytes(optimizer, rows, columns)
    return needed


def moment_bytes(optimizer: str | None, rows: int, columns: int) -> int:
    """Bytes of the moments that a table's optimizer keeps for a part of the table, [rows, columns]."""
    numbers = {"rowwise_adagrad": rows, "adagrad": rows * columns, "adam": 2 * rows * columns}
    return MOMENT_BYTES * numbers.get(optimizer or "", 0)


def check_tables_fit(plan: "ShardingPlan", model: nn.Module, optimizer: str | None, device: torch.device) -> None:
    """Check that every rank has the memory for its part of the tables, before they get any (collective).

    Args:
        plan, model, optimizer: as for `table_bytes`.
        device: of this rank.

    Raises:
        InputError: some rank has not.
    """
    needed = table_bytes(plan, model, optimizer)
    for where, memory in (("device", device), ("host", torch.device("cpu"))):
        if shortage := find_shortage(needed[rank(), where], memory):
            state = "" if optimizer is None else " and their optimizer state"
            raise InputError(
                f"the tables{state} need {shortage.needed:,} bytes of memory on {shortage.place}, where "
                f"{shortage.available:,} are available. Use more ranks, a smaller --model.dim, "
                "--tables.precision fp16, or another --tables.sharding (auto copies only small tables)"
            )


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
        cache = int(statistics.get("file", 0)) - int(statistics.get("shmem", 0))
        return 2**62 if limit == "max" else max(0, int(limit) - int(used) + cache)
    except (OSError, ValueError):
        return 2**62
