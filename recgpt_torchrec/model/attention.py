"""Causal attention on a packed grid, and the causal means of a history: where one sequence ends, only masks know."""

import torch
from torch import Tensor
from torch.nn import functional as F

from recgpt_torchrec.model.dropout import dropout


def attention_mask(sequence: Tensor) -> Tensor:
    """[rows, row_length] sequence numbers -> [rows, 1, row_length, row_length] bool: same sequence, not later.

    Empty slots (-1) see the empty slots before them, so that no row of the mask is all False.
    """
    same = sequence[:, :, None] == sequence[:, None, :]
    return torch.tril(same)[:, None]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropped: float) -> Tensor:
    """Scaled dot-product attention, [rows, heads, row_length, head_dim] each; `mask` as of `attention_mask`.

    On CPU torch's own falls back to a slower composition as soon as weights are dropped; this is the same in fewer
    passes.
    """
    if q.device.type != "cpu" or not dropped:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropped)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return dropout(weights, dropped, True) @ v


def history_weights(mask: Tensor, decay: Tensor | float) -> Tensor:
    """[rows, 1, row_length, row_length] bool -> [rows, row_length, row_length] weights of a causal mean, rows sum to 1.

    The weight of an entry falls with its age by exp(-decay) an entry; 0 is the plain mean.
    """
    length = mask.shape[-1]
    place = torch.arange(length, device=mask.device)
    age = (place[:, None] - place[None, :]).clamp(min=0)
    weights = mask[:, 0] * torch.exp(-decay * age)
    return weights / weights.sum(-1, keepdim=True)
