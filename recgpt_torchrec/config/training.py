"""How it is trained: the stage pretrain, and the groups of options that it shares with other stages."""

from dataclasses import dataclass, field
from typing import Literal

from recgpt_torchrec.config.checks import at_least, within
from recgpt_torchrec.config.fields import changeable
from recgpt_torchrec.config.model import Loss, Model


@dataclass(kw_only=True)
class Batch:
    """How much one rank trains on in one step."""

    tokens: int = 2048
    """Most positions of a batch, a rank."""
    long_histories: Literal["newest", "windows"] = "newest"
    """Histories longer than model.max_len: train on the newest entries only, or on all, cut in overlapping windows."""

    def __post_init__(self) -> None:
        at_least("--batch.tokens", self.tokens, 1)


@dataclass(kw_only=True)
class Stream:
    """How the Parquet parts are read."""

    window_groups: int = 4
    """Row groups that are read and shuffled together."""
    workers: int = changeable(0)
    """Loader processes a rank; 0: a thread of the training process, which is faster for batches of a few thousand
    tokens."""
    prefetch: int = changeable(8)
    """Batches each worker keeps ready."""
    damaged: Literal["stop", "skip"] = changeable("stop")
    """What happens where the dataset is damaged (a part that is missing or unreadable, a row with ids outside the
    vocabulary, nulls, lists that do not fit together). stop: the run ends, with the place. skip: it goes on without
    these rows, lists them in damaged.jsonl in the output folder, and says how many there are."""
    damaged_limit: int = changeable(1000)
    """Most damaged rows, in the whole run, that skip goes on without; all rows of a part or row group count where it
    cannot be read."""
    checksums: bool = changeable(False)
    """Compare the checksum of every part of the dataset with its manifest before training begins; reads each once."""
    time_order: bool = False
    """Read the times as well, and take histories that are not in time order for damaged."""

    def __post_init__(self) -> None:
        for name, least in {"window_groups": 1, "workers": 0, "prefetch": 1, "damaged_limit": 0}.items():
            at_least(f"--stream.{name}", getattr(self, name), least)


@dataclass(kw_only=True)
class Sharding:
    """How the embedding tables are sharded over ranks."""

    sharding: Literal["auto", "data_parallel", "table_wise", "column_wise", "row_wise"] = changeable("auto")
    """auto: a copy on every rank up to data_parallel_mb, blocks of columns beyond."""
    data_parallel_mb: float = changeable(32.0)
    """Largest table that auto copies to every rank, in MiB."""


@dataclass(kw_only=True)
class Tables(Sharding):
    """The embedding tables: how they are sharded over ranks, and their optimizer."""

    optimizer: Literal["rowwise_adagrad", "adagrad", "adam", "sgd"] = "rowwise_adagrad"
    """Fused into the backward where a table is sharded, and then only rows of the batch are stepped; adam is so on CUDA
    only. rowwise_adagrad keeps one moment a row, with column-wise sharding one a row and block of columns."""
    lr: float = 0.05
    """Peak learning rate of the item tables."""
    user_lr: float = 0.005
    """Peak learning rate of the user table; a user is seen once an epoch, and memorised at the items' rate."""
    weight_decay: float = 0.0
    """L2 penalty added to the gradient."""
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


@dataclass(kw_only=True)
class Optimizer:
    """AdamW of the decoder, and the learning rate's course, which the tables follow too."""

    lr: float = 2e-3
    """Peak learning rate of the decoder."""
    beta2: float = 0.98
    """Decay of Adam's second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0; no more than a tenth of the run, whatever is given here."""
    final_lr: float = 0.01
    """Learning rate at the end of the last epoch, as a share of the peak (cosine decay)."""

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "warmup_steps"):
            at_least(f"--optimizer.{name}", getattr(self, name), 0)
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"--optimizer.beta2 is {self.beta2}; it must be at least 0 and less than 1")
        within("--optimizer.final_lr", self.final_lr, 0, 1, "it is a share of the peak, 0 to 1")


@dataclass(kw_only=True)
class Train:
    """How long to train, and what ends a run before that."""

    epochs: int = 20
    """Passes over the training part."""
    patience: int = 10
    """Epochs without a better validation NDCG@10 before training stops; 0 never stops early."""
    validate_every: int = 1
    """Epochs between validations."""
    non_finite: Literal["stop", "skip"] = changeable("stop")
    """What to do where the loss or a gradient of a step is not finite: end the run, or leave the step out. Tables and
    decoder stay as they were before the step; where tables have weight decay, fused ones decay all the same."""
    non_finite_limit: int = changeable(100)
    """Steps that are left out at most."""
    stall_seconds: float = changeable(600.0)
    """Seconds without progress after which a rank says who stands where, and the run ends; 0: never."""
    timeout_seconds: float = changeable(1800.0)
    """Seconds that a rank waits for the others in one collective operation before it ends."""

    def __post_init__(self) -> None:
        for name in ("epochs", "validate_every", "timeout_seconds"):
            at_least(f"--train.{name}", getattr(self, name), 1)
        for name in ("patience", "non_finite_limit", "stall_seconds"):
            at_least(f"--train.{name}", getattr(self, name), 0)


@dataclass(kw_only=True)
class Saving:
    """What is saved, and when."""

    every_steps: int = changeable(0)
    """Steps between checkpoints within an epoch, beside the one at its end; 0: none."""
    every_minutes: float = changeable(0.0)
    """Minutes between checkpoints within an epoch, by rank 0's clock; 0: none."""
    keep: int = changeable(2)
    """Newest checkpoints kept, beside the best one."""
    asynchronous: bool = changeable(True)
    """Write beside the training, from a copy of tables and optimizer state in host memory; false: training waits."""

    def __post_init__(self) -> None:
        for name, least in {"every_steps": 0, "every_minutes": 0, "keep": 1}.items():
            at_least(f"--saving.{name}", getattr(self, name), least)


@dataclass(kw_only=True)
class Pretrain:
    """Pre-train the decoder and the tables autoregressively on a dataset's training part (paper, section 3.2)."""

    data: str = changeable()
    """Folder of the dataset, as prepare wrote it."""
    output: str = changeable()
    """Folder of the run; resumes an unfinished run of the same configuration."""
    initial: str | None = None
    """An earlier run's output folder (its best checkpoint) or one checkpoint folder to begin from, trained on this
    dataset or on one that it extends (prepare --vocabulary): decoder, tables and optimizer state are taken over, new
    users and items start as in any run, and so does the learning rate's course. Only read when the run begins."""
    targets: Literal["all", "new"] = "all"
    """all: the whole training part is predicted; new: only what the training part of the dataset that this one extends
    did not hold, from the whole history before it (with initial)."""
    seed: int = 0
    """Seed of initial values, shuffling, negatives and dropout."""
    model: Model = field(default_factory=Model)
    loss: Loss = field(default_factory=Loss)
    batch: Batch = field(default_factory=Batch)
    stream: Stream = field(default_factory=Stream)
    tables: Tables = field(default_factory=Tables)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    saving: Saving = field(default_factory=Saving)

    def __post_init__(self) -> None:
        at_least("--seed", self.seed, 0)
        if self.targets == "new" and self.initial is None:
            raise ValueError("--targets new goes on training an earlier run; name it with --initial")
