"""Causal attention on a packed grid, and causal means of a history. The mask alone separates the sequences of a row."""

import torch
from torch import Tensor
from torch.nn import functional as F

from recgpt_torchrec.model.dropout import dropout


def attention_mask(sequence: Tensor) -> Tensor:
    """[rows, row_length] sequence numbers -> [rows, 1, row_length, row_length] bool: same sequence, not later.

    Empty slots (-1) attend to the empty slots before them, so that no row of the mask is all False.
    """
    same = sequence[:, :, None] == sequence[:, None, :]
    return torch.tril(same)[:, None]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout_p: float) -> Tensor:
    """Scaled dot-product attention: [rows, heads, row_length, head_dim] each -> the same; `mask` from `attention_mask`.

    With dropout on CPU torch falls back to a slower composition of operations; this computes the same in fewer passes.
    """
    if q.device.type != "cpu" or not dropout_p:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return dropout(weights, dropout_p, True) @ v


def history_weights(mask: Tensor, decay: Tensor | float) -> Tensor:
    """Mask [rows, 1, row_length, row_length] -> weights of a causal mean [rows, row_length, row_length]; they sum to 1.

    A token's weight is exp(-decay x age), its age counted in tokens; decay 0 gives the plain mean.
    """
    length = mask.shape[-1]
    slot = torch.arange(length, device=mask.device)
    age = (slot[:, None] - slot[None, :]).clamp(min=0)
    weights = mask[:, 0] * torch.exp(-decay * age)
    return weights / weights.sum(-1, keepdim=True)
