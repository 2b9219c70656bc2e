"""Decodes many sequences entry by entry, with a key/value cache.

The state per user is the keys and values of each block, and the two sums behind the decoder's means of the history. A
step costs attention over the earlier entries, not a pass over the sequence. Knows nothing of items, files or processes.
Tensors are [users, ...], not the packed grid.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from recgpt_torchrec.data.segments import EXPOSED
from recgpt_torchrec.model.decoder import Decoder


class Decoding:
    """The state of `users` sequences that grow together; their numbers of entries may differ.

    Example: feed one entry of each of three users, and score the next items::

        state = Decoding(decoder, users=3, capacity=50)
        outputs = state.step(table[items], user_vectors, positions, segments)  # [3, dim]
        scores = outputs @ table.t()

    Args:
        decoder: in evaluation mode.
        users: number of sequences.
        capacity: maximum number of entries of a sequence.
    """

    def __init__(self, decoder: Decoder, users: int, capacity: int) -> None:
        assert not decoder.training, "decoding takes a decoder in evaluation mode: dropout would change the cache"
        config, weight = decoder.config, decoder.position.weight
        self.decoder, self.capacity = decoder, capacity
        self.blocks: list[Any] = list(decoder.blocks)
        # One place beyond the capacity: an inactive user's entry goes to the next free place and is overwritten later.
        shape = (users, config.heads, capacity + 1, config.dim // config.heads)
        self.keys = [weight.new_zeros(shape) for _ in range(config.layers)]
        self.values = [weight.new_zeros(shape) for _ in range(config.layers)]
        self.entries = torch.zeros(users, dtype=torch.int64, device=weight.device)
        """[users] int64 entries so far."""
        self.sum = weight.new_zeros(users, config.dim)
        """[users, dim] sum of the item vectors so far."""
        self.recent, self.recent_weight = weight.new_zeros(users, config.dim), weight.new_zeros(users, 1)
        """[users, dim] the same sum, decaying at the decoder's rate; and [users, 1] the sum of its weights."""
        self.chosen = torch.zeros(users, 1, device=weight.device)
        """[users, 1] number of entries that `sum` is over: all, or those that are no feedback."""
        self.newest = weight.new_zeros(users, config.dim)
        """[users, dim] item vector of the newest of these entries."""
        self.feedback = weight.new_zeros(2, users, config.dim)
        self.feedback_weight = weight.new_zeros(2, users, 1)
        """[2, users, dim] and [2, users, 1]: both means of feedback, likewise, if the decoder has them (`Refused`)."""
        self.longest = 0
        """Upper bound of the users' numbers of entries, known without reading from the device."""
        self.level = True
        """Whether every user has exactly `longest` entries; no mask is needed then."""

    @property
    def users(self) -> int:
        """Number of sequences that are still decoded."""
        return self.entries.shape[0]

    def keep(self, users: int) -> None:
        """Drop all but the first `users` sequences."""
        self.keys, self.values = [k[:users] for k in self.keys], [v[:users] for v in self.values]
        self.entries, self.sum = self.entries[:users], self.sum[:users]
        self.recent, self.recent_weight = self.recent[:users], self.recent_weight[:users]
        self.chosen, self.newest = self.chosen[:users], self.newest[:users]
        self.feedback = self.feedback[:, :users]
        self.feedback_weight = self.feedback_weight[:, :users]

    @torch.no_grad()
    def step(
        self,
        items: Tensor,
        user_vectors: Tensor,
        positions: Tensor,
        segments: Tensor,
        active: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """Feed one entry of each sequence.

        Args:
            items: [users, dim] item vectors of the entries.
            user_vectors: [users, dim].
            positions, segments: [users] int64.
            active: [users] bool: sequences that have an entry in this step; the others do not change. None: all.
            features: [features, users] int64 of the entries; None: the model reads none.

        Returns:
            [users, dim] outputs, undefined for inactive users; the next item is scored by the inner product of output
            and item vector.
        """
        assert self.longest < self.capacity or not self.level or active is not None, "more entries than the capacity"
        config = self.decoder.config
        level = self.level and active is None
        self._add_to_sums(items, segments, active)
        mean = self.sum / self.chosen.clamp(min=1) if config.history_in else None
        refused = self.decoder.refused
        inputs = items if refused is None else refused.inputs(items, self.newest, segments)
        x = self.decoder.embed(inputs, user_vectors, positions, segments, mean, features)[:, None]
        # Place of this entry in the cache; for inactive users the next free one, which stays free.
        place = self.entries - 1 if active is None else torch.where(active, self.entries - 1, self.entries)
        place = place.clamp(max=self.capacity)
        self.level, self.longest = level, min(self.longest + 1, self.capacity + 1)
        mask = None
        if not level:
            mask = (torch.arange(self.longest, device=place.device) <= place[:, None])[:, None, None]
        all_users = torch.arange(self.users, device=place.device)
        for block, keys, values in zip(self.blocks, self.keys, self.values, strict=True):
            q, k, v = block.project(x)
            if level:
                keys[:, :, self.longest - 1], values[:, :, self.longest - 1] = k[:, :, 0], v[:, :, 0]
            else:
                keys[all_users, :, place], values[all_users, :, place] = k[:, :, 0], v[:, :, 0]
            keys, values = keys[:, :, : self.longest], values[:, :, : self.longest]
            x = block.finish(x, F.scaled_dot_product_attention(q, keys, values, attn_mask=mask))
        return self._finish(x[:, 0])

    def _finish(self, x: Tensor) -> Tensor:
        """Add the means of the history to the last block's output [users, dim], and map it."""
        if self.decoder.config.history_out:
            x = x + self.decoder.mean_out * (self.recent / self.recent_weight.clamp(min=1e-30))
        if (refused := self.decoder.refused) is not None:
            x = x + (self.feedback / (self.feedback_weight + refused.PRIOR)).sum(0)
        return self.decoder.map_out(x)

    def _add_to_sums(self, items: Tensor, segments: Tensor, active: Tensor | None) -> None:
        """Add an entry of each active user to the counts and sums."""
        config, refused = self.decoder.config, self.decoder.refused
        added = torch.ones_like(self.entries) if active is None else active.long()
        self.entries = self.entries + added
        chosen = added[:, None].to(items.dtype)
        if refused is not None:
            is_feedback = (segments >= EXPOSED)[:, None] * chosen
            chosen = chosen - is_feedback
            means = refused.outputs(segments)
            decay = torch.stack([torch.exp(-fading * chosen) for _, fading in means])
            factors = torch.stack([factors for factors, _ in means])
            self.feedback = self.feedback * decay + items * factors * is_feedback
            self.feedback_weight = self.feedback_weight * decay + is_feedback
        self.chosen = self.chosen + chosen
        self.newest = torch.where(chosen > 0, items, self.newest)
        if config.history_in:
            self.sum = self.sum + items * chosen
        if config.history_out:
            decay = torch.exp(-self.decoder.forgetting.abs() * chosen)
            self.recent = self.recent * decay + items * chosen
            self.recent_weight = self.recent_weight * decay + chosen

    @torch.no_grad()
    def prefill(
        self,
        items: Tensor,
        user_vectors: Tensor,
        positions: Tensor,
        segments: Tensor,
        lengths: Tensor,
        features: Tensor | None = None,
    ) -> Tensor:
        """Feed the first entries of all sequences in one parallel pass.

        Args:
            items: [users, length, dim] item vectors, left-aligned; those after a sequence's end are ignored.
            user_vectors: [users, dim].
            positions, segments: [users, length] int64.
            lengths: [users] int64 number of entries, 0 to `length`.
            features: [features, users, length] int64; None: the model reads none.

        Returns:
            [users, dim] outputs at each sequence's newest entry, undefined for empty sequences.
        """
        assert not self.longest, "prefill comes before the first step"
        config, length = self.decoder.config, items.shape[1]
        assert length <= self.capacity, "more entries than the capacity"
        all_users, place = torch.arange(self.users, device=items.device), torch.arange(length, device=items.device)
        valid = place < lengths[:, None]
        newest = (lengths - 1).clamp(min=0)
        refused, chosen = self.decoder.refused, valid.to(items.dtype)
        if refused is not None:
            chosen = chosen * (segments < EXPOSED)
        counts = chosen.cumsum(1)
        mean = (items * chosen[..., None]).cumsum(1) / counts.clamp(min=1)[..., None] if config.history_in else None
        last = torch.where(chosen > 0, place, -1).cummax(1).values
        newest_choices = items[all_users[:, None], last.clamp(min=0)] * (last >= 0)[..., None]
        inputs = items if refused is None else refused.inputs(items, newest_choices, segments)
        x = self.decoder.embed(inputs, user_vectors[:, None], positions, segments, mean, features)
        for block, keys, values in zip(self.blocks, self.keys, self.values, strict=True):
            q, k, v = block.project(x)
            keys[:, :, :length], values[:, :, :length] = k, v
            if block is self.blocks[-1]:  # the last block computes the newest entry's output alone
                up_to_newest = (place <= newest[:, None])[:, None, None]
                attended = F.scaled_dot_product_attention(
                    q[all_users, :, newest][:, :, None], k, v, attn_mask=up_to_newest
                )
                x = block.finish(x[all_users, newest][:, None], attended)[:, 0]
            else:
                x = block.finish(x, F.scaled_dot_product_attention(q, k, v, is_causal=True))
        self.entries, self.longest, self.level = lengths.clone(), length, False
        self.chosen, self.newest = counts[:, -1:], newest_choices[:, -1]
        age = self.chosen - counts  # the number of choices after an entry
        if config.history_in:
            self.sum = (items * chosen[..., None]).sum(1)
        if config.history_out:
            weights = chosen * torch.exp(-self.decoder.forgetting.abs() * age)
            self.recent, self.recent_weight = (weights[:, None] @ items)[:, 0], weights.sum(1, keepdim=True)
        if refused is not None:
            is_feedback, sums = valid.to(items.dtype) - chosen, []
            for factors, fading in refused.outputs(segments):
                weights = is_feedback * torch.exp(-fading * age)
                sums.append(((weights[:, None] @ (items * factors))[:, 0], weights.sum(1, keepdim=True)))
            self.feedback, self.feedback_weight = (torch.stack(each) for each in zip(*sums, strict=True))
        return self._finish(x)
