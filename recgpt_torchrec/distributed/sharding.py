"""From a model on the meta device to a distributed one: sharding plan, DistributedModelParallel, and its optimizers."""

import os
from collections.abc import Callable, Set
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import EmbeddingBagCollection
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.types import ShardedTensor, ShardingEnv, ShardingPlan, ShardingType
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from recgpt_torchrec.config import Optimizer, Tables
from recgpt_torchrec.errors import InputError

DENSE = "dense"
"""Stands for everything that is not a table."""
INIT_BLOCK = 4096
"""Rows drawn from one random stream when a table is initialised."""

EPS = 1e-8
FUSED: dict[str, tuple[Any, dict[str, Any]]] = {
    "rowwise_adagrad": (RowWiseAdagrad, {"eps": EPS}),
    "adagrad": (torch.optim.Adagrad, {"eps": EPS}),
    "sgd": (torch.optim.SGD, {}),
}
"""Table optimizers that fbgemm fuses into the backward on CPU and CUDA alike; Adam it fuses on CUDA only."""


def fuses(optimizer: str, device: torch.device) -> bool:
    """Whether fbgemm updates sharded tables in the backward; else torch's optimizer steps every row of each shard."""
    return optimizer in FUSED or device.type == "cuda"


class Sharder(EmbeddingBagCollectionSharder):
    """The EBC sharder, with row-wise sharding on CPU too (torchrec offers it on CUDA only; on gloo it works as
    well)."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Sharding types to plan with."""
        offered = super().sharding_types(compute_device_type)
        return offered if ShardingType.ROW_WISE.value in offered else [*offered, ShardingType.ROW_WISE.value]


def sharding_type(tables: Tables, rows: int, dim: int, world_size: int) -> str:
    """The sharding type of one table.

    auto: a copy on every rank while the table is small, a block of columns on each beyond that (the traffic of
    column-wise one-id bags does not grow with the number of ranks, that of row-wise does), whole tables where columns
    do not divide.
    """
    if tables.sharding != "auto":
        return tables.sharding
    if rows * dim * 4 <= tables.data_parallel_mb * 2**20:
        return ShardingType.DATA_PARALLEL.value
    return (ShardingType.COLUMN_WISE if dim % world_size == 0 else ShardingType.ROW_WISE).value


def plan(model: nn.Module, tables: Tables, batch_size: int, device: torch.device) -> ShardingPlan:
    """A sharding plan for every table of `model`, the same on all ranks (rank 0's planner decides).

    Raises:
        InputError: the tables cannot be sharded that way.
    """
    world_size = dist.get_world_size()
    constraints = {}
    for module in model.modules():
        if isinstance(module, EmbeddingBagCollection):
            for config in module.embedding_bag_configs():
                rows, dim = config.num_embeddings, config.embedding_dim
                chosen = sharding_type(tables, rows, dim, world_size)
                if chosen == ShardingType.ROW_WISE.value and rows < world_size:
                    raise InputError(
                        f"the {config.name} table has {rows} rows, fewer than the {world_size} ranks: "
                        "it cannot be sharded row-wise; use --tables.sharding data_parallel, or fewer ranks"
                    )
                if chosen == ShardingType.COLUMN_WISE.value and (dim % world_size or dim // world_size % 4):
                    raise InputError(
                        f"the {config.name} table's {dim} columns do not make {world_size} equal blocks of a multiple "
                        "of 4: use another --model.dim, number of ranks, or --tables.sharding"
                    )
                copied = chosen == ShardingType.DATA_PARALLEL.value
                constraints[config.name] = ParameterConstraints(
                    sharding_types=[chosen],
                    compute_kernels=["dense" if copied else "fused"],
                    min_partition=max(4, dim // world_size),
                )
    topology = Topology(
        world_size=world_size,
        local_world_size=_local_world_size(world_size),
        compute_device=device.type,
        hbm_cap=torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
        ddr_cap=2**46,
    )
    planner = EmbeddingShardingPlanner(topology=topology, batch_size=batch_size, constraints=constraints)
    made = planner.collective_plan(model, [Sharder()], dist.GroupMember.WORLD)
    if not fuses(tables.optimizer, device):
        for module in made.plan.values():
            for table in module.values():
                table.compute_kernel = "dense"  # runs with every sharding, though torchrec's planner offers it for one
    return made


def _local_world_size(world_size: int) -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def distribute(
    model: nn.Module,
    *,
    tables: Tables,
    optimizer: Optimizer,
    batch_size: int,
    seed: int,
    device: torch.device,
    frozen: Set[str] = frozenset(),
) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """Shard the tables, wrap the rest in DDP, and set up every optimizer.

    Args:
        model: tables on the meta device, the rest anywhere.
        tables: sharding and optimizer of the tables.
        optimizer: of everything else.
        batch_size: bags of the largest feature a rank looks up in a step, for the planner's estimates.
        seed: of the tables' initial values, which depend neither on the number of ranks nor on the sharding.
        device: of this rank.
        frozen: names of the tables that are not trained; `DENSE` stands for everything that is not a table.

    Returns:
        the distributed model, and one optimizer over all of it (fused table optimizers have stepped in the backward).
    """
    fused: tuple[Any, dict[str, Any]] = FUSED.get(tables.optimizer, (torch.optim.Adam, {"betas": (0.9, 0.98)}))
    sharding_plan = plan(model, tables, batch_size, device)

    def settings(table: str) -> dict[str, Any]:
        if table in frozen:
            return {"lr": 0.0, "weight_decay": 0.0, **fused[1]}
        return {"lr": tables.lr_of(table), "weight_decay": tables.weight_decay, **fused[1]}

    if fuses(tables.optimizer, device):
        for module in model.modules():
            if isinstance(module, EmbeddingBagCollection):
                for config in module.embedding_bag_configs():
                    bag = module.embedding_bags[config.name]
                    apply_optimizer_in_backward(fused[0], bag.parameters(), settings(config.name))
    distributed = DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(dist.GroupMember.WORLD),
        device=device,
        plan=sharding_plan,
        sharders=[Sharder()],
        init_parameters=True,
        # static_graph, DMP's default, would freeze the first step's graph, and a rank may start with an empty batch.
        data_parallel_wrapper=DefaultDataParallelWrapper(static_graph=False),
    )
    initialise_tables(distributed, tables.init_std_of, seed)
    dense: dict[str, Any] = {}
    stepped: dict[str, Any] = {}
    for name, parameter in in_backward_optimizer_filter(distributed.named_parameters()):
        (stepped if "embedding_bags" in name else dense)[name] = parameter
    parts: list[tuple[str, KeyedOptimizer]] = [("", distributed.fused_optimizer)]
    for name, parameter in stepped.items():
        chosen = settings(table_name(name))
        parts.append(
            ("", KeyedOptimizerWrapper({name: parameter}, lambda p, chosen=chosen: with_moments(fused[0](p, **chosen))))
        )
    # fused: one pass over all parameters; the default, a loop over 30 small tensors, took 12 ms of a step on CPU.
    adamw: dict[str, Any] = {
        "fused": True,
        "lr": 0.0 if DENSE in frozen else optimizer.lr,
        "betas": (0.9, optimizer.beta2),
        "weight_decay": optimizer.weight_decay,
    }
    parts.append(("", KeyedOptimizerWrapper(dense, lambda p: with_moments(torch.optim.AdamW(p, **adamw)))))
    return distributed, CombinedOptimizer(parts)


def with_moments(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Make Adam's state now, as its first step would: a checkpoint is loaded into the state that is there, no other."""
    if isinstance(optimizer, torch.optim.Adam):
        for group in optimizer.param_groups:
            for p in group["params"]:
                step = torch.zeros((), dtype=torch.float32, device=p.device if group["fused"] else "cpu")
                optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def table_name(parameter: str) -> str:
    """The table a parameter holds: `item` of `item_table.embedding_bags.item.weight`."""
    return parameter.split("embedding_bags.")[1].split(".")[0]


def tables_of(model: nn.Module) -> dict[str, Any]:
    """The tables in a model's state: name -> ShardedTensor, or a plain tensor where every rank holds a copy."""
    return {name: value for name, value in model.state_dict().items() if "embedding_bags" in name}


@torch.no_grad()
def initialise_tables(model: nn.Module, std_of: Callable[[str], float], seed: int) -> None:
    """Draw every table from N(0, std^2), block by block from streams of (seed, table, block).

    A row's values therefore depend neither on the number of ranks nor on how the table is sharded.
    """
    for number, (name, value) in enumerate(sorted(tables_of(model).items())):
        std = std_of(table_name(name))
        shards = [(value, 0, 0)]
        width = value.shape[1]
        if isinstance(value, ShardedTensor):
            shards = [(s.tensor, *s.metadata.shard_offsets) for s in value.local_shards()]
        for tensor, row, column in shards:
            rows, columns = tensor.shape
            for block in range(row // INIT_BLOCK, -(-(row + rows) // INIT_BLOCK)):
                rng = np.random.default_rng((seed, number, block, 4))
                drawn = torch.from_numpy(rng.standard_normal((INIT_BLOCK, width), dtype=np.float32)) * std
                first, last = max(row, block * INIT_BLOCK), min(row + rows, (block + 1) * INIT_BLOCK)
                tensor[first - row : last - row] = drawn[
                    first - block * INIT_BLOCK : last - block * INIT_BLOCK, column : column + columns
                ].to(tensor.device)
