"""Shards a model that is on the meta device: sharding plan, DistributedModelParallel."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.types import ShardingEnv, ShardingPlan, ShardingType

from recgpt_torchrec.config import Sharding
from recgpt_torchrec.distributed.memory import check_tables_fit
from recgpt_torchrec.distributed.unfilled import Unfilled
from recgpt_torchrec.errors import InputError


class Sharder(EmbeddingBagCollectionSharder):
    """The EBC sharder, with row-wise sharding on CPU too: torchrec offers it on CUDA only, but it works on gloo."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Sharding types that the planner may choose from."""
        offered = super().sharding_types(compute_device_type)
        return offered if ShardingType.ROW_WISE.value in offered else [*offered, ShardingType.ROW_WISE.value]


COPIED_BYTES = 2**20
"""Size up to which `auto` copies a trained table, whatever a step looks up of it."""
FEW_RANKS = 4
"""Number of ranks up to which one of them can look up a whole table for all."""


def sharding_type(tables: Sharding, rows: int, dim: int, world_size: int, bags: int | None = None) -> str:
    """The sharding type of one table.

    auto, up to `data_parallel_mb`: a copy on every rank; but for a table of which a step looks up a part, the whole
    table on one of a few ranks: a copy's gradient is exchanged whole, and its optimizer visits every row. A step with
    768 tokens per rank, tables of 12,101 and 22,363 x 64 and 3,000 negatives took 66 ms on two ranks with copies and 40
    so. (Blocks of columns take as long, but keep a moment of row-wise Adagrad each: results would depend on the ranks.)

    auto, beyond that: column-wise, whose traffic for one-id bags does not grow with the number of ranks, unlike that of
    row-wise; row-wise where the columns are not equal blocks of a multiple of 4.

    Args:
        tables: the options.
        rows, dim: of the table.
        world_size: number of ranks.
        bags: number of rows that a training step looks up per rank; None: the table is not trained.
    """
    if tables.sharding != "auto":
        return tables.sharding
    if rows * dim * 4 <= tables.data_parallel_mb * 2**20:
        # Fused kernels read four numbers at a time, so other widths are trained in copies only.
        looks_up_part = bags is not None and rows > bags and rows * dim * 4 > COPIED_BYTES and dim % 4 == 0
        whole = looks_up_part and world_size <= FEW_RANKS
        return (ShardingType.TABLE_WISE if whole else ShardingType.DATA_PARALLEL).value
    blocks_fit = dim % (4 * world_size) == 0
    return (ShardingType.COLUMN_WISE if blocks_fit or rows < world_size else ShardingType.ROW_WISE).value


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
    world_size = dist.get_world_size()
    constraints, keys = {}, 1
    for module in model.modules():
        if isinstance(module, EmbeddingBagCollection):
            for config in module.embedding_bag_configs():
                rows, dim, keys = config.num_embeddings, config.embedding_dim, max(keys, len(config.feature_names))
                kind = sharding_type(tables, rows, dim, world_size, bags if trained else None)
                if kind == ShardingType.ROW_WISE.value and rows < world_size:
                    raise InputError(
                        f"the {config.name} table has {rows} rows, fewer than the {world_size} ranks: "
                        "it cannot be sharded row-wise; use --tables.sharding data_parallel, or fewer ranks"
                    )
                if kind == ShardingType.COLUMN_WISE.value and (dim % world_size or dim // world_size % 4):
                    raise InputError(
                        f"the {config.name} table has {dim} columns, not {world_size} equal blocks of a multiple of 4: "
                        "use another --model.dim, number of ranks, or --tables.sharding"
                    )
                copied = kind == ShardingType.DATA_PARALLEL.value
                if fused and not copied and dim % 4:  # fbgemm's kernels read four numbers at a time
                    raise InputError(
                        f"the {config.name} table has {dim} columns, not a multiple of 4, so it cannot be trained in "
                        "shards; use another --model.dim, or --tables.sharding data_parallel"
                    )
                constraints[config.name] = ParameterConstraints(
                    sharding_types=[kind],
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
    batch_size = -(-bags // keys)  # of each feature, for the planner's estimates
    planner = EmbeddingShardingPlanner(topology=topology, batch_size=batch_size, constraints=constraints)
    sharding_plan = planner.collective_plan(model, [Sharder()], dist.GroupMember.WORLD)
    if not fused:
        for module in sharding_plan.plan.values():
            for table in module.values():
                # Works with every sharding type, though torchrec's planner offers it for data-parallel only.
                table.compute_kernel = "dense"
    return sharding_plan


def _local_world_size(world_size: int) -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


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
            env=ShardingEnv.from_process_group(dist.GroupMember.WORLD),
            device=device,
            plan=sharding_plan,
            sharders=[Sharder()],
            init_parameters=True,
            # static_graph, DMP's default, would freeze the first step's graph; a rank may start with an empty batch.
            data_parallel_wrapper=DefaultDataParallelWrapper(static_graph=False),
        )


def table_name(parameter: str) -> str:
    """The table's name in a parameter's: `item` of `tables.embedding_bags.item.weight`."""
    return parameter.split("embedding_bags.")[1].split(".")[0]


def tables_of(model: nn.Module) -> dict[str, Any]:
    """A model's tables by parameter name: each a `ShardedTensor`, or a tensor where every rank holds a copy."""
    return {name: value for name, value in model.state_dict().items() if "embedding_bags" in name}
