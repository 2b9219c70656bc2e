"""Prompts: the stages generate_prompts and prompt_tune."""

from dataclasses import dataclass, field
from typing import Literal

from recgpt_torchrec.config.checks import at_least, within
from recgpt_torchrec.config.fields import changeable
from recgpt_torchrec.config.model import Loss, Model
from recgpt_torchrec.config.training import Batch, Optimizer, Saving, Sharding, Stream, Tables, Train


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
        within("--prompts.k", self.k, 0, 8, "between two items stand 0 to 8 prompts")
        within("--prompts.answers", self.answers, 0, 64, "0 to 64 are kept beside an item")
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
        at_least("--batch_users", self.batch_users, 1)


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
        within("--tuning.soft_targets", self.soft_targets, 0, 1, "it is a share, 0 to 1")
        if not self.trained:
            raise ValueError(
                "--tuning.trained is empty: nothing would be trained; name users, items, output or decoder"
            )


@dataclass(kw_only=True)
class PromptTune:
    """Go on training a pre-trained model on histories with prompts (paper, section 3.3), or without, as the control."""

    data: str = changeable()
    """Folder of the prompt dataset, as generate_prompts wrote it."""
    checkpoint: str
    """A pre-training run's output folder (its best checkpoint) or one checkpoint folder."""
    output: str = changeable()
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
    saving: Saving = field(default_factory=Saving)

    def __post_init__(self) -> None:
        at_least("--seed", self.seed, 0)
