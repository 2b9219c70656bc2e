"""Options of the embedding tables: sharding, memory, optimizer, initial values."""

from dataclasses import dataclass, field
from typing import Literal

from recgpt_torchrec.config.checks import at_least, within
from recgpt_torchrec.config.fields import changeable

ShardingType = Literal[
    "auto", "data_parallel", "table_wise", "column_wise", "row_wise", "table_row_wise", "grid", "planner"
]
Kernel = Literal["auto", "fused", "uvm", "uvm_caching"]


def is_attribute(table: str) -> bool:
    """Whether a table is an attribute's: its name begins with the entity's, as `item-category`."""
    return "-" in table


def is_of_users(table: str) -> bool:
    """Whether a table is looked up for users: theirs, or that of an attribute of theirs."""
    return table.partition("-")[0] == "user"


def group_of(table: str) -> str:
    """The options below --tables that hold for a table alone, or for those of all attributes."""
    return "attributes" if is_attribute(table) else table


@dataclass(kw_only=True)
class TableChoice:
    """What holds for one table, or those of all attributes, instead of the choice for all tables."""

    sharding: ShardingType | None = changeable(None)
    """How to shard this table; null: as sharding says."""
    kernel: Kernel | None = changeable(None)
    """Where this table's rows are; null: as kernel says."""


@dataclass(kw_only=True)
class Sharding:
    """How the embedding tables are sharded over ranks, and what holds their rows."""

    sharding: ShardingType = changeable("auto")
    """How to shard each table. auto: up to data_parallel_mb a copy on every rank, or the whole table on one of at most
    four ranks if a training step looks up a part of it; above that, on one node, blocks of columns (of rows, if the
    columns are not equal blocks of a multiple of 4); on several nodes grid, table_row_wise or row_wise, so that every
    rank gets about its share. data_parallel: a copy on every rank. table_wise: the whole table on one rank.
    column_wise, row_wise: a block of columns or rows on each rank. table_row_wise: the table on one node, a block of
    rows on each of its ranks. grid: blocks of columns over nodes, each a block of rows on each rank of its node.
    planner: what torchrec's planner estimates to be fastest."""
    data_parallel_mb: float = changeable(32.0)
    """Size up to which auto copies a table to every rank, in MiB."""
    kernel: Kernel = changeable("auto")
    """What holds the rows of sharded tables. fused: the device. uvm: the host, read by the GPU (CUDA only).
    uvm_caching: the host, with a cache on the GPU (CUDA only). auto: the device; on CUDA uvm_caching for what its
    memory does not hold."""
    cache_ratio: float = changeable(0.2)
    """Share of a table's rows that the cache of uvm_caching holds, more than 0 and at most 1."""
    precision: Literal["fp32", "fp16"] = "fp32"
    """Precision of the tables' weights; moments and rankings are always float32."""
    communication: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision in which looked-up vectors and their gradients travel between ranks; bf16 on CUDA only."""
    user: TableChoice = field(default_factory=TableChoice)
    item: TableChoice = field(default_factory=TableChoice)
    output: TableChoice = field(default_factory=TableChoice)
    attributes: TableChoice = field(default_factory=TableChoice)

    def __post_init__(self) -> None:
        at_least("--tables.data_parallel_mb", self.data_parallel_mb, 0)
        within("--tables.cache_ratio", self.cache_ratio, 0, 1)
        if self.cache_ratio == 0:
            raise ValueError("--tables.cache_ratio is 0; it must be more than 0 (--tables.kernel uvm has no cache)")

    def sharding_of(self, table: str) -> ShardingType:
        """How to shard a table."""
        return self._choice(table).sharding or self.sharding

    def kernel_of(self, table: str) -> Kernel:
        """What holds the rows of a table."""
        return self._choice(table).kernel or self.kernel

    def _choice(self, table: str) -> TableChoice:
        choice = getattr(self, group_of(table), None)
        return choice if isinstance(choice, TableChoice) else TableChoice()


@dataclass(kw_only=True)
class Tables(Sharding):
    """The embedding tables: sharding, optimizer and initial values."""

    shard_ranks: int = 0
    """Number of ranks that share a copy of all tables; 0: all ranks. With the number of ranks per node, lookups stay
    within a node; each group of ranks trains its copy, and the copies are averaged every sync_steps."""
    sync_steps: int = 1
    """Number of steps between two averages of the groups' tables and moments, if shard_ranks makes several groups. An
    average sends twice what a rank holds of the tables. Every checkpoint and validation averages too, so above 1 these,
    and a stop, change the result slightly."""
    optimizer: Literal["rowwise_adagrad", "adagrad", "adam", "sgd"] = "rowwise_adagrad"
    """Optimizer of the tables. For a sharded table it is fused into the backward and updates only the rows of the batch
    (adam: on CUDA only). rowwise_adagrad keeps one moment per row; with column-wise sharding, one per row and block of
    columns."""
    lr: float = 0.05
    """Peak learning rate of the item tables."""
    user_lr: float = 0.005
    """Peak learning rate of the user table. Keep it well below lr: a user is seen only once per epoch, and at the item
    tables' rate the model memorises users."""
    attribute_lr: float | None = None
    """Peak learning rate of the attributes' tables, those of users too: their rows are shared by many. null: lr."""
    beta2: float = 0.98
    """Decay rate of adam's second moment, from 0 and less than 1 (adam)."""
    weight_decay: float = 0.0
    """L2 penalty, added to the gradient."""
    init_std: float = 0.02
    """Standard deviation of the item tables' initial values; vectors of attributes start at 0."""
    user_init_std: float = 0.0
    """Standard deviation of the user table's initial values."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("--tables.sync_steps", self.sync_steps, 1)
        for name in ("shard_ranks", "lr", "user_lr", "weight_decay", "init_std", "user_init_std"):
            at_least(f"--tables.{name}", getattr(self, name), 0)
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"--tables.beta2 is {self.beta2}; it must be at least 0 and less than 1")
        if self.attribute_lr is not None:
            at_least("--tables.attribute_lr", self.attribute_lr, 0)

    def lr_of(self, table: str) -> float:
        """The peak learning rate of a table."""
        if is_attribute(table) and self.attribute_lr is not None:
            return self.attribute_lr
        return self.user_lr if table == "user" else self.lr

    def init_std_of(self, table: str) -> float:
        """The standard deviation of a table's initial values."""
        if is_attribute(table):
            return 0.0
        return self.user_init_std if table == "user" else self.init_std
