"""Options of the model and of its loss."""

from dataclasses import dataclass
from typing import Literal

from recgpt_torchrec.config.checks import at_least, within


@dataclass(kw_only=True)
class Model:
    """The decoder and the width of the embedding tables."""

    dim: int = 64
    """Width of the item vectors, the user vectors and the decoder."""
    layers: int = 1
    """Number of decoder blocks."""
    heads: int = 2
    """Number of attention heads; must divide dim."""
    max_len: int = 50
    """Maximum number of history entries that the decoder reads at once; of a longer history it reads the newest."""
    feed_forward: int = 4
    """Width of the feed-forward layer, as a multiple of dim."""
    activation: Literal["gelu", "relu"] = "gelu"
    """Activation of the feed-forward layer."""
    attention_scale: Literal["head", "dim"] = "head"
    """What the scores of attention are divided by. head: the square root of a head's width, dim / heads. dim: the
    square root of dim (paper, equation 3)."""
    norm_in: bool = True
    """Normalise the decoder's input (layer norm) before the first block."""
    dropout: float = 0.5
    """Dropout probability after the input embedding and after both sublayers of each block, 0 to 1."""
    attention_dropout: float = 0.5
    """Dropout probability of the attention weights, 0 to 1."""
    history_in: bool = True
    """Add a linear map of the running mean of the history's item vectors to the decoder's input."""
    history_out: bool = True
    """Add an exponentially decayed mean of the history's item vectors, with a learned decay rate, to the decoder's
    output."""
    output_map: bool = False
    """Map the decoder's output, with the history's mean in it, by a linear layer that starts as the identity. Without,
    the mean scores two items alike whichever came first."""
    user_dropout: float = 0.5
    """Probability that a user's whole vector is dropped in a training step, 0 to 1; 1: the user module is off."""

    def __post_init__(self) -> None:
        for name in ("dim", "layers", "heads", "max_len", "feed_forward"):
            at_least(f"--model.{name}", getattr(self, name), 1)
        for name in ("dropout", "attention_dropout", "user_dropout"):
            within(f"--model.{name}", getattr(self, name), 0, 1)
        if self.dim % self.heads:
            raise ValueError(f"--model.heads {self.heads} must divide --model.dim {self.dim}")


@dataclass(kw_only=True)
class Loss:
    """The loss and the candidates that each target is scored against."""

    candidates: Literal["all", "sampled", "in_batch", "bce"] = "sampled"
    """Candidates of each target. all: softmax over the whole catalogue; each rank scores an equal range of it for the
    targets of all ranks. sampled: softmax over the target and sampled negatives, with logQ correction. in_batch:
    softmax over the distinct targets of the batches of all ranks, with logQ correction. bce: binary cross-entropy of
    the target and sampled negatives (paper, equation 4)."""
    negatives: int = 4096
    """Number of negatives sampled per batch and shared by all its targets (sampled, bce)."""
    negatives_by: Literal["uniform", "log_uniform"] = "uniform"
    """Distribution of the sampled negatives. uniform: all items are equally likely. log_uniform: popular items are more
    likely (log-uniform over the popularity rank)."""
    negatives_across_ranks: Literal["same", "different"] = "same"
    """Whether all ranks draw the same negatives (sampled). same: as on one rank, whatever their number. different: each
    rank draws its own, and the targets of all ranks are scored against all of them, so that W ranks mean W times as
    many negatives."""
    bce_negatives: int = 1
    """Number of negatives per target, taken from the sampled ones (bce; O^- in the paper)."""

    def __post_init__(self) -> None:
        for name in ("negatives", "bce_negatives"):
            at_least(f"--loss.{name}", getattr(self, name), 1)
        if self.negatives_across_ranks == "different" and self.candidates != "sampled":
            raise ValueError(
                f"--loss.negatives_across_ranks different is for --loss.candidates sampled, not {self.candidates}; "
                "leave it out"
            )

    def crosses_ranks(self, ranks: int) -> bool:
        """Whether the targets of each of `ranks` ranks are scored against candidates of all of them."""
        return ranks > 1 and (self.candidates in ("all", "in_batch") or self.negatives_across_ranks == "different")
