"""What is trained: the decoder, and what it is scored against."""

from dataclasses import dataclass
from typing import Literal

from recgpt_torchrec.config.checks import at_least, within


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
        for name in ("dim", "layers", "heads", "max_len", "feed_forward"):
            at_least(f"--model.{name}", getattr(self, name), 1)
        for name in ("dropout", "attention_dropout", "user_dropout"):
            within(f"--model.{name}", getattr(self, name), 0, 1, "it is a probability, 0 to 1")
        if self.dim % self.heads:
            raise ValueError(f"--model.heads {self.heads} must divide --model.dim {self.dim}")


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
        for name in ("negatives", "bce_negatives"):
            at_least(f"--loss.{name}", getattr(self, name), 1)
