"""The causal decoder, on a packed grid: only the attention mask knows where one sequence ends and the next begins."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recgpt_torchrec.config import Model
from recgpt_torchrec.model.dropout import dropout


def attention_mask(sequence: Tensor) -> Tensor:
    """[rows, row_length] sequence numbers -> [rows, 1, row_length, row_length] bool: same sequence, not later.

    Empty slots (-1) see the empty slots before them, so that no row of the mask is all False.
    """
    same = sequence[:, :, None] == sequence[:, None, :]
    return torch.tril(same)[:, None]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropped: float) -> Tensor:
    """Scaled dot-product attention, [rows, heads, row_length, head_dim] each; `mask` as of `attention_mask`.

    On CPU torch's own falls back to a slower composition as soon as weights are dropped; this is the same in fewer passes.
    """
    if q.device.type != "cpu" or not dropped:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropped)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return dropout(weights, dropped, True) @ v


class Block(nn.Module):
    """One decoder block: causal self-attention and a feed-forward layer, each with dropout and a residual."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        dim = config.dim
        self.heads, self.dropout, self.attention_dropout = config.heads, config.dropout, config.attention_dropout
        self.norm_attention, self.norm_feed = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, config.feed_forward * dim), nn.Linear(config.feed_forward * dim, dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[rows, row_length, dim] -> the same; `mask` as of `attention_mask`."""
        rows, length, dim = x.shape
        q, k, v = self.qkv(self.norm_attention(x)).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = attention(q, k, v, mask, self.attention_dropout if self.training else 0.0)
        x = x + dropout(self.out(seen.transpose(1, 2).reshape(rows, length, dim)), self.dropout, self.training)
        return x + dropout(self.down(F.gelu(self.up(self.norm_feed(x)))), self.dropout, self.training)


class Decoder(nn.Module):
    """h0 = item + user + position (+ segment), N causal blocks (paper, equations 1 and 2)."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.config = config
        self.position = nn.Embedding(config.max_len, config.dim)
        self.norm_in, self.norm_out = nn.LayerNorm(config.dim, eps=1e-6), nn.LayerNorm(config.dim, eps=1e-6)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.apply(self._init)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(self, items: Tensor, users: Tensor, position: Tensor, segment: Tensor, sequence: Tensor) -> Tensor:
        """Run the decoder.

        Args:
            items: [rows, row_length, dim] item vectors of the slots.
            users: [rows, row_length, dim] user vectors, already regularised.
            position, segment, sequence: [rows, row_length] int64, as in `SequenceBatch`.

        Returns:
            [rows, row_length, dim] outputs; what follows an entry is scored by the inner product with item vectors.
        """
        x = items + users + self.position(position)
        x = dropout(self.norm_in(x), self.config.dropout, self.training)
        mask = attention_mask(sequence)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm_out(x)
