"""The model without its tables: user module, decoder and loss. Needs torch alone."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from recgpt_torchrec.config import Loss, Model
from recgpt_torchrec.model.attention import DenseAttention
from recgpt_torchrec.model.decoder import Decoder
from recgpt_torchrec.model.loss import bce_loss, softmax_loss

if TYPE_CHECKING:
    from recgpt_torchrec.data.batch import SequenceBatch


class Dense(nn.Module):
    """The model without its tables: the part that DistributedModelParallel wraps in DDP."""

    def __init__(self, model: Model, loss: Loss, segments: bool = False) -> None:
        super().__init__()
        self.model, self.loss = model, loss
        self.decoder = Decoder(model, segments)

    def user_vectors(self, users: Tensor) -> Tensor:
        """The user module, [user bags, dim] -> the same: in training it drops whole user vectors at random, so that
        the model does not memorise users."""
        if self.training and self.model.user_dropout:
            keep_mask = torch.rand(users.shape[0], 1, device=users.device) >= self.model.user_dropout
            users = users * keep_mask  # not scaled up: the decoder learns to work with and without the vector
        return users

    def forward(
        self, users: Tensor, items: Tensor, outputs: Tensor, batch: "SequenceBatch"
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Loss and vectors of a batch.

        Args:
            users: [user bags, dim].
            items: [item bags, dim] input vectors.
            outputs: [item bags, dim] vectors that score candidates; the same as `items` where they are tied.
            batch: the packed histories.

        Returns:
            loss: [] sum over this rank's targets, divided by `batch.global_targets`.
            (loss, vectors): the loss without its graph, and the output at the newest entry of each sequence, the user's
            interest vector [sequences, dim]. (The train pipeline uses the first of a pair and returns the second.)
        """
        users = self.user_vectors(users)
        hidden = self.decoder(
            take_rows(items, batch.item_bag),
            take_rows(users, batch.user_bag),
            batch.position,
            batch.segment,
            DenseAttention(batch.sequence),
        )
        flat = hidden.flatten(0, 1)
        # Clamped for steps without targets, far below 1: one target on 4 ranks is 0.25 per rank.
        loss = self.sum_of_losses(take_rows(flat, batch.target_slot), outputs, batch)
        loss = loss / batch.global_targets.clamp(min=1e-6)
        return loss, (loss.detach(), flat[batch.last_slot])

    def sum_of_losses(self, h: Tensor, outputs: Tensor, batch: "SequenceBatch") -> Tensor:
        """Sum of the losses of all targets, []; `h` [targets, dim] are the outputs of their tokens."""
        positive, candidates = take_rows(outputs, batch.target_bag), take_rows(outputs, batch.candidate_bag)
        if self.loss.candidates == "bce":
            return bce_loss(h, positive, candidates, batch.target_candidate, self.loss.bce_negatives)
        hard = softmax_loss(h, positive, candidates, batch.candidate_log_q, batch.target_candidate)
        if not batch.soft_weight.shape[1]:
            return hard
        # Cross-entropy is linear in the target distribution, so part of the target's weight moves to its answers.
        weight = batch.soft_weight
        shift = (
            torch.einsum("ta,tad->td", weight, take_rows(outputs, batch.soft_bag))
            - weight.sum(1, keepdim=True) * positive
        )
        return hard - (h * shift).sum()


def take_rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows of `table` [rows, dim] by `index` [...] int64 -> [..., dim].

    The backward of `table[index]` sorts the indices; that of `index_select` adds row by row.
    """
    return table.index_select(0, index.flatten()).view(*index.shape, table.shape[1])
