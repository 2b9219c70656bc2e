"""Options of the stages generate_prompts and prompt_tune."""

from dataclasses import dataclass, field
from typing import Literal

from recgpt_torchrec.config.checks import MAX_SEED, at_least, within
from recgpt_torchrec.config.device import Computing, Watched
from recgpt_torchrec.config.fields import changeable
from recgpt_torchrec.config.inputs.events import TargetEvents
from recgpt_torchrec.config.inputs.neighbours import AnswerNeighbours, Neighbours
from recgpt_torchrec.config.model import Loss, Model
from recgpt_torchrec.config.preset.option import Preset
from recgpt_torchrec.config.tables import Sharding, Tables
from recgpt_torchrec.config.training import Optimizer, Saving, Stream, Train, TrainingBatch


@dataclass(kw_only=True)
class Prompts:
    """The prompts between neighbouring interactions of a history (paper, Algorithm 1)."""

    k: int = 2
    """Maximum number of prompts between two neighbouring interactions, 0 to 8; to 32 with --prompts.source exposed."""
    source: Literal["generated", "exposed", "both"] = "generated"
    """Where prompts come from. generated: items that the pre-trained model generates. exposed: the newest k items that
    were shown between the two interactions and not clicked, and after the newest one too. both: exposed items first,
    then generated ones, up to k."""
    feedback: list[Literal["shown", "disliked", "skipped"]] = field(
        default_factory=lambda: ["shown", "disliked", "skipped"]
    )
    """Kinds of exposed items that become prompts, as prepare told them apart."""
    answers: int = 0
    """Number of answers (the model's highest-ranked next items) to store with each of the newest model.max_len
    interactions, with their scores, 0 to 64; prompt_tune --tuning.soft_targets and pretrain --soft_targets use them.
    With --prompts.k 0 they alone are stored."""
    exclude_seen: bool = True
    """Never generate an item that is in the user's history so far, or already a prompt between the same two
    interactions."""
    temperature: float = 0.0
    """0: a prompt is the model's best item. Above 0: it is drawn from the best --prompts.top_k items with probabilities
    softmax(score / temperature); the larger, the less the score counts."""
    top_k: int = 50
    """Number of the best items that a prompt is drawn from, 1 to 1,000, with --prompts.temperature."""
    seed: int = 0
    """Seed of the draws. Drawn prompts are the same on any number of ranks, and for requests that name the user and
    hold the whole history."""

    def __post_init__(self) -> None:
        within("--prompts.k", self.k, 0, 32 if self.source == "exposed" else 8)
        if not self.feedback and self.source != "generated":
            raise ValueError("--prompts.feedback is empty; name shown, disliked or skipped")
        within("--prompts.answers", self.answers, 0, 64)
        if self.answers and self.source == "exposed":
            raise ValueError(
                f"--prompts.answers is {self.answers}, but nothing is generated with --prompts.source exposed; leave "
                "it out"
            )
        at_least("--prompts.temperature", self.temperature, 0)
        within("--prompts.top_k", self.top_k, 1, 1000)
        within("--prompts.seed", self.seed, 0, MAX_SEED)
        if self.temperature and (self.source == "exposed" or not self.k):
            raise ValueError(
                f"--prompts.temperature is {self.temperature}, but no prompt is generated with --prompts.source "
                f"{self.source} and --prompts.k {self.k}; leave it out"
            )
        for name in ("top_k", "seed"):
            if not self.temperature and getattr(self, name) != getattr(type(self), name):
                raise ValueError(
                    f"--prompts.{name} is {getattr(self, name)}, but prompts are the best items; give "
                    "--prompts.temperature, for example 1, to draw them"
                )

    @property
    def needs_model(self) -> bool:
        """Whether anything is generated: prompts or answers."""
        return self.source != "exposed" and bool(self.k or self.answers)


@dataclass(kw_only=True)
class GeneratePrompts(Computing, Watched):
    """Insert prompts between the interactions of every history: items that a pre-trained model generates, or items that
    were shown and not clicked (paper, Algorithm 1). Writes a new dataset with segment ids.

    Example: recgpt generate_prompts --data data/mine --checkpoint runs/mine --output data/prompts
    """

    data: str
    """Folder of the dataset, as written by prepare."""
    checkpoint: str
    """Output folder of a pre-training run (its best checkpoint is used), or one checkpoint folder."""
    output: str
    """Folder of the new dataset. It must be new or empty, unless it already holds this result; then nothing is done."""
    previous: str | None = None
    """Folder of an earlier prompt dataset of the same checkpoint and options. Its prompts are reused: of a history that
    has only grown since, only the new prompts are generated. null: all are generated."""
    averaged_with: list[str] = field(default_factory=list)
    """Folders of answers that other checkpoints made on the same dataset with the same options: the answers stored are
    those with the highest mean scores over all of them. []: the checkpoint's own."""
    prompts: Prompts = field(default_factory=Prompts)
    neighbours: AnswerNeighbours = field(default_factory=AnswerNeighbours)
    batch_users: int = 512
    """Number of users per rank whose prompts are generated at once."""
    tables: Sharding = field(default_factory=Sharding)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("--batch_users", self.batch_users, 1)
        if self.averaged_with and (self.prompts.k or not self.prompts.answers):
            raise ValueError(
                f"--averaged_with averages answers alone, but --prompts.k is {self.prompts.k} and --prompts.answers "
                f"{self.prompts.answers}; give --prompts.k 0 and a number of answers"
            )
        if self.averaged_with and self.previous is not None:
            raise ValueError("--previous reuses answers, which --averaged_with changes; leave one out")
        if self.neighbours.path is not None and self.previous is not None:
            raise ValueError(
                f"--previous {self.previous}: answers with --neighbours.path leave out what a history holds, so "
                "those of one that has grown are others, and none can be reused; leave --previous out"
            )
        if self.neighbours.path is not None and not self.prompts.answers:
            raise ValueError(
                f"--neighbours.path is {self.neighbours.path}, but neighbours take part in answers alone, and "
                "--prompts.answers is 0; give a number of answers, for example 10"
            )


@dataclass(kw_only=True)
class Tuning:
    """What prompt-tuning adds to the pre-trained model, and which parts are trained (paper, section 4.3)."""

    prompts: bool = True
    """Train on histories with their prompts; false: fine-tune on the same histories without prompts, as the control."""
    predict_from: Literal["auto", "interacted", "last", "every"] = "auto"
    """Which entries predict the next interacted item. interacted: the interaction before it. last: the last entry
    before it, prompt or interaction. every: all entries. With last and every, what was shown before a request answers
    it, also after the newest interaction (see generate_prompts --prompts.source exposed); what was shown at the same
    time as the item does not. auto: last for exposed prompts, every for both; interacted for generated
    ones, and in datasets prepared before what was shown after the newest interaction was kept."""
    targets: Literal["all", "last"] = "all"
    """Which interactions of a history are targets. all: every one that entries predict. last: the last one alone, or of
    each window (paper, equation 5)."""
    soft_targets: float = 0.0
    """Share of each target's weight, 0 to 1, that is spread over the stored answers of the pre-trained model; above 0
    it needs a dataset generated with --prompts.answers. A target that a prompt predicts has none. The share
    of an answer that is never a negative (one that was never trained, with attributes or in_batch) stays with the
    target."""
    places: bool = False
    """Whether the model reads the place in the list in which an item was shown (prepare --position_column)."""
    output_table: bool = True
    """Score against a separate output table (W_l), which starts as a copy of the item table; false: against the item
    table."""
    trained: list[Literal["users", "items", "output", "decoder"]] = field(
        default_factory=lambda: ["users", "items", "output", "decoder"]
    )
    """Parts of the model to train; the others stay as pre-trained. users, items: their tables and those of their
    attributes; output: the output table, to which the attributes of items are added."""

    @property
    def reads_feedback(self) -> bool:
        """Whether prompts predict, so that feedback which was known at a request is read to answer it."""
        return self.prompts and self.predict_from not in ("auto", "interacted")

    def __post_init__(self) -> None:
        within("--tuning.soft_targets", self.soft_targets, 0, 1)
        if not self.trained:
            raise ValueError(
                "--tuning.trained is empty, so nothing would be trained; name users, items, output or decoder"
            )


@dataclass(kw_only=True)
class PromptTune(Computing, Preset):
    """Continue training a pre-trained model on histories with prompts (paper, section 4.3), or without, as the control.

    Example: recgpt prompt_tune --data data/prompts --checkpoint runs/mine --output runs/tuned
    """

    data: str = changeable()
    """Folder of the prompt dataset, as written by generate_prompts."""
    checkpoint: str
    """Output folder of a pre-training run (its best checkpoint is used), or one checkpoint folder."""
    output: str = changeable()
    """Output folder of the run; an unfinished run with the same options in it is resumed."""
    seed: int = 0
    """Seed of shuffling, negatives and dropout."""
    tuning: Tuning = field(default_factory=Tuning)
    events: TargetEvents = field(default_factory=TargetEvents)
    model: Model | None = None
    """Options of the decoder; null: those of the checkpoint. If given, only the dropout options may differ from the
    checkpoint's."""
    loss: Loss = field(default_factory=Loss)
    neighbours: Neighbours = field(default_factory=Neighbours)
    batch: TrainingBatch = field(default_factory=TrainingBatch)
    stream: Stream = field(default_factory=Stream)
    tables: Tables = field(default_factory=lambda: Tables(lr=0.02, user_lr=0.002))
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=1e-3))
    train: Train = field(default_factory=lambda: Train(epochs=5, patience=0, validate_start=True))
    saving: Saving = field(default_factory=Saving)

    def __post_init__(self) -> None:
        within("--seed", self.seed, 0, MAX_SEED)
        self.neighbours.check(self.loss.candidates, ("--tuning.soft_targets", self.tuning.soft_targets))
