"""Shards a model that is on the meta device: sharding plan, DistributedModelParallel."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import CacheParams, ShardingPlan
from torchrec.modules.embedding_configs import DataType, data_type_to_dtype

from recgpt_torchrec.config import Sharding, Tables
from recgpt_torchrec.distributed.memory import check_tables_fit
from recgpt_torchrec.distributed.processes import local_world_size, run_on_first_rank
from recgpt_torchrec.distributed.replicas import group_nodes, group_size, place_in_own_group, sharding_environment
from recgpt_torchrec.distributed.sharding_types import (
    COLUMNS,
    COPY,
    GRID,
    NARROWEST,
    NODE_ROWS,
    PLANNER,
    ROWS,
    TABLE,
    WIDE,
    Choice,
    Ranks,
    Size,
    choose,
    why_not,
)
from recgpt_torchrec.distributed.unfilled import Unfilled
from recgpt_torchrec.errors import InputError

DENSE = "dense"
"""torchrec's kernel for copies, and for tables that are not updated in the backward."""
UNLIMITED = 2**46
"""Bytes of memory that hold any table."""
GRADIENT_SCALE = 1024.0
"""Factor of gradients sent as float16: those of a mean over 32,768 targets are below 1e-6, where it has few digits."""


KERNELS = {"fused": "fused", "uvm": "fused_uvm", "uvm_caching": "fused_uvm_caching"}
"""Values of --tables.kernel, and torchrec's names for them."""


class Sharder(EmbeddingBagCollectionSharder):
    """The EBC sharder, with every type on CPU too: torchrec offers those by rows on CUDA only; they work on gloo."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Sharding types that the planner may choose from."""
        offered = super().sharding_types(compute_device_type)
        return offered + [kind for kind in (ROWS, NODE_ROWS, GRID) if kind not in offered]


def make_plan(
    model: nn.Module,
    tables: Sharding,
    bags: int,
    *,
    world_size: int,
    local_world_size: int,
    device_type: str,
    hbm_bytes: int | None = None,
    fused: bool = True,
    trained: bool = True,
) -> ShardingPlan:
    """Plan the sharding of every table of `model`; needs neither a process group nor a device.

    Args:
        model: its tables may be on the meta device.
        tables, bags, fused, trained: as for `shard`.
        world_size: number of ranks.
        local_world_size: number of ranks per node.
        device_type: of the ranks, `cpu` or `cuda`.
        hbm_bytes: memory of each GPU; None: enough for any table.

    Raises:
        InputError: a table cannot be sharded as `tables` says.
    """
    configs = [
        config
        for module in model.modules()
        if isinstance(module, EmbeddingBagCollection)
        for config in module.embedding_bag_configs()
    ]
    sizes = {each.name: Size(each.num_embeddings, each.embedding_dim, _itemsize(each.data_type)) for each in configs}
    ranks = Ranks(world_size, local_world_size)
    choices = choose(tables, sizes, ranks, bags=bags if trained else None, fused=fused)
    topology = Topology(
        world_size=world_size,
        local_world_size=ranks.local_world_size,
        compute_device=device_type,
        hbm_cap=(hbm_bytes or UNLIMITED) if device_type == "cuda" else None,
        ddr_cap=UNLIMITED,
    )
    keys = max(len(config.feature_names) for config in configs)
    batch_size = -(-bags // keys)  # of each feature, for the planner's estimates

    def planned(beyond_device: bool) -> ShardingPlan:
        constraints = {
            name: _constraints(tables, name, choice, sizes[name], ranks, device_type, fused, beyond_device)
            for name, choice in choices.items()
        }
        planner = EmbeddingShardingPlanner(topology=topology, batch_size=batch_size, constraints=constraints)
        return planner.plan(model, [Sharder()])

    try:
        sharding_plan = planned(beyond_device=False)
    except PlannerError as error:
        if device_type != "cuda":
            raise
        try:
            sharding_plan = planned(beyond_device=True)
        except PlannerError:
            total = sum(size.bytes for size in sizes.values())
            raise InputError(
                f"the tables have {total / 2**30:,.1f} GiB of weights, which {world_size} GPUs of "
                f"{(hbm_bytes or UNLIMITED) / 2**30:,.1f} GiB cannot hold as the options of --tables say. "
                "Use more GPUs, auto for --tables.sharding and --tables.kernel, or a smaller --model.dim"
            ) from error
    if not fused:
        for module in sharding_plan.plan.values():
            for table in module.values():
                if table.compute_kernel == KERNELS["fused"]:
                    # Works with every sharding type, though torchrec's planner offers it for data-parallel only.
                    table.compute_kernel = DENSE
    return sharding_plan


def _constraints(
    tables: Sharding,
    name: str,
    choice: Choice,
    size: Size,
    ranks: Ranks,
    device_type: str,
    fused: bool,
    beyond_device: bool,
) -> ParameterConstraints:
    """What the planner may do with one table.

    Args:
        beyond_device: whether `auto` may put the rows into the host's memory.
    """
    kernel = tables.kernel_of(name)
    if kernel in ("uvm", "uvm_caching") and device_type != "cuda":
        raise InputError(f"--tables.kernel {kernel} of the {name} table needs CUDA; on {device_type} use fused")
    kernels = ["fused"] if kernel == "auto" else [kernel]
    if kernel == "auto" and beyond_device:
        kernels.append("uvm_caching")
    cached = device_type == "cuda" and (kernel == "uvm_caching" or (kernel == "auto" and beyond_device))
    compute_kernels: list[str] | None = [DENSE] if choice.kind == COPY else [KERNELS[each] for each in kernels]
    kinds, narrowest = [choice.kind], size.dim // choice.blocks
    if choice.kind == PLANNER:
        kinds = [kind for kind in (COPY, TABLE, COLUMNS, ROWS, NODE_ROWS, GRID) if _may_plan(kind, size, ranks, fused)]
        narrowest = min(size.dim, WIDE)
        compute_kernels = None if kernel == "auto" else [DENSE, KERNELS[kernel]]
    return ParameterConstraints(
        sharding_types=kinds,
        compute_kernels=compute_kernels,
        min_partition=narrowest,
        cache_params=CacheParams(load_factor=tables.cache_ratio) if cached else None,
    )


def _may_plan(kind: str, size: Size, ranks: Ranks, fused: bool) -> bool:
    """Whether the planner may choose a type; its blocks of columns need not be as many as ranks."""
    if kind == COLUMNS:
        return size.dim % NARROWEST == 0
    return why_not(kind, size, ranks, fused) is None


def _itemsize(data_type: DataType) -> int:
    return data_type_to_dtype(data_type).itemsize


def plan(
    model: nn.Module,
    tables: Sharding,
    bags: int,
    device: torch.device,
    fused: bool = True,
    trained: bool = True,
) -> ShardingPlan:
    """Plan the sharding of every table of `model` on rank 0, for all ranks (collective).

    Args:
        model, tables, bags, device, fused, trained: as for `shard`.

    Raises:
        InputError: a table cannot be sharded as `tables` says.
    """
    size, per_node = ranks_per_group(tables), local_world_size()
    hbm = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    made = run_on_first_rank(
        lambda: make_plan(
            model,
            tables,
            bags,
            world_size=size,
            local_world_size=group_nodes(size, per_node),
            device_type=device.type,
            hbm_bytes=hbm,
            fused=fused,
            trained=trained,
        )
    )
    if size < dist.get_world_size():
        place_in_own_group(made, size, device.type, per_node)
    return made


def ranks_per_group(tables: Sharding) -> int:
    """Number of ranks that share a copy of the tables.

    Raises:
        InputError: the ranks are not equal groups of that size.
    """
    return group_size(tables.shard_ranks if isinstance(tables, Tables) else 0, dist.get_world_size())


def shard(
    model: nn.Module,
    tables: Sharding,
    *,
    bags: int,
    device: torch.device,
    fused: bool,
    trained: bool = True,
    optimizer: str | None = None,
) -> DistributedModelParallel:
    """Shard the tables of a model, which nothing fills, and wrap the rest of it in DDP (collective).

    Args:
        model: tables on the meta device, the rest anywhere; optimizers that are to be fused are applied to it already.
        tables: how they are sharded.
        bags: number of bags of the largest table per rank and step.
        device: of this rank.
        fused: whether sharded tables are updated in the backward; False: by a separate optimizer, or not at all.
        trained: whether they are trained, which decides what `auto` copies.
        optimizer: of the tables, as in `--tables.optimizer`, whose moments need memory; None: they are not trained.

    Raises:
        InputError: a table cannot be sharded as `tables` says, or a rank has not enough memory for its part.
    """
    sharding_plan = plan(model, tables, bags, device, fused, trained)
    check_tables_fit(sharding_plan, model, optimizer, device)
    with Unfilled():
        return DistributedModelParallel(
            model,
            env=sharding_environment(ranks_per_group(tables), device.type, local_world_size()),
            device=device,
            plan=sharding_plan,
            sharders=[Sharder(qcomm_codecs_registry=_codecs(tables.communication, device))],
            init_parameters=True,
            # static_graph, DMP's default, would freeze the first step's graph; a rank may start with an empty batch.
            data_parallel_wrapper=DefaultDataParallelWrapper(static_graph=False),
        )


def _codecs(communication: str, device: torch.device) -> Any:
    """What encodes vectors and gradients on their way between ranks; None: nothing.

    Raises:
        InputError: the device cannot send them so.
    """
    if communication == "bf16" and device.type != "cuda":
        raise InputError("--tables.communication bf16 needs CUDA: gloo sends fp32 and fp16. Give fp16")
    precision = CommType[communication.upper()]
    scale = GRADIENT_SCALE if communication == "fp16" else None
    config = QCommsConfig(forward_precision=precision, backward_precision=precision, backward_loss_scale=scale)
    return get_qcomm_codecs_registry(config, device=device)
