"""Groups of ranks that each hold all tables, sharded within the group: 2D parallelism.

Ranks 0 to n - 1 are the first group, and so on, so that a group can be a node: lookups then stay within it. Each group
updates its tables by its own part of the batch; now and then all groups average them. (torchrec's `DMPCollection` does
so on CUDA only, and averages no moments but Adagrad's.) Decoder and copied tables are trained by all ranks together.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.device_mesh import DeviceMesh
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import EnumerableShardingSpec, ShardingEnv, ShardingEnv2D, ShardingPlan

from recgpt_torchrec.errors import InputError


def group_size(shard_ranks: int, world_size: int) -> int:
    """Number of ranks of a group, given `--tables.shard_ranks`.

    Raises:
        InputError: the groups would not be equal.
    """
    if not shard_ranks:
        return world_size
    if world_size % shard_ranks:
        fits = max(size for size in range(1, min(shard_ranks, world_size) + 1) if world_size % size == 0)
        raise InputError(
            f"--tables.shard_ranks {shard_ranks}: {world_size} ranks are not equal groups of {shard_ranks}. "
            f"Give {fits}, or another number of ranks"
        )
    return shard_ranks


def group_nodes(size: int, local_world_size: int) -> int:
    """Number of ranks per node of a group of `size` ranks; a group of parts of nodes counts as one node."""
    return local_world_size if size % local_world_size == 0 else size


def sharding_environment(size: int, device_type: str, local_world_size: int) -> ShardingEnv:
    """Make what torchrec shards over: all ranks, or this rank's group (collective).

    Args:
        size: of a group, in ranks.
        device_type: of the ranks.
        local_world_size: number of ranks per node.
    """
    world = dist.get_world_size()
    everyone = dist.GroupMember.WORLD
    assert everyone is not None
    if size == world:
        return ShardingEnv.from_process_group(everyone)
    ranks = torch.arange(world).view(-1, size)
    mesh = DeviceMesh(device_type, ranks, mesh_dim_names=("replicate", "shard"))
    environment = ShardingEnv2D(
        sharding_pg=mesh.get_group("shard"),
        replica_pg=mesh.get_group("replicate"),
        global_pg=everyone,
        device_mesh=mesh,
        node_group_size=group_nodes(size, local_world_size),
        use_inter_host_allreduce=True,  # groups of neighbours
    )
    environment.output_dtensor = False  # tables are ShardedTensors here, and in checkpoints
    return environment


def check_no_cache(plan: ShardingPlan, size: int) -> None:
    """Check that groups of `size` ranks can be averaged.

    Raises:
        InputError: the rows of a table are in a cache, which an average would not reach.
    """
    for module in plan.plan.values():
        for name, table in module.items():
            if table.compute_kernel == EmbeddingComputeKernel.FUSED_UVM_CACHING.value:
                raise InputError(
                    f"the {name} table has a cache (uvm_caching), which an average over the groups of "
                    f"--tables.shard_ranks {size} would not reach. Use --tables.kernel fused or uvm, or larger groups"
                )


def place_in_own_group(plan: ShardingPlan, size: int, device_type: str, local_world_size: int) -> None:
    """Change a plan for ranks 0 to `size` - 1, in place, to one for the ranks of this rank's group.

    Raises:
        InputError: the rows of a table are in a cache, which an average over the groups would not reach.
    """
    check_no_cache(plan, size)
    first = dist.get_rank() // size * size
    for module in plan.plan.values():
        for table in module.values():
            table.ranks = [first + rank for rank in table.ranks or []]
            if isinstance(table.sharding_spec, EnumerableShardingSpec):
                for shard in table.sharding_spec.shards:
                    rank = first + shard.placement.rank()
                    device = f"{device_type}:{rank % local_world_size}" if device_type == "cuda" else device_type
                    shard.placement = torch.distributed._remote_device(f"rank:{rank}/{device}")


class Replicas:
    """Averages the sharded tables and their moments over the groups, every so many steps.

    Example: `Replicas(table_tensors(model, optimizer), size=8, every=10).after_step(step)`
    """

    def __init__(self, tensors: Iterable[Tensor | ShardedTensor], size: int, every: int) -> None:
        """
        Args:
            tensors: tables and moments, which share memory with the model's; copies are the same on all ranks anyway.
            size: number of ranks of a group.
            every: number of steps between two averages.
        """
        world = dist.get_world_size()
        self.number, self.every = world // size, every
        self._tensors: list[Tensor] = []
        self._pending = False
        if self.number > 1:
            for value in tensors:
                if isinstance(value, ShardedTensor):
                    self._tensors += [shard.tensor.detach() for shard in value.local_shards()]
            # Ranks that hold the same shards, one of each group.
            holders = [list(range(first, world, size)) for first in range(size)]
            self._group, _ = dist.new_subgroups_by_enumeration(holders)

    def after_step(self, step: int) -> None:
        """Average if `step` steps are a multiple of `every` (collective)."""
        self._pending = True
        if step % self.every == 0:
            self.average()

    @torch.no_grad()
    def average(self) -> None:
        """Average over the groups, unless no step was done since (collective)."""
        if self._pending:
            for tensor in self._tensors:
                dist.all_reduce(tensor, group=self._group)  # gloo has no average
                tensor /= self.number
        self._pending = False
