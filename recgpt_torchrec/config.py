"""Everything a user can set: one dataclass a stage, built from shared groups; each field with its unit and default.

The docstring under a field is what `--help` prints. Validation stands in `__post_init__`, with the fix in the message.
"""

from dataclasses import dataclass, field
from typing import Literal

InputFormat = Literal["auto", "csv", "tsv", "jsonl", "parquet", "sequences", "recbole"]


def at_least(option: str, value: float, least: float) -> None:
    """Raise a `ValueError` that names the option, unless `value` is a finite number not below `least`."""
    if not least <= value < float("inf"):
        raise ValueError(f"{option} is {value}; it must be at least {least}")


@dataclass(kw_only=True)
class Prepare:
    """Turn raw interaction logs into a dataset: k-core filtering, dense ids in seeded random order, Parquet parts.

    Example: python -m recgpt_torchrec.prepare --input log.csv --output runs/mine/data
    """

    input: list[str] = field(
        metadata={
            "nargs": "+",
            "help": "Raw log: files, folders (searched to the bottom) or glob patterns; paths or URIs.",
        }
    )
    output: str
    """Folder of the new dataset, a path or a URI (s3://, gs://, hdfs://); must not exist, be empty, or hold the dataset
    that would be made (then nothing is done)."""
    input_format: InputFormat = "auto"
    """Format of the input. csv, tsv, jsonl and parquet: a row (or object) an interaction. sequences: a line a user,
    `user item item ...` in time order. recbole: tab separated with a header of name:type fields. auto goes by each
    file name's ending: .csv .tsv .jsonl .ndjson .parquet .txt (sequences) .inter (recbole), text also with .gz."""
    user_column: str = "user_id"
    """Column with the user key."""
    item_column: str = "item_id"
    """Column with the item key."""
    time_column: str | None = "timestamp"
    """Column with the event time: a number, kept in its own unit, or an ISO date-time, which becomes seconds since 1970
    (UTC unless it has an offset). null: rows are already in time order. Not used for sequences."""
    rating_column: str | None = None
    """Column with a number to keep beside each interaction, as the list column `ratings`; null keeps none."""
    click_column: str | None = None
    """Column that tells rows that were clicked (interactions) from rows that were only shown: a number, or true or
    false, which are 1 and 0; may be the rating_column. Shown rows become entries of segment 2, which generate_prompts
    takes with --prompts.source exposed; nothing else reads them. null: every row is an interaction."""
    click_from: float = 1
    """Smallest number in click_column that is a click; rows below were only shown. For ratings from 1 to 5 of which 1
    and 2 are dislikes: 3."""
    min_count: int = 5
    """Fewest interactions a kept user and a kept item must have (k-core, repeated until it converges); 1 keeps all."""
    vocabulary: str | None = None
    """Folder of an earlier dataset to extend: its users and items keep their ids and stay, however few interactions the
    log has of them; new ones that pass min_count get the ids after. The log must hold what their histories are to hold,
    so give that of the days before, too. Adds the column `trained`, which pretrain --targets new goes by."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Whether the same user, item and time, appearing again, is kept or dropped (before counting for min_count)."""
    seed: int = 0
    """Seed of the random order in which dense ids are given."""
    rows_per_group: int = 0
    """Users per Parquet row group, the unit that is streamed and shuffled; 0 makes 64 groups, of 16 to 8192 users."""
    groups_per_part: int = 16
    """Row groups per Parquet part file."""
    engine: Literal["duckdb", "pyspark"] = "duckdb"
    """What runs the preparation: duckdb on this machine; pyspark, for logs too large for it, is not available yet."""
    scratch: str | None = None
    """Local folder for temporary tables, about 50 bytes an interaction; null: beside the output."""
    memory_limit: str | None = None
    """Most memory the engine takes before it spills to scratch, such as 4GB; null: 80% of the machine's."""

    def __post_init__(self) -> None:
        at_least("--seed", self.seed, 0)
        if self.min_count < 1:
            raise ValueError(f"--min_count is {self.min_count}; it counts interactions and must be at least 1")
        if self.rows_per_group < 0:
            raise ValueError(f"--rows_per_group is {self.rows_per_group}; pass a number of users, or 0 to choose")
        if not abs(self.click_from) < float("inf"):
            raise ValueError(f"--click_from is {self.click_from}; it must be a finite number")
        if self.click_column is None and self.click_from != 1:
            raise ValueError(f"--click_from is {self.click_from}, but of which column? Name it with --click_column")
        if self.groups_per_part < 1:
            raise ValueError(f"--groups_per_part is {self.groups_per_part}; a file holds at least 1 row group")


@dataclass(kw_only=True)
class Model:
    """The decoder and the width of the tables."""

    dim: int = 64
    """Width of item and user vectors and of the decoder."""
    layers: int = 1
    """Decoder blocks."""
    heads: int = 2
    """Attention heads; must divide dim."""
    max_len: int = 50
    """Longest history the decoder reads, in entries; longer ones keep the newest."""
    feed_forward: int = 4
    """Width of the feed-forward layer, as a multiple of dim."""
    dropout: float = 0.5
    """Dropout after the embedding and of each block's two outputs, 0 to 1."""
    attention_dropout: float = 0.5
    """Dropout of attention weights, 0 to 1."""
    history_in: bool = True
    """Add a linear map of the running mean of the item vectors to the decoder's input."""
    history_out: bool = True
    """Add the mean of the item vectors, forgetting at a learned rate, to the decoder's output."""
    user_dropout: float = 0.5
    """Chance that a user's whole vector is dropped in a training step, 0 to 1; 1 turns the user module off."""

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ValueError(f"--model.heads {self.heads} must divide --model.dim {self.dim}")
        for name in ("dropout", "attention_dropout", "user_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--model.{name} is {getattr(self, name)}; it is a probability, 0 to 1")
        for name in ("dim", "layers", "heads", "max_len", "feed_forward"):
            if getattr(self, name) < 1:
                raise ValueError(f"--model.{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(kw_only=True)
class Loss:
    """What the next item is scored against."""

    candidates: Literal["all", "sampled", "in_batch", "bce"] = "sampled"
    """all: exact softmax over the catalogue; sampled: over drawn negatives with logQ correction; in_batch: over the
    batch's targets with logQ correction; bce: the paper's binary cross-entropy."""
    negatives: int = 4096
    """Items drawn a step, shared by all positions (sampled, bce)."""
    negatives_by: Literal["uniform", "log_uniform"] = "uniform"
    """Draw every item alike, or popular ones more often (log of the popularity rank)."""
    bce_negatives: int = 1
    """Negatives of each position, taken from the drawn ones (bce; O^- in the paper)."""

    def __post_init__(self) -> None:
        if self.negatives < 1 or self.bce_negatives < 1:
            raise ValueError("--loss.negatives and --loss.bce_negatives must be at least 1")


@dataclass(kw_only=True)
class Batch:
    """How much one rank trains on in one step."""

    tokens: int = 2048
    """Most positions of a batch, a rank."""
    long_histories: Literal["newest", "windows"] = "newest"
    """Histories longer than model.max_len: train on the newest entries only, or on all, cut in overlapping windows."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"--batch.tokens is {self.tokens}; it must be at least 1")


@dataclass(kw_only=True)
class Stream:
    """How the Parquet parts are read."""

    window_groups: int = 4
    """Row groups that are read and shuffled together."""
    workers: int = 0
    """Loader processes a rank; 0: a thread of the training process, which is faster for batches of a few thousand
    tokens."""
    prefetch: int = 8
    """Batches each worker keeps ready."""
    damaged: Literal["stop", "skip"] = "stop"
    """What happens where the dataset is damaged (a part that is missing or unreadable, a row with ids outside the
    vocabulary, nulls, lists that do not fit together). stop: the run ends, with the place. skip: it goes on without
    these rows, lists them in damaged.jsonl in the output folder, and says how many there are."""
    damaged_limit: int = 1000
    """Most damaged rows, in the whole run, that skip goes on without; all rows of a part or row group count where it
    cannot be read."""
    checksums: bool = False
    """Compare the checksum of every part of the dataset with its manifest before training begins; reads each once."""
    time_order: bool = False
    """Read the times as well, and take histories that are not in time order for damaged."""

    def __post_init__(self) -> None:
        at_least("--stream.damaged_limit", self.damaged_limit, 0)
        if self.window_groups < 1 or self.workers < 0 or self.prefetch < 1:
            raise ValueError(
                "--stream.window_groups and --stream.prefetch must be at least 1, --stream.workers at least 0"
            )


@dataclass(kw_only=True)
class Sharding:
    """How the embedding tables are sharded over ranks."""

    sharding: Literal["auto", "data_parallel", "table_wise", "column_wise", "row_wise"] = "auto"
    """auto: a copy on every rank up to data_parallel_mb, blocks of columns beyond."""
    data_parallel_mb: float = 32.0
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
    """Steps over which the learning rate rises from 0."""
    final_lr: float = 0.01
    """Learning rate at the end of the last epoch, as a share of the peak (cosine decay)."""

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "warmup_steps"):
            at_least(f"--optimizer.{name}", getattr(self, name), 0)
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"--optimizer.beta2 is {self.beta2}; it must be at least 0 and less than 1")
        if not 0 <= self.final_lr <= 1:
            raise ValueError(f"--optimizer.final_lr is {self.final_lr}; it is a share of the peak, 0 to 1")


@dataclass(kw_only=True)
class Train:
    """How long to train, and what ends a run before that."""

    epochs: int = 20
    """Passes over the training part."""
    patience: int = 10
    """Epochs without a better validation NDCG@10 before training stops; 0 never stops early."""
    validate_every: int = 1
    """Epochs between validations."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What to do where the loss or a gradient of a step is not finite: end the run, or leave the step out. Tables and
    decoder stay as they were before the step."""
    non_finite_limit: int = 100
    """Steps that are left out at most."""
    stall_seconds: float = 600.0
    """Seconds without progress after which a rank says who stands where, and the run ends; 0: never."""
    timeout_seconds: float = 1800.0
    """Seconds that a rank waits for the others in one collective operation before it ends."""

    def __post_init__(self) -> None:
        least = {"epochs": 1, "patience": 0, "validate_every": 1, "non_finite_limit": 0, "stall_seconds": 0}
        for name, smallest in {**least, "timeout_seconds": 1}.items():
            at_least(f"--train.{name}", getattr(self, name), smallest)


@dataclass(kw_only=True)
class CheckpointOptions:
    """What is saved, and when."""

    every_steps: int = 0
    """Steps between checkpoints within an epoch, beside the one at its end; 0: none."""
    every_minutes: float = 0.0
    """Minutes between checkpoints within an epoch, by rank 0's clock; 0: none."""
    keep: int = 2
    """Newest checkpoints kept, beside the best one."""
    asynchronous: bool = True
    """Write beside the training, from a copy of tables and optimizer state in host memory; false: training waits."""

    def __post_init__(self) -> None:
        at_least("every_minutes of the checkpoints", self.every_minutes, 0)
        if self.every_steps < 0 or self.keep < 1:
            raise ValueError(
                f"every_steps is {self.every_steps} and keep {self.keep} of the checkpoints: "
                "every_steps must be at least 0, keep at least 1"
            )


@dataclass(kw_only=True)
class Pretrain:
    """Pre-train the decoder and the tables autoregressively on a dataset's training part (paper, section 3.2)."""

    data: str
    """Folder of the dataset, as prepare wrote it."""
    output: str
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
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)

    def __post_init__(self) -> None:
        at_least("--seed", self.seed, 0)
        if self.targets == "new" and self.initial is None:
            raise ValueError("--targets new goes on training an earlier run; name it with --initial")


INTERESTS = 32
"""Most interests a user has."""


@dataclass(kw_only=True)
class Recall:
    """How lists of several interests are recalled and merged (paper, section 3.4)."""

    m: int = 0
    """Items of the first interest in the two-step list of the longest k, the rest n from the second; 0: chosen on the
    validation split by NDCG at the longest k."""
    interests: int = 1
    """Interests of the multi-interest paths, measured where there is more than one; 1 to 32."""

    def __post_init__(self) -> None:
        if self.m < 0:
            raise ValueError(f"--recall.m is {self.m}; it is a number of items, or 0 to choose it on validation")
        if not 1 <= self.interests <= INTERESTS:
            raise ValueError(f"--recall.interests is {self.interests}; a user has 1 to {INTERESTS}")


@dataclass(kw_only=True)
class Evaluate:
    """Rank the whole catalogue for every user: HR@k and NDCG@k of a checkpoint, beside baselines that need no
    training."""

    data: str
    """Folder of the dataset."""
    checkpoint: str
    """A run's output folder (its best checkpoint) or one checkpoint folder."""
    output: str
    """JSON file to write; its folder must exist."""
    split: Literal["validation", "test"] = "test"
    """Which held-out item is ranked: the second last of each user, or the last."""
    ks: list[int] = field(default_factory=lambda: [5, 10])
    """List lengths of HR and NDCG."""
    baselines: bool = True
    """Whether to measure popularity and item co-occurrence beside the model."""
    recall: Recall = field(default_factory=Recall)
    overwrite: bool = False
    """Replace an output file that holds the evaluation of something else."""
    batch: Batch = field(default_factory=Batch)
    tables: Sharding = field(default_factory=Sharding)

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"--ks is {self.ks}; it takes list lengths of at least 1, for example [5,10]")
        if self.recall.m > max(self.ks):
            raise ValueError(f"--recall.m is {self.recall.m}, more than the longest list of --ks ({max(self.ks)})")


@dataclass(kw_only=True)
class Export:
    """Write item vectors and user vectors of a checkpoint as Parquet, for an ANN index: one vector a user, or several,
    by autoregressive steps (paper, section 3.4)."""

    data: str
    """Folder of the dataset."""
    checkpoint: str
    """A run's output folder (its best checkpoint) or one checkpoint folder."""
    output: str
    """Folder of the export; must not hold anything else."""
    history: Literal["all", "test", "validation"] = "all"
    """Which history a user's vector is made of: everything, or what comes before the item that a split holds out."""
    interests: int = 1
    """Vectors of each user, 1 to 32: the ordinary one, and with more those of as many autoregressive steps less one.
    The paper's online system has 6; retrieve merges in two steps from 2 on."""
    batch: Batch = field(default_factory=Batch)
    tables: Sharding = field(default_factory=Sharding)

    def __post_init__(self) -> None:
        if not 1 <= self.interests <= INTERESTS:
            raise ValueError(f"--interests is {self.interests}; a user has 1 to {INTERESTS}")


@dataclass(kw_only=True)
class HNSW:
    """A graph of near neighbours (index hnsw)."""

    neighbours: int = 32
    """Edges of each item (M); more find more, in more memory: 8 bytes an edge and item."""
    build: int = 200
    """Candidates looked at when an item is put in (efConstruction); more make a better graph, more slowly."""
    search: int = 128
    """Candidates looked at in a search (efSearch), and never fewer than the items wanted; more find more, more
    slowly."""

    def __post_init__(self) -> None:
        for name, least in (("neighbours", 2), ("build", 1), ("search", 1)):
            at_least(f"--hnsw.{name}", getattr(self, name), least)


@dataclass(kw_only=True)
class IVF:
    """Clusters of items, of which a search looks into the nearest (index ivf)."""

    clusters: int = 0
    """Clusters (nlist), at most as many as there are items; 0: four times the square root of the items, each of 39
    items or more."""
    probes: int = 64
    """Clusters a search looks into (nprobe); more find more, more slowly."""

    def __post_init__(self) -> None:
        at_least("--ivf.clusters", self.clusters, 0)
        at_least("--ivf.probes", self.probes, 1)


@dataclass(kw_only=True)
class Retrieve:
    """Turn an export into a list of items for each user, with an exact or an approximate index: no model is needed.

    Example: python -m recgpt_torchrec.retrieve --export vectors/mine --data data/mine --output lists/mine --k 50
    """

    export: str
    """Folder of the export."""
    output: str
    """Folder of the lists; must not hold anything else."""
    k: int = 50
    """Items of each list; at most as many as the export has."""
    merge: Literal["auto", "two_step", "quota", "score"] = "auto"
    """How the lists of several interests become one. two_step: m items of the first interest, then k - m new ones of
    the second; quota: an equal number of new items of each, list after list; score: the items with the largest share
    exp(score) / sum of exp(scores) of any list; auto: two_step where the export has several interests."""
    m: int = 0
    """Items of the first interest (two_step), 1 to k; 0: nine tenths of k."""
    interests: int = 0
    """Interests that are used, the first ones of the export, 1 to 32; 0: all, of two_step two."""
    data: str | None = None
    """Folder of the dataset: the items of the history that a user's vectors were made of are left out, and if that
    history ends before a held-out item, the lists are measured by it. null: any item may be retrieved."""
    index: Literal["exact", "hnsw", "ivf"] = "exact"
    """exact: every item is scored; hnsw, ivf: approximate, for catalogues where that takes too long."""
    hnsw: HNSW = field(default_factory=HNSW)
    ivf: IVF = field(default_factory=IVF)
    sample: int = 1000
    """Users whose approximate lists are compared with exact ones, about; 0: none."""

    def __post_init__(self) -> None:
        at_least("--k", self.k, 1)
        at_least("--sample", self.sample, 0)
        if not 0 <= self.m <= self.k:
            raise ValueError(f"--m is {self.m}; of a list of --k {self.k} the first interest has 1 to {self.k} items")
        if self.m and self.merge not in ("auto", "two_step"):
            raise ValueError(f"--m is {self.m}, but --merge is {self.merge}; m belongs to two steps, leave it out")
        if not 0 <= self.interests <= INTERESTS:
            raise ValueError(f"--interests is {self.interests}; a user has 1 to {INTERESTS}, or 0 for all there are")
        if self.merge == "two_step" and self.interests not in (0, 2) or self.merge == "auto" and self.interests > 2:
            raise ValueError(
                f"--interests is {self.interests}, but two steps take 2; leave it out, or give --merge quota or score"
            )


@dataclass(kw_only=True)
class Prompts:
    """What stands between neighbouring items of a history (paper, Algorithm 1)."""

    k: int = 2
    """Most prompts between two neighbouring items, 0 to 8."""
    source: Literal["generated", "exposed", "both"] = "generated"
    """generated: the items that the model answers; exposed: those that were shown there and not clicked, the newest k;
    both: shown ones first, generated ones up to k in all."""
    answers: int = 0
    """Best answers after each interacted item to keep beside it, with their scores: prompt_tune can take them as soft
    targets; 0 to 64."""
    exclude_seen: bool = True
    """Never generate an item of the user's history so far, or one that stands in the same interval already."""

    def __post_init__(self) -> None:
        if not 0 <= self.k <= 8:
            raise ValueError(f"--prompts.k is {self.k}; between two items stand 0 to 8 prompts")
        if not 0 <= self.answers <= 64:
            raise ValueError(f"--prompts.answers is {self.answers}; 0 to 64 are kept beside an item")
        if self.answers and (not self.k or self.source == "exposed"):
            raise ValueError(
                "--prompts.answers: nothing is generated with --prompts.k 0 or --prompts.source exposed; leave it out"
            )


@dataclass(kw_only=True)
class GeneratePrompts:
    """Put prompts between the items of every history: what a pre-trained model answers there, or what was shown and not
    clicked (paper, Algorithm 1). Writes a dataset like the one that is read, with segment ids."""

    data: str
    """Folder of the dataset, as prepare wrote it."""
    checkpoint: str
    """A pre-training run's output folder (its best checkpoint) or one checkpoint folder."""
    output: str
    """Folder of the new dataset; must not hold anything else."""
    previous: str | None = None
    """Folder of an earlier prompt dataset of the same checkpoint and options: histories that only grew since then have
    only their new prompts generated."""
    prompts: Prompts = field(default_factory=Prompts)
    batch_users: int = 512
    """Users whose prompts a rank generates at once."""
    tables: Sharding = field(default_factory=Sharding)

    def __post_init__(self) -> None:
        if self.batch_users < 1:
            raise ValueError(f"--batch_users is {self.batch_users}; it must be at least 1")


@dataclass(kw_only=True)
class Tuning:
    """What prompt-tuning adds to the pre-trained model, and what of it is trained (paper, section 3.3)."""

    prompts: bool = True
    """Read the prompts between the items; false: fine-tune on the same histories without them, the control."""
    predict_from: Literal["interacted", "last", "every"] = "interacted"
    """Which entries predict the next item: the interacted one before it, the last entry before it, or all of them."""
    soft_targets: float = 0.0
    """Share of each target's weight, 0 to 1, that is spread over the pre-trained model's answers at that place; needs a
    dataset generated with --prompts.answers."""
    output_table: bool = True
    """Score with a table of its own (W_l), which starts as a copy of the item table; false: with the item table."""
    trained: list[Literal["users", "items", "output", "decoder"]] = field(
        default_factory=lambda: ["users", "items", "output", "decoder"]
    )
    """What is trained; the rest stays as it was pre-trained."""

    def __post_init__(self) -> None:
        if not 0 <= self.soft_targets <= 1:
            raise ValueError(f"--tuning.soft_targets is {self.soft_targets}; it is a share, 0 to 1")
        if not self.trained:
            raise ValueError(
                "--tuning.trained is empty: nothing would be trained; name users, items, output or decoder"
            )


@dataclass(kw_only=True)
class PromptTune:
    """Go on training a pre-trained model on histories with prompts (paper, section 3.3), or without, as the control."""

    data: str
    """Folder of the prompt dataset, as generate_prompts wrote it."""
    checkpoint: str
    """A pre-training run's output folder (its best checkpoint) or one checkpoint folder."""
    output: str
    """Folder of the run; resumes an unfinished run of the same configuration."""
    seed: int = 0
    """Seed of shuffling, negatives and dropout."""
    tuning: Tuning = field(default_factory=Tuning)
    model: Model | None = None
    """The decoder; null: as in the checkpoint. Where it is given, dropouts may differ, widths may not."""
    loss: Loss = field(default_factory=Loss)
    batch: Batch = field(default_factory=Batch)
    stream: Stream = field(default_factory=Stream)
    tables: Tables = field(default_factory=lambda: Tables(lr=0.02, user_lr=0.002))
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=1e-3))
    train: Train = field(default_factory=lambda: Train(epochs=5, patience=0))
    checkpointing: CheckpointOptions = field(default_factory=CheckpointOptions)

    def __post_init__(self) -> None:
        at_least("--seed", self.seed, 0)
