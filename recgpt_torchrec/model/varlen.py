"""Causal attention where sequences lie end to end, without a grid, and what it needs to know of the sequences.

On CUDA in half precision it is the flash kernel of `torch.nn.attention.varlen` (torch 2.11 or newer). That kernel reads
and writes only the slots between the first and the last entry of `cu_seqlens`: results and gradients of slots behind
them are whatever lay in memory, NaN included. So every slot belongs to a sequence here (`cover_slots`).

Elsewhere (CPU, float32, wide heads) it is a twin in plain operations, which is right everywhere and has fixed shapes.
The kernel has no dropout of attention weights, and so has the twin.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from recgpt_torchrec.model.attention import Weighting
from recgpt_torchrec.model.segmented import history_mean, weighted_mean

MAX_HEAD_DIM = 256
"""What torch's flash kernels take. They also want a multiple of 8, to which narrower heads are padded."""


def cover_slots(cu_seqlens: Tensor, slots: int, max_seqlen: int) -> Tensor:
    """Add sequences of at most `max_seqlen` slots for the slots behind the last one; empty ones where none are left.

    Args:
        cu_seqlens: [sequences + 1] int32, start of each sequence and end of the last; some may be empty.
        slots: number of slots in all.
        max_seqlen: maximum number of slots per sequence.

    Returns:
        [sequences + 1 + ceil(slots / max_seqlen)] int32 ending in `slots`; the size depends on no value on the device.
    """
    more = -(-slots // max_seqlen)
    steps = torch.arange(1, more + 1, device=cu_seqlens.device, dtype=cu_seqlens.dtype) * max_seqlen
    return torch.cat([cu_seqlens, (cu_seqlens[-1:] + steps).clamp(max=slots)])


def slot_position(cu_seqlens: Tensor, slots: int) -> Tensor:
    """[slots] int32: number of slots before each one in its sequence. `cu_seqlens` as from `cover_slots`."""
    slot = torch.arange(slots, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens[1:], slot, right=True)  # passes over empty sequences
    return slot - cu_seqlens[sequence]


def kernel_runs(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the flash kernel computes `varlen_attention` for tensors of this device, dtype and head dimension.

    The device is taken to have compute capability 8.0 or more, as those with bf16 have; torch says so of others.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    return device.type == "cuda" and torch.version.hip is None and half and head_dim <= MAX_HEAD_DIM


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Scaled dot-product attention of each token to the tokens of its sequence up to itself.

    Args:
        q, k, v: [tokens, heads, head_dim] of one dtype; any strides whose last is 1.
        cu_seqlens: [sequences + 1] int32 from 0 to `tokens`, see `cover_slots`; empty sequences are harmless.
        max_seqlen: maximum number of tokens per sequence, at least 1. A fixed number (`--model.max_len`) compiles once.

    Returns:
        [tokens, heads, head_dim] of the dtype of `q`.
    """
    head_dim = q.shape[-1]
    if not kernel_runs(q.device, q.dtype, head_dim):
        return attention_in_blocks(q, k, v, slot_position(cu_seqlens, len(q)), max_seqlen)
    from torch.nn.attention.varlen import varlen_attn

    fill = -head_dim % 8
    if fill:
        q, k, v = (F.pad(part, (0, fill)) for part in (q, k, v))
    out = varlen_attn(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=head_dim**-0.5, window_size=(-1, 0)
    )
    assert isinstance(out, Tensor)
    return out[..., :head_dim]


def attention_in_blocks(q: Tensor, k: Tensor, v: Tensor, position: Tensor, max_seqlen: int) -> Tensor:
    """The twin of the kernel, with memory for [tokens, 2 x max_seqlen]: a block of at least `max_seqlen` slots attends
    to itself and to the block before it, so to the whole of any sequence that ends in it.

    Args:
        q, k, v, max_seqlen: as in `varlen_attention`.
        position: [tokens] from `slot_position`.
    """
    tokens, heads, head_dim = q.shape
    block = max(max_seqlen, 16)
    fill = -tokens % block
    q, k, v = (F.pad(part, (0, 0, 0, 0, 0, fill)).view(-1, block, heads, head_dim) for part in (q, k, v))
    k, v = (F.pad(part, (0, 0, 0, 0, 0, 0, 1, 0)) for part in (k, v))
    k, v = (torch.cat([part[:-1], part[1:]], 1) for part in (k, v))
    slot = torch.arange(block, device=q.device)
    age = slot[:, None] + block - torch.arange(2 * block, device=q.device)
    place = F.pad(position, (0, fill)).view(-1, block, 1)
    mask = (age >= 0) & (place >= age)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
    return out.transpose(1, 2).reshape(-1, heads, head_dim)[:tokens]


class VarlenAttention:
    """Attention of sequences that lie end to end in one row, see `attention.Attention`; it has no dropout.

    Args:
        cu_seqlens: [sequences + 1] int32, start of each sequence and end of the last.
        slots: number of slots of the row.
        max_seqlen: maximum number of slots per sequence.
    """

    def __init__(self, cu_seqlens: Tensor, slots: int, max_seqlen: int) -> None:
        self.cu_seqlens, self.max_seqlen = cover_slots(cu_seqlens, slots, max_seqlen), max_seqlen
        self.position = slot_position(self.cu_seqlens, slots)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        """See `Attention`; [1, heads, slots, head_dim]."""
        if dropout_p:
            raise ValueError(f"varlen attention has no dropout of weights, and it is {dropout_p}")
        q, k, v = (part[0].transpose(0, 1) for part in (q, k, v))
        return varlen_attention(q, k, v, self.cu_seqlens, self.max_seqlen).transpose(0, 1)[None]

    def mean(self, values: Tensor, decay: Tensor | None = None, weighting: Weighting | None = None) -> Tensor:
        """See `Attention`; [1, slots, dim]."""
        if weighting is not None:
            return weighted_mean(values[0], self.position, decay, self.max_seqlen, weighting)[None]
        return history_mean(values[0], self.position, decay, self.max_seqlen)[None]
