"""Chooses the sharding type of each table, and says why a table cannot be sharded as asked.

Knows sizes and numbers of ranks alone, neither a process group nor torchrec's planner.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

from torchrec.distributed.types import ShardingType

from recgpt_torchrec.config import Sharding
from recgpt_torchrec.config.tables import group_of
from recgpt_torchrec.errors import InputError

COPY, TABLE, COLUMNS, ROWS = (
    kind.value
    for kind in (
        ShardingType.DATA_PARALLEL,
        ShardingType.TABLE_WISE,
        ShardingType.COLUMN_WISE,
        ShardingType.ROW_WISE,
    )
)
NODE_ROWS, GRID = ShardingType.TABLE_ROW_WISE.value, ShardingType.GRID_SHARD.value
OPTION_NAMES = {GRID: "grid"}
"""Sharding types whose option has another name than torchrec's."""
PLANNER = "planner"
"""The value of --tables.sharding that leaves the choice to torchrec."""
COPIED_BYTES = 2**20
"""Size up to which `auto` copies a trained table, whatever a step looks up of it."""
FEW_RANKS = 4
"""Number of ranks up to which one of them can look up a whole table for all."""
NARROWEST = 4
"""Number of columns of the narrowest block: fbgemm's kernels read four numbers at a time."""
WIDE = 16
"""Number of columns from which a block is as wide as a read of memory: 64 bytes."""
FAIR, UNFAIR = 2, 4
"""Multiples of a rank's share of all big tables: what `auto` aims at, and what it accepts, for one table's part."""


@dataclass(frozen=True)
class Ranks:
    """How many ranks there are, and how many on each node."""

    world_size: int
    local_world_size: int

    def __post_init__(self) -> None:
        if self.world_size % self.local_world_size:  # torchrec takes unequal nodes for one
            object.__setattr__(self, "local_world_size", self.world_size)

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return self.world_size // self.local_world_size


class Size(NamedTuple):
    """Size of a table."""

    rows: int
    dim: int
    itemsize: int = 4
    """Bytes of a number."""

    @property
    def bytes(self) -> int:
        """Of the weights."""
        return self.rows * self.dim * self.itemsize

    @property
    def half(self) -> bool:
        """Whether its weights are float16."""
        return self.itemsize == 2


class Choice(NamedTuple):
    """How one table is sharded."""

    kind: str
    """A value of torchrec's `ShardingType`, or `PLANNER`."""
    blocks: int = 1
    """Number of equal blocks of columns."""


def choose(
    options: Sharding, sizes: Mapping[str, Size], ranks: Ranks, *, bags: int | None, fused: bool
) -> dict[str, Choice]:
    """Choose the sharding type of each table.

    Args:
        options: of all tables.
        sizes: of each table, by name.
        ranks: that share the tables.
        bags: number of rows that a training step looks up per rank; None: the tables are not trained.
        fused: whether fbgemm updates sharded tables in the backward.

    Raises:
        InputError: a table cannot be sharded as the options say.
    """
    copied = options.data_parallel_mb * 2**20
    big = sum(size.bytes for size in sizes.values() if size.bytes > copied)
    chosen = {}
    for table, size in sizes.items():
        kind = options.sharding_of(table)
        if size.half and bags is not None and not fused:
            raise InputError(
                "--tables.precision fp16 needs a --tables.optimizer that is fused into the backward: rowwise_adagrad, "
                "adagrad or sgd; adam is on CUDA only"
            )
        if kind == "auto":
            chosen[table] = choose_automatically(size, ranks, bags=bags, fused=fused, copied=copied, big=big)
            if reason := why_not(chosen[table].kind, size, ranks, fused):
                _refuse(table, kind, reason, size, ranks, fused)
        elif kind == PLANNER:
            if fused and size.dim % NARROWEST:
                _refuse(table, PLANNER, _narrow(size), size, ranks, fused)
            chosen[table] = Choice(PLANNER)
        else:
            kind = GRID if kind == "grid" else kind
            if reason := why_not(kind, size, ranks, fused):
                _refuse(table, kind, reason, size, ranks, fused)
            chosen[table] = Choice(kind, _blocks(kind, size, ranks))
    return chosen


def choose_automatically(size: Size, ranks: Ranks, *, bags: int | None, fused: bool, copied: float, big: int) -> Choice:
    """What `--tables.sharding auto` is for one table; never one that cannot be placed.

    Up to `copied` bytes: a copy on every rank; but for a table of which a step looks up a part, the whole table on one
    of a few ranks: a copy's gradient is exchanged whole, and its optimizer visits every row. A step with 768 tokens per
    rank, tables of 12,101 and 22,363 x 64 and 3,000 negatives took 56 ms on two ranks with copies and 40 so (minima).
    (Blocks of columns take as long, but keep a moment of row-wise Adagrad each: results would depend on the ranks.)
    float16 is never copied in training, since torch's optimizers would keep float16 moments.

    Beyond that, on one node: column-wise, whose vectors for one-id bags do not grow with the number of ranks, unlike
    row-wise, where each rank sends the sums of its rows for the bags of all ranks, [ranks x bags, dim].

    On several nodes: column-wise where blocks are wide, since each id travels to all ranks that have a block, 8 bytes
    beside 4 per column. Else a grid, or one node (table-row-wise): rows over the ranks of a node, so that the sums
    stay within it. It has as many blocks of columns as nodes while they are wide, since one block's node looks up and
    sends for all, and narrower ones where a rank's part would be more than `FAIR` times its share. Row-wise over all
    ranks where even that leaves a part of more than `UNFAIR` shares, and more than a copy's size.

    Args:
        size: of the table.
        ranks, bags, fused: as for `choose`.
        copied: size up to which a table may be copied to every rank, in bytes.
        big: bytes of all tables beyond that size.
    """
    if size.bytes <= copied and size.half and fused:
        if ranks.world_size <= FEW_RANKS:
            return Choice(TABLE)
    elif size.bytes <= copied:
        part = bags is not None and size.rows > bags and size.bytes > COPIED_BYTES and size.dim % NARROWEST == 0
        return Choice(TABLE if part and ranks.world_size <= FEW_RANKS else COPY)
    if fused and size.dim % NARROWEST:
        return Choice(COPY)  # fused kernels cannot train it in shards
    several = ranks.nodes > 1 and ranks.local_world_size > 1
    columns = Choice(COLUMNS, ranks.world_size)
    if why_not(COLUMNS, size, ranks, fused) is None and (not several or size.dim // ranks.world_size >= WIDE):
        return columns
    share = big / ranks.world_size
    if several and size.rows >= ranks.local_world_size:
        numbers = block_numbers(size.dim, ranks.nodes)

        def fits(blocks: int, shares: int) -> bool:
            return size.bytes / (blocks * ranks.local_world_size) <= max(copied, shares * share)

        wide = max((number for number in numbers if size.dim // number >= WIDE), default=1)
        for blocks in (number for number in numbers if number >= wide):
            if fits(blocks, FAIR) or (blocks == numbers[-1] and fits(blocks, UNFAIR)):
                return Choice(GRID if blocks > 1 else NODE_ROWS, blocks)
    if why_not(ROWS, size, ranks, fused) is None:
        return Choice(ROWS)
    return columns if why_not(COLUMNS, size, ranks, fused) is None else Choice(TABLE)


def block_numbers(dim: int, most: int) -> list[int]:
    """Numbers of equal blocks of a multiple of `NARROWEST` that `dim` columns make, up to `most`; at least 1 block."""
    return [n for n in range(1, min(most, dim // NARROWEST) + 1) if dim % (n * NARROWEST) == 0] or [1]


def why_not(kind: str, size: Size, ranks: Ranks, fused: bool) -> str | None:
    """The reason why a table cannot be sharded with a type; None: it can."""
    if kind == COPY:
        return "the moments of a trained copy would be fp16, as --tables.precision is" if fused and size.half else None
    if fused and size.dim % NARROWEST:
        return _narrow(size)
    if kind == COLUMNS and size.dim % (ranks.world_size * NARROWEST):
        return f"{size.dim} columns are not {ranks.world_size} equal blocks of a multiple of {NARROWEST}"
    if kind == ROWS and size.rows < ranks.world_size:
        return f"it has {size.rows} rows, fewer than the {ranks.world_size} ranks"
    if kind in (NODE_ROWS, GRID):
        if ranks.nodes == 1:
            return "it needs several nodes"
        if size.rows < ranks.local_world_size:
            return f"it has {size.rows} rows, fewer than the {ranks.local_world_size} ranks of a node"
    if kind == GRID and block_numbers(size.dim, ranks.nodes)[-1] == 1:
        return f"{size.dim} columns are not equal blocks of a multiple of {NARROWEST} for up to {ranks.nodes} nodes"
    return None


def _narrow(size: Size) -> str:
    return f"it has {size.dim} columns, not a multiple of {NARROWEST}, and cannot be trained in shards"


def _blocks(kind: str, size: Size, ranks: Ranks) -> int:
    return {COLUMNS: ranks.world_size, GRID: block_numbers(size.dim, ranks.nodes)[-1]}.get(kind, 1)


def _refuse(table: str, kind: str, reason: str, size: Size, ranks: Ranks, fused: bool) -> NoReturn:
    others = (ROWS, NODE_ROWS, COLUMNS, TABLE, COPY)
    would = next((other for other in others if why_not(other, size, ranks, fused) is None), None)
    remedy = f"--tables.{group_of(table)}.sharding {would} would fit" if would else "Use another --model.dim"
    raise InputError(f"the {table} table cannot be sharded {OPTION_NAMES.get(kind, kind)}: {reason}. {remedy}")
