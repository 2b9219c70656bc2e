"""Options of the embedding tables: sharding, optimizer, initial values."""

from dataclasses import dataclass
from typing import Literal

from recgpt_torchrec.config.checks import at_least
from recgpt_torchrec.config.fields import changeable


@dataclass(kw_only=True)
class Sharding:
    """How the embedding tables are sharded over ranks."""

    sharding: Literal["auto", "data_parallel", "table_wise", "column_wise", "row_wise"] = changeable("auto")
    """How to shard each table. auto: up to data_parallel_mb a copy on every rank, or the whole table on one of at most
    four ranks if a training step looks up a part of it; above that blocks of columns (of rows, if the columns are not
    equal blocks of a multiple of 4). data_parallel: a copy on every rank. table_wise: the whole table on one rank.
    column_wise, row_wise: a block of columns or rows on each rank."""
    data_parallel_mb: float = changeable(32.0)
    """Size up to which auto copies a table to every rank, in MiB."""


@dataclass(kw_only=True)
class Tables(Sharding):
    """The embedding tables: sharding, optimizer and initial values."""

    optimizer: Literal["rowwise_adagrad", "adagrad", "adam", "sgd"] = "rowwise_adagrad"
    """Optimizer of the tables. For a sharded table it is fused into the backward and updates only the rows of the batch
    (adam: on CUDA only). rowwise_adagrad keeps one moment per row; with column-wise sharding, one per row and block of
    columns."""
    lr: float = 0.05
    """Peak learning rate of the item tables."""
    user_lr: float = 0.005
    """Peak learning rate of the user table. Keep it well below lr: a user is seen only once per epoch, and at the item
    tables' rate the model memorises users."""
    weight_decay: float = 0.0
    """L2 penalty, added to the gradient."""
    init_std: float = 0.02
    """Standard deviation of the item tables' initial values; user vectors start at 0."""

    def __post_init__(self) -> None:
        for name in ("data_parallel_mb", "lr", "user_lr", "weight_decay", "init_std"):
            at_least(f"--tables.{name}", getattr(self, name), 0)

    def lr_of(self, table: str) -> float:
        """The peak learning rate of a table."""
        return self.user_lr if table == "user" else self.lr

    def init_std_of(self, table: str) -> float:
        """The standard deviation of a table's initial values."""
        return 0.0 if table == "user" else self.init_std
