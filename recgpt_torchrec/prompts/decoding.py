"""Decoding entry by entry: a key/value cache over a decoder's own parameters, for many users at once.

A user's state is the keys and values of each block, and the two sums behind the decoder's means of the history. Feeding
an entry costs attention over the entries before it, never a pass over the whole sequence. Knows nothing of items, files
or processes; plain [users, ...] tensors, not the packed grid.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from recgpt_torchrec.model.attention import history_weights
from recgpt_torchrec.model.decoder import Decoder


class Decoding:
    """The state of `users` sequences that grow side by side; every user may be at another number of entries.

    Example: feed one entry of each of three users, and score what follows::

        state = Decoding(decoder, users=3, capacity=50)
        outputs = state.step(table[items], user_vectors, positions, segments)  # [3, dim]
        scores = outputs @ table.t()

    Args:
        decoder: in evaluation mode.
        users: sequences.
        capacity: most entries of a sequence.
    """

    def __init__(self, decoder: Decoder, users: int, capacity: int) -> None:
        assert not decoder.training, "decoding is for a decoder in evaluation mode: dropout would change what is cached"
        config, weight = decoder.config, decoder.position.weight
        self.decoder, self.capacity = decoder, capacity
        self.blocks: list[Any] = list(decoder.blocks)
        # One slot more than a sequence takes: where an inactive user's entry is put, to be written over by the next.
        shape = (users, config.heads, capacity + 1, config.dim // config.heads)
        self.keys = [weight.new_zeros(shape) for _ in range(config.layers)]
        self.values = [weight.new_zeros(shape) for _ in range(config.layers)]
        self.entries = torch.zeros(users, dtype=torch.int64, device=weight.device)
        """[users] entries so far."""
        self.sum = weight.new_zeros(users, config.dim)
        """[users, dim] sum of the item vectors so far."""
        self.recent, self.recent_weight = weight.new_zeros(users, config.dim), weight.new_zeros(users, 1)
        """[users, dim] the same, forgetting at the decoder's rate; and the sum of the weights."""
        self.longest = 0
        """At least as many entries as any user has, known without asking the device."""
        self.level = True
        """Whether every user has exactly `longest` entries, so that no mask is needed."""

    @property
    def users(self) -> int:
        """Sequences that are still decoded."""
        return self.entries.shape[0]

    def keep(self, users: int) -> None:
        """Go on with the first `users` sequences only."""
        self.keys, self.values = [k[:users] for k in self.keys], [v[:users] for v in self.values]
        self.entries, self.sum = self.entries[:users], self.sum[:users]
        self.recent, self.recent_weight = self.recent[:users], self.recent_weight[:users]

    @torch.no_grad()
    def step(
        self, items: Tensor, user_vectors: Tensor, positions: Tensor, segments: Tensor, active: Tensor | None = None
    ) -> Tensor:
        """Feed one entry of each sequence.

        Args:
            items: [users, dim] item vectors of the entries.
            user_vectors: [users, dim].
            positions, segments: [users] int64.
            active: [users] bool: sequences that have an entry in this step; the others stay as they are. None: all.

        Returns:
            [users, dim] outputs; what follows an entry is scored by the inner product with item vectors. Those of
            inactive users mean nothing.
        """
        assert self.longest < self.capacity or not self.level or active is not None, "more entries than the capacity"
        config = self.decoder.config
        level = self.level and active is None
        self._remember(items, active)
        mean = (self.sum / self.entries.clamp(min=1)[:, None]) if config.history_in else None
        x = self.decoder.embed(items, user_vectors, positions, segments, mean)[:, None]
        # Where this entry goes: an inactive user's into its next free slot, which it still has not taken.
        slot = self.entries - 1 if active is None else torch.where(active, self.entries - 1, self.entries)
        slot = slot.clamp(max=self.capacity)
        self.level, self.longest = level, min(self.longest + 1, self.capacity + 1)
        mask = None
        if not level:
            mask = (torch.arange(self.longest, device=slot.device) <= slot[:, None])[:, None, None]
        everyone = torch.arange(self.users, device=slot.device)
        for block, keys, values in zip(self.blocks, self.keys, self.values, strict=True):
            q, k, v = block.project(x)
            if level:
                keys[:, :, self.longest - 1], values[:, :, self.longest - 1] = k[:, :, 0], v[:, :, 0]
            else:
                keys[everyone, :, slot], values[everyone, :, slot] = k[:, :, 0], v[:, :, 0]
            keys, values = keys[:, :, : self.longest], values[:, :, : self.longest]
            x = block.finish(x, F.scaled_dot_product_attention(q, keys, values, attn_mask=mask))
        x = x[:, 0]
        if config.history_out:
            x = x + self.decoder.mean_out * (self.recent / self.recent_weight.clamp(min=1e-30))
        return x

    def _remember(self, items: Tensor, active: Tensor | None) -> None:
        """Take an entry into the counts and sums."""
        config = self.decoder.config
        on = torch.ones_like(self.entries) if active is None else active.long()
        self.entries = self.entries + on
        if config.history_in:
            self.sum = self.sum + items * on[:, None]
        if config.history_out:
            kept = torch.exp(-self.decoder.forgetting.abs() * on)[:, None]
            self.recent = self.recent * kept + items * on[:, None]
            self.recent_weight = self.recent_weight * kept + on[:, None]

    @torch.no_grad()
    def prefill(
        self, items: Tensor, user_vectors: Tensor, positions: Tensor, segments: Tensor, lengths: Tensor
    ) -> Tensor:
        """Feed the first entries of all sequences in one parallel pass.

        Args:
            items: [users, length, dim] item vectors, sequences at the left; what follows a sequence's end is ignored.
            user_vectors: [users, dim].
            positions, segments: [users, length] int64.
            lengths: [users] int64 entries of each, 0 to `length`.

        Returns:
            [users, dim] outputs at each sequence's newest entry; those of sequences without any mean nothing.
        """
        assert not self.longest, "prefill comes before the first step"
        config, length = self.decoder.config, items.shape[1]
        assert length <= self.capacity, "more entries than the capacity"
        everyone, place = torch.arange(self.users, device=items.device), torch.arange(length, device=items.device)
        valid = place < lengths[:, None]
        newest = (lengths - 1).clamp(min=0)
        mask = (place[:, None] >= place)[None, None]
        mean = history_weights(mask, 0.0) @ items if config.history_in else None
        x = self.decoder.embed(items, user_vectors[:, None], positions, segments, mean)
        for block, keys, values in zip(self.blocks, self.keys, self.values, strict=True):
            q, k, v = block.project(x)
            keys[:, :, :length], values[:, :, :length] = k, v
            if block is self.blocks[-1]:  # of the last block only the newest entry's output is wanted
                up_to_newest = (place <= newest[:, None])[:, None, None]
                seen = F.scaled_dot_product_attention(q[everyone, :, newest][:, :, None], k, v, attn_mask=up_to_newest)
                x = block.finish(x[everyone, newest][:, None], seen)[:, 0]
            else:
                x = block.finish(x, F.scaled_dot_product_attention(q, k, v, is_causal=True))
        self.entries, self.longest, self.level = lengths.clone(), length, False
        if config.history_in:
            self.sum = (items * valid[..., None]).sum(1)
        if config.history_out:
            age = (newest[:, None] - place).clamp(min=0)
            weights = valid * torch.exp(-self.decoder.forgetting.abs() * age)
            self.recent, self.recent_weight = (weights[:, None] @ items)[:, 0], weights.sum(1, keepdim=True)
            x = x + self.decoder.mean_out * (self.recent / self.recent_weight.clamp(min=1e-30))
        return x
