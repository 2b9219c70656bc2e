"""Options of the stage pretrain, and the groups of options that it shares with other stages."""

from dataclasses import dataclass, field
from typing import Literal

from recgpt_torchrec.config.checks import MAX_SEED, at_least, within
from recgpt_torchrec.config.device import Computing
from recgpt_torchrec.config.fields import changeable
from recgpt_torchrec.config.inputs.attributes import AttributeChoice
from recgpt_torchrec.config.inputs.events import Events
from recgpt_torchrec.config.inputs.neighbours import Neighbours
from recgpt_torchrec.config.inputs.time import TimeChoice
from recgpt_torchrec.config.metric import Metric
from recgpt_torchrec.config.model import Loss, Model
from recgpt_torchrec.config.preset.option import Preset
from recgpt_torchrec.config.tables import Tables


@dataclass(kw_only=True)
class Batch:
    """The batch of one rank."""

    tokens: int = 2048
    """Maximum number of tokens per batch and rank; at least model.max_len."""
    long_histories: Literal["newest", "windows"] = "newest"
    """How to train on histories longer than model.max_len. newest: on the newest entries only. windows: on all entries,
    cut into windows that overlap by one entry, in each epoch at other places."""

    def __post_init__(self) -> None:
        at_least("--batch.tokens", self.tokens, 1)


@dataclass(kw_only=True)
class TrainingBatch:
    """The batch of one rank in training."""

    tokens: int | Literal["auto"] = "auto"
    """Maximum number of tokens per batch and rank; at least model.max_len. auto: as many as give about 100 steps per
    epoch, at least 128 over all ranks, at most 2,048 per rank on CPU and 16,384 on CUDA; a resumed run keeps the number
    over all ranks. With users, as many as that many of the longest histories have."""
    step_tokens: int | None = None
    """Maximum number of tokens of a step over all ranks that tokens auto aims at, within its limits; null: as many as
    give about 100 steps per epoch."""
    users: int = 0
    """Maximum number of users per batch and rank (with long_histories windows, of windows); 0: as many as fit into the
    tokens."""
    long_histories: Literal["newest", "windows"] = "newest"
    """How to train on histories longer than model.max_len. newest: on the newest entries only. windows: on all entries,
    cut into windows that overlap by one entry, in each epoch at other places."""
    thinning: float = 0.0
    """Probability with which an entry of a thinned history is left out, 0 to less than 1: it is then neither read nor
    predicted in that epoch, and others are left out in the next. 0: none."""
    thinned: float = 0.5
    """Share of the histories that are thinned, drawn anew for each epoch, 0 to 1."""

    def __post_init__(self) -> None:
        within("--batch.thinned", self.thinned, 0, 1)
        if not 0 <= self.thinning < 1:
            raise ValueError(f"--batch.thinning is {self.thinning}; it must be at least 0 and less than 1")
        if self.tokens != "auto":
            at_least("--batch.tokens", self.tokens, 1)
        at_least("--batch.users", self.users, 0)
        if self.step_tokens is not None:
            at_least("--batch.step_tokens", self.step_tokens, 1)
            if self.tokens != "auto" or self.users:
                name = "users" if self.users else "tokens"
                raise ValueError(f"--batch.step_tokens and --batch.{name} both say how long a step is; leave one out")

    def given_tokens(self, max_len: int) -> int | None:
        """The number of tokens that these options fix; None: it is chosen by the data.

        Args:
            max_len: maximum number of entries of a history.
        """
        return (self.users * max_len or None) if self.tokens == "auto" else self.tokens

    def of(self, tokens: int) -> Batch:
        """The batch with a number of tokens."""
        return Batch(tokens=tokens, long_histories=self.long_histories)


@dataclass(kw_only=True)
class Stream:
    """Reading of the dataset in training."""

    window_groups: int = 4
    """Number of row groups that are read and shuffled together."""
    workers: int = changeable(0)
    """Number of loader processes per rank; 0: a thread of the training process, which is faster for batches of a few
    thousand tokens."""
    prefetch: int = changeable(8)
    """Number of batches that each worker (or the thread) prepares ahead."""
    damaged: Literal["stop", "skip"] = changeable("stop")
    """What to do with damaged data: a part that is missing or unreadable, ids outside the vocabulary, nulls, lists of
    different lengths. stop: end the run and name the place. skip: train without these rows, list them in damaged.jsonl
    in the output folder and report their number."""
    damaged_limit: int = changeable(1000)
    """Maximum number of damaged rows that skip leaves out in the whole run; a part or row group that cannot be read
    counts with all its rows."""
    checksums: bool = changeable(False)
    """Before training, compare the checksum of every part with the manifest; this reads the whole dataset once."""
    time_order: bool = False
    """Also read the timestamps, and treat a history that is not in time order as damaged."""

    def __post_init__(self) -> None:
        for name, least in {"window_groups": 1, "workers": 0, "prefetch": 1, "damaged_limit": 0}.items():
            at_least(f"--stream.{name}", getattr(self, name), least)


@dataclass(kw_only=True)
class Optimizer:
    """AdamW of the decoder, and the learning-rate schedule of decoder and tables."""

    lr: float = 2e-3
    """Peak learning rate of the decoder."""
    beta2: float = 0.98
    """Decay rate of AdamW's second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the decoder."""
    warmup_steps: int = 100
    """Number of warm-up steps, in which the learning rate rises linearly from 0; at most a tenth of the run."""
    final_lr: float = 0.01
    """Learning rate at the end of the last epoch, as a share of the peak, 0 to 1 (cosine decay)."""

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "warmup_steps"):
            at_least(f"--optimizer.{name}", getattr(self, name), 0)
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"--optimizer.beta2 is {self.beta2}; it must be at least 0 and less than 1")
        within("--optimizer.final_lr", self.final_lr, 0, 1)


@dataclass(kw_only=True)
class Train:
    """Length of the training, and what ends it early."""

    epochs: int = 20
    """Number of passes over the training part of the dataset; no limit where train.steps is given."""
    steps: int = 0
    """Number of optimizer steps after which the run ends, wherever in an epoch that is; the learning-rate schedule
    spans them. For logs too large to be read several times. 0: the run ends after train.epochs epochs."""
    metric: str = "NDCG@10"
    """Validation figure that decides which checkpoint is best, and when training stops early: HR@K or NDCG@K of lists
    without the items of a user's history; or with `unmasked.` before it, such as unmasked.NDCG@10, of lists that may
    have them, weighed by the repeat bias, over at most 8,192 users: for logs whose users take items again."""
    patience: int = 10
    """Number of epochs without a better train.metric after which training stops, at the end of an epoch; 0: never
    stop early. Epochs are counted also where train.validate_steps validates within them. Where nothing is held out for
    validation, the whole run is trained and the newest checkpoint is the result."""
    validate_every: int = 1
    """Number of epochs between validations at the end of an epoch."""
    validate_start: bool = False
    """Validate and save the model before the first step too, as epoch 0; it is the best where no epoch is better, and
    train.patience counts from it. Nothing where nothing is held out for validation."""
    validate_steps: int = 0
    """Number of optimizer steps between validations within an epoch, in addition to those at the ends of epochs. Each
    saves a checkpoint, which may become the best. 0: none."""
    validate_users: int = 0
    """Number of users to validate on: a sample of those with a validation item, drawn by the seed, the same in every
    validation and on any number of ranks. 0: all of them."""
    non_finite: Literal["stop", "skip"] = changeable("stop")
    """What to do when the loss or a gradient of a step is not finite. stop: end the run. skip: leave the step out.
    Tables and decoder stay as they were before the step, except that fused tables with weight decay still decay."""
    non_finite_limit: int = changeable(100)
    """Maximum number of steps that skip leaves out in the whole run."""
    stall_seconds: float = changeable(600.0)
    """Seconds without progress after which a rank reports where each rank is and ends the run; 0: never."""
    timeout_seconds: float = changeable(1800.0)
    """Maximum seconds that a rank waits for the others in one collective operation before it ends."""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = changeable("auto")
    """Precision of the matrix products in training; weights, validation and rankings are always float32. tf32: on GPUs
    since Ampere. bf16: the decoder and the loss in bfloat16, their sums in float32. auto: bf16 on GPUs that have it; on
    a CPU with AVX512-BF16 or AMX if a product takes less time in it at the start of the run; else fp32."""
    attention: Literal["auto", "dense", "varlen"] = changeable("auto")
    """How attention is computed. dense: on a padded grid, with a mask. varlen: flash attention on the tokens alone, on
    CUDA in bf16, without attention dropout. auto: varlen where it is possible, else dense."""
    fused_loss: bool | Literal["auto"] = changeable("auto")
    """Compute the softmax loss on CUDA in kernels that never write the scores to memory (needs Triton). auto: where it
    is possible and estimated to be faster, for vectors up to about 128 wide. Not possible on several ranks whose
    candidates count for each other's targets: all, in_batch, and different negatives."""
    compile: bool = changeable(False)
    """Compile the decoder with torch.compile; the first steps then take a minute or more."""
    profile: int = changeable(0)
    """Number of steps to trace, after the first 10 of the run, on rank 0; the trace and a table of the largest
    operations are in profile/ in the output folder. 0: none."""

    def __post_init__(self) -> None:
        Metric.parse(self.metric)
        for name in ("epochs", "validate_every", "timeout_seconds"):
            at_least(f"--train.{name}", getattr(self, name), 1)
        for name in (
            "steps",
            "validate_steps",
            "validate_users",
            "patience",
            "non_finite_limit",
            "stall_seconds",
            "profile",
        ):
            at_least(f"--train.{name}", getattr(self, name), 0)


@dataclass(kw_only=True)
class Saving:
    """When checkpoints are written, and how many are kept."""

    every_steps: int = changeable(0)
    """Number of steps between checkpoints within an epoch, in addition to the one at its end; 0: none."""
    every_minutes: float = changeable(0.0)
    """Minutes between checkpoints within an epoch (rank 0's clock), in addition to the one at its end; 0: none."""
    keep: int = changeable(2)
    """Number of newest checkpoints to keep, in addition to the best one."""
    asynchronous: bool = changeable(True)
    """Write in the background, from a copy of the tables and optimizer state in host memory; false: training waits."""

    def __post_init__(self) -> None:
        for name, least in {"every_steps": 0, "every_minutes": 0, "keep": 1}.items():
            at_least(f"--saving.{name}", getattr(self, name), least)


@dataclass(kw_only=True)
class Pretrain(Computing, Preset):
    """Pre-train the decoder and the tables autoregressively on a dataset's training part (paper, section 4.2).

    Example: recgpt pretrain --data data/mine --output runs/mine
    """

    data: str = changeable()
    """Folder of the dataset, as written by prepare."""
    output: str = changeable()
    """Output folder of the run; an unfinished run with the same options in it is resumed."""
    initial: str | None = None
    """Output folder of an earlier run (its best checkpoint is used), or one checkpoint folder, to start from. It must
    be trained on this dataset or on the one that this dataset extends (prepare --vocabulary). Decoder, tables and
    optimizer state are loaded; new users and items, and the learning-rate schedule, start as in any run. Read only when
    the run begins. null: start from random values."""
    targets: Literal["all", "new"] = "all"
    """Which targets to train on. all: the whole training part. new: only those that were not in the training part of
    the dataset that this one extends, each with the history before it (requires --initial)."""
    soft_targets: float = 0.0
    """Share of each target's weight, 0 to 1, that is spread over the answers of an earlier model, its teacher; above 0
    --data is a dataset with answers (generate_prompts --prompts.answers 10 with that model). Prompts are not read."""
    seed: int = 0
    """Seed of initial values, shuffling, negatives and dropout."""
    model: Model = field(default_factory=Model)
    attributes: AttributeChoice = field(default_factory=AttributeChoice)
    events: Events = field(default_factory=Events)
    time: TimeChoice = field(default_factory=TimeChoice)
    loss: Loss = field(default_factory=Loss)
    neighbours: Neighbours = field(default_factory=Neighbours)
    batch: TrainingBatch = field(default_factory=TrainingBatch)
    stream: Stream = field(default_factory=Stream)
    tables: Tables = field(default_factory=Tables)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    saving: Saving = field(default_factory=Saving)

    def __post_init__(self) -> None:
        within("--seed", self.seed, 0, MAX_SEED)
        within("--soft_targets", self.soft_targets, 0, 1)
        if self.soft_targets and self.loss.candidates == "bce":
            raise ValueError(
                f"--soft_targets is {self.soft_targets}, but --loss.candidates bce has no softmax; give "
                "--loss.candidates all, sampled or in_batch"
            )
        self.neighbours.check(self.loss.candidates, ("--soft_targets", self.soft_targets))
        if self.targets == "new" and self.initial is None:
            raise ValueError("--targets new continues an earlier run; name it with --initial")
