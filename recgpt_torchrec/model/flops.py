"""Floating-point operations of a training step: its matrix products, forward and backward. Needs no torch.

A multiplication and an addition count as two. What is counted is what the step needs, whatever way it is computed:
attention only between a token and those before it in its own sequence, no padding, nothing computed again. The history
means are scans, and norms, dropout, lookups and optimizers are no matrix products, so none of these counts.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from recgpt_torchrec.config import Loss, Model


@dataclass(frozen=True)
class Flops:
    """Operations of one step, by part."""

    decoder: float
    """The linear layers of the blocks, of the history's mean and of the output."""
    attention: float
    """Scores and weighted sums of attention."""
    loss: float
    """Scores of targets against candidates, and their gradients."""

    @property
    def total(self) -> float:
        """Operations of the whole step."""
        return self.decoder + self.attention + self.loss


def step_flops(model: Model, loss: Loss, *, tokens: float, targets: float, candidates: float, attended: float) -> Flops:
    """Operations of one training step.

    A backward takes twice the forward: one product for the gradient of each of the two factors.

    Args:
        model: configuration of the decoder.
        loss: configuration of the loss; with `bce` a target is scored against `bce_negatives` of the candidates.
        tokens: of the batch.
        targets: of the batch.
        candidates: of the batch.
        attended: pairs of a token and a token that it attends to, see `attended_pairs`.
    """
    dim = model.dim
    # Queries, keys, values and output: 4 dim^2 weights; up and down: 2 feed_forward dim^2.
    weights = model.layers * (4 + 2 * model.feed_forward) * dim**2
    weights += (model.history_in + model.output_map) * dim**2
    scored = loss.bce_negatives if loss.candidates == "bce" else candidates
    return Flops(
        decoder=3 * 2.0 * tokens * weights,
        attention=3 * 2 * 2.0 * attended * dim * model.layers,
        loss=3 * 2.0 * targets * scored * dim,
    )


def attended_pairs(lengths: Iterable[int]) -> float:
    """Pairs of a token and a token that it attends to (itself and those before it), of sequences of these lengths."""
    return float(sum(length * (length + 1) // 2 for length in lengths))
