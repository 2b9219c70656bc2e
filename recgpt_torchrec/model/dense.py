"""The model without its tables: user module, decoder and loss. Needs torch alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from recgpt_torchrec.config import Loss, Model
from recgpt_torchrec.data.inputs.spec import Inputs
from recgpt_torchrec.model.attention import Attention, DenseAttention
from recgpt_torchrec.model.decoder import Decoder
from recgpt_torchrec.model.losses.fused_loss import fused_softmax_loss
from recgpt_torchrec.model.losses.loss import bce_loss, softmax_loss
from recgpt_torchrec.model.varlen import VarlenAttention

if TYPE_CHECKING:
    from recgpt_torchrec.data.packed import PackedBatch

SharedLoss = Callable[[Tensor, Tensor, Tensor, "PackedBatch", torch.dtype], Tensor]
"""A loss over the candidates of all ranks: see `catalogue.softmax.SharedSoftmax.__call__`."""


@dataclass(frozen=True)
class Compute:
    """How a training step is computed. Evaluation is always in float32, and not compiled."""

    dtype: torch.dtype = torch.float32
    """Of the operands of matrix products, float32 or bfloat16; parameters, norms, sums and losses are float32."""
    fused_loss: bool = False
    """Whether the softmax loss runs in the kernels of `fused_loss`."""
    compile: bool = False
    """Whether lookups and decoder are compiled."""
    tf32: bool = False
    """Whether float32 products outside of torch's own, those of `fused_loss`, may round their operands to TF32."""


class Dense(nn.Module):
    """The model without its tables: the part that DistributedModelParallel wraps in DDP."""

    def __init__(self, model: Model, loss: Loss, segments: bool = False, inputs: Inputs | None = None) -> None:
        super().__init__()
        self.model, self.loss, self.inputs = model, loss, inputs or Inputs()
        self.decoder = Decoder(
            model, self.inputs.segments if segments else 0, self.inputs.features, self.inputs.feedback
        )
        self.compute = Compute()
        self._compiled: Callable[..., tuple[Tensor, Tensor]] | None = None
        self._shared_loss: SharedLoss | None = None

    def set_compute(self, compute: Compute) -> None:
        """Set how training steps are computed from now on."""
        self.compute = compute
        self._compiled = torch.compile(self.decode) if compute.compile else None

    def set_shared_loss(self, shared_loss: "SharedLoss") -> None:
        """Set the loss of training steps whose targets are scored against the candidates of all ranks."""
        self._shared_loss = shared_loss

    def user_vectors(self, users: Tensor) -> Tensor:
        """The user module, [user bags, dim] -> the same: in training it drops whole user vectors at random, so that
        the model does not memorise users."""
        if self.training and self.model.user_dropout:
            keep_mask = torch.rand(users.shape[0], 1, device=users.device) >= self.model.user_dropout
            users = users * keep_mask  # not scaled up: the decoder learns to work with and without the vector
        return users

    def item_vectors(self, items: Tensor, outputs: Tensor, attributes: Tensor | None) -> tuple[Tensor, Tensor]:
        """Pool ids and attributes of items: input vectors and those that score, [item bags, dim] each.

        In training the ids' own vectors are dropped at random, so that attributes learn to stand alone.

        Args:
            items, outputs: [item bags, dim] vectors of the ids.
            attributes: [item bags, dim] weighted sum of the attributes' vectors; None: there are none.
        """
        if attributes is None:
            return items, outputs
        tied = outputs is items
        if self.training and self.inputs.id_dropout:
            keep_mask = torch.rand(items.shape[0], 1, device=items.device) >= self.inputs.id_dropout
            items, outputs = items * keep_mask, outputs * keep_mask
        inputs = items + attributes
        return inputs, inputs if tied else outputs + attributes

    def forward(
        self,
        users: Tensor,
        items: Tensor,
        outputs: Tensor,
        batch: "PackedBatch",
        user_attributes: Tensor | None = None,
        item_attributes: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Loss and vectors of a batch.

        Args:
            users: [user bags, dim].
            items: [item bags, dim] input vectors.
            outputs: [item bags, dim] vectors that score candidates; the same as `items` where they are tied.
            batch: the packed histories.
            user_attributes: [user bags, dim] weighted sum of the attributes' vectors; None: there are none.
            item_attributes: [item bags, dim], likewise.

        Returns:
            loss: [] sum over this rank's targets, divided by `batch.global_targets`.
            (loss, vectors): the loss without its graph, and the output at the newest entry of each sequence, the user's
            interest vector [sequences, dim], none in training. (The train pipeline uses the first of a pair and returns
            the second.)
        """
        decode = self._compiled if self._compiled is not None and self.training else self.decode
        half = self.training and self.compute.dtype != torch.float32
        items, outputs = self.item_vectors(items, outputs, item_attributes)
        users = self.user_vectors(users)
        users = users if user_attributes is None else users + user_attributes
        with torch.autocast(users.device.type, torch.bfloat16, enabled=half):
            h, vectors = decode(
                users,
                items,
                batch.item_bag,
                batch.user_bag,
                batch.position,
                batch.segment,
                batch.sequence,
                batch.target_slot,
                batch.last_slot,
                batch.cu_seqlens,
                batch.max_seqlen,
                batch.features,
            )
        # Clamped for steps without targets, far below 1: one target on 4 ranks is 0.25 per rank.
        loss = self.sum_of_losses(h, outputs, batch) / batch.global_targets.clamp(min=1e-6)
        return loss, (loss.detach(), vectors)

    def decode(
        self,
        users: Tensor,
        items: Tensor,
        item_bag: Tensor,
        user_bag: Tensor,
        position: Tensor,
        segment: Tensor,
        sequence: Tensor,
        target_slot: Tensor,
        last_slot: Tensor,
        cu_seqlens: Tensor | None,
        max_seqlen: int,
        features: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Outputs at the targets' slots [targets, dim], and, not in training, at the newest entries [sequences, dim].

        Its arguments are plain tensors, those of `forward` and `PackedBatch`, so that it compiles.
        """
        attention: Attention
        if cu_seqlens is None:
            attention = DenseAttention(sequence)
        else:
            attention = VarlenAttention(cu_seqlens, sequence.shape[1], max(max_seqlen, 1))
        hidden = self.decoder(
            take_rows(items, item_bag), take_rows(users, user_bag), position, segment, attention, features
        )
        flat = hidden.flatten(0, 1)
        return take_rows(flat, target_slot), flat[:0] if self.training else take_rows(flat, last_slot)

    def sum_of_losses(self, h: Tensor, outputs: Tensor, batch: "PackedBatch") -> Tensor:
        """Sum of the losses of this rank's targets, []; `h` [targets, dim] are the outputs of their tokens.

        Outside of training a rank's targets are scored against its own candidates alone.
        """
        positive, log_q = take_rows(outputs, batch.target_bag), batch.candidate_log_q
        # Without a copy, where they may be the whole catalogue.
        candidates = outputs[: len(log_q)] if batch.candidates_first else take_rows(outputs, batch.candidate_bag)
        index, target_weight = batch.target_candidate, batch.target_weight
        if self.loss.candidates == "bce":
            return bce_loss(h, positive, candidates, index, self.loss.bce_negatives, target_weight)
        compute = self.compute if self.training else Compute()
        if self.training and self._shared_loss is not None:
            hard = self._shared_loss(h, positive, candidates, batch, compute.dtype)
        elif compute.fused_loss:
            precision = "tf32" if compute.tf32 else "ieee"
            hard = fused_softmax_loss(h.to(compute.dtype), positive, candidates, log_q, index, target_weight, precision)
        else:
            hard = softmax_loss(h, positive, candidates, log_q, index, target_weight, compute.dtype)
        if not batch.soft_weight.shape[1]:
            return hard
        # Cross-entropy is linear in the target distribution, so part of the target's weight moves to its answers.
        weight = batch.soft_weight
        answers = torch.einsum("ta,tad->td", weight, take_rows(outputs, batch.soft_bag))
        shift = answers - weight.sum(1, keepdim=True) * positive
        return hard - (h * shift).sum()


def take_rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows of `table` [rows, dim] by `index` [...] int64 -> [..., dim].

    The backward of `table[index]` sorts the indices; that of `index_select` adds row by row.
    """
    return table.index_select(0, index.flatten()).view(*index.shape, table.shape[1])
