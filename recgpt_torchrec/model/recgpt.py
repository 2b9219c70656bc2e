"""RecGPT: user and item tables, the decoder, and the loss, from a `SequenceBatch` to a number and vectors."""

import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

from recgpt_torchrec.config import Loss, Model, Tuning
from recgpt_torchrec.data.bags import ITEM, USER
from recgpt_torchrec.data.batch import SequenceBatch
from recgpt_torchrec.model.decoder import Decoder
from recgpt_torchrec.model.loss import bce_loss, softmax_loss


def table(name: str, feature: str, rows: int, dim: int) -> EmbeddingBagCollection:
    """One table of `rows` x `dim` float32, not materialised until it is sharded; one bag is one entity."""
    config = EmbeddingBagConfig(name=name, embedding_dim=dim, num_embeddings=rows, feature_names=[feature])
    return EmbeddingBagCollection(tables=[config], device=torch.device("meta"))


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
        self, users: Tensor, items: Tensor, outputs: Tensor, batch: SequenceBatch
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

    def sum_of_losses(self, h: Tensor, outputs: Tensor, batch: SequenceBatch) -> Tensor:
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


class RecGPT(nn.Module):
    """The whole model, from a batch of distinct ids to a loss (paper, section 3.2).

    Sharded tables are called in `forward` itself, with jagged tensors straight from the batch: that is what lets the
    train pipeline start their all-to-all a step ahead.
    """

    def __init__(self, model: Model, loss: Loss, users: int, items: int, tuning: Tuning | None = None) -> None:
        super().__init__()
        self.tuning = tuning
        self.user_table = table("user", USER, users, model.dim)
        self.item_table = table("item", ITEM, items, model.dim)
        if tuning is not None and tuning.output_table:
            self.output_table = table("output", ITEM, items, model.dim)
        self.dense = Dense(model, loss, segments=tuning is not None and tuning.prompts)

    def forward(self, batch: SequenceBatch) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """See `Dense.forward`."""
        users, items = self.user_table(batch.users), self.item_table(batch.items)
        if self.tuning is not None and self.tuning.output_table:
            outputs = self.output_table(batch.items)
            return self.dense(users.values(), items.values(), outputs.values(), batch)
        vectors = items.values()
        return self.dense(users.values(), vectors, vectors, batch)

    @property
    def scoring_table(self) -> nn.Module:
        """The table whose vectors outputs are scored against: W_l where there is one, else the item table."""
        return self.output_table if self.tuning is not None and self.tuning.output_table else self.item_table


def unwrapped(model: nn.Module) -> RecGPT:
    """The RecGPT inside DistributedModelParallel and DDP; its tables are sharded, and calling them is collective."""
    while not isinstance(model, RecGPT):
        inner = model.module
        assert isinstance(inner, nn.Module)
        model = inner
    return model
