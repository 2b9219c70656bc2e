"""Everything of the model that is not a table: user module, decoder and loss. Needs torch alone."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from recgpt_torchrec.config import Loss, Model
from recgpt_torchrec.model.decoder import Decoder
from recgpt_torchrec.model.loss import bce_loss, softmax_loss

if TYPE_CHECKING:
    from recgpt_torchrec.data.batch import SequenceBatch


class Dense(nn.Module):
    """Everything that is not a table: the part that DistributedModelParallel wraps in DDP."""

    def __init__(self, model: Model, loss: Loss, segments: bool = False) -> None:
        super().__init__()
        self.model, self.loss = model, loss
        self.decoder = Decoder(model, segments)

    def user_vectors(self, users: Tensor) -> Tensor:
        """The user module: in training the whole vector of a user is dropped at random, so that none can be
        memorised."""
        if self.training and self.model.user_dropout:
            kept = torch.rand(users.shape[0], 1, device=users.device) >= self.model.user_dropout
            users = users * kept  # not scaled up: the decoder learns to do with the vector and without it
        return users

    def forward(
        self, users: Tensor, items: Tensor, outputs: Tensor, batch: "SequenceBatch"
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Loss and vectors of a batch.

        Args:
            users: [user bags, dim].
            items: [item bags, dim] input vectors.
            outputs: [item bags, dim] the vectors that are scored against; the same where they are tied.
            batch: the packed histories.

        Returns:
            loss: [] sum over this rank's targets, divided by `batch.global_targets`.
            (loss, vectors): the loss without its graph, and the output at the newest entry of each sequence, the user's
            interest vector [sequences, dim]. (The train pipeline hands on the second of a pair and keeps the first.)
        """
        users = self.user_vectors(users)
        hidden = self.decoder(
            items[batch.item_bag], users[batch.user_bag], batch.position, batch.segment, batch.sequence
        )
        flat = hidden.flatten(0, 1)
        # The clamp is for no targets at all: a step may have fewer than one a rank, 1 on 4 ranks is 0.25.
        loss = self.sum_of_losses(flat[batch.target_slot], outputs, batch) / batch.global_targets.clamp(min=1e-6)
        return loss, (loss.detach(), flat[batch.last_slot])

    def sum_of_losses(self, h: Tensor, outputs: Tensor, batch: "SequenceBatch") -> Tensor:
        """Sum of the losses at the target positions, `h` [targets, dim]."""
        positive, candidates = outputs[batch.target_bag], outputs[batch.candidate_bag]
        if self.loss.candidates == "bce":
            return bce_loss(h, positive, candidates, batch.target_candidate, self.loss.bce_negatives)
        hard = softmax_loss(h, positive, candidates, batch.candidate_log_q, batch.target_candidate)
        if not batch.soft_weight.shape[1]:
            return hard
        # Cross-entropy is linear in the target distribution: weight moves from the target's score to the answers'.
        weight = batch.soft_weight
        softer = torch.einsum("ta,tad->td", weight, outputs[batch.soft_bag]) - weight.sum(1, keepdim=True) * positive
        return hard - (h * softer).sum()
