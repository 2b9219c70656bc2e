"""Where a sharding plan puts each table: type, kernel, ranks and bytes, as values and as a table of text.

Knows nothing of devices and process groups: a plan and a model on the meta device are enough.
"""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from recgpt_torchrec.data.bags import table_name, tables_of
from recgpt_torchrec.distributed.memory import moment_bytes, parts_of
from recgpt_torchrec.texts.tables import table

if TYPE_CHECKING:  # reports read placements without torchrec
    from torchrec.distributed.types import ParameterSharding, ShardingPlan


@dataclass(frozen=True)
class Placement:
    """Where one table is."""

    table: str
    rows: int
    dim: int
    dtype: str
    """Of the weights: `float32`, `float16`."""
    sharding: str
    """As in `--tables.sharding`: data_parallel, table_wise, column_wise, row_wise, table_row_wise, grid."""
    kernel: str
    """As in `--tables.kernel`: fused, uvm, uvm_caching; dense where the backward does not update the table."""
    ranks: int
    """Number of ranks that hold a part of it, or a copy."""
    blocks: int
    """Number of blocks of columns."""
    bytes_per_rank: int
    """Weights and moments on the rank that holds most of the table."""
    total_bytes: int
    """Weights and moments on all ranks."""

    @property
    def itemsize(self) -> int:
        """Bytes of a weight."""
        return getattr(torch, self.dtype).itemsize


def placements(
    plan: "ShardingPlan", model: nn.Module, optimizer: str | None = None, groups: int = 1
) -> list[Placement]:
    """The placement of every table of a model, in the model's order.

    Args:
        plan: of the model.
        model: sharded or not; it may be on the meta device.
        optimizer: of the tables, as in `--tables.optimizer`; None: they are not trained, and have no moments.
        groups: number of groups of ranks that each hold all tables; the plan is that of one.
    """
    by_table = {name: table for module in plan.plan.values() for name, table in module.items()}
    return [
        _place(table_name(key), value, by_table[table_name(key)], optimizer, groups)
        for key, value in tables_of(model).items()
    ]


def _place(name: str, value: object, sharding: "ParameterSharding", optimizer: str | None, groups: int) -> Placement:
    from torchrec.distributed.types import EnumerableShardingSpec

    from recgpt_torchrec.distributed.sharding import KERNELS
    from recgpt_torchrec.distributed.sharding_types import OPTION_NAMES

    kernels = {kernel: option for option, kernel in KERNELS.items()}
    rows, dim = value.size()  # type: ignore[attr-defined]
    dtype = value.dtype  # type: ignore[attr-defined]
    spec, blocks = sharding.sharding_spec, 1
    if isinstance(spec, EnumerableShardingSpec):
        blocks = len({shard.shard_offsets[1] for shard in spec.shards})
    by_rank: Counter[int] = Counter()
    for rank, height, width in parts_of(sharding, rows, dim):
        by_rank[rank] += height * width * dtype.itemsize + moment_bytes(optimizer, height, width)
    return Placement(
        table=name,
        rows=rows,
        dim=dim,
        dtype=str(dtype).removeprefix("torch."),
        sharding=OPTION_NAMES.get(sharding.sharding_type, sharding.sharding_type),
        kernel=kernels.get(sharding.compute_kernel, sharding.compute_kernel),
        ranks=groups * sum(size > 0 for size in by_rank.values()),
        blocks=blocks,
        bytes_per_rank=max(by_rank.values()),
        total_bytes=groups * by_rank.total(),
    )


def table_text(placed: list[Placement]) -> str:
    """Placements as an aligned table of text: a heading, a line per table, and their sum."""
    rows = [("table", "rows x dim", "dtype", "sharding", "kernel", "ranks", "MiB per rank")]
    for each in placed:
        size = f"{each.rows:,} x {each.dim}"
        bytes_per_rank = f"{each.bytes_per_rank / 2**20:,.1f}"
        rows.append((each.table, size, each.dtype, each.sharding, each.kernel, f"{each.ranks:,}", bytes_per_rank))
    return table(rows, right=(5, 6))
