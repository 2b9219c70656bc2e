"""The softmax loss of `model.loss` for CUDA, in Triton kernels that never write the logits to memory.

The forward is flash attention with the candidates as keys and values: log of the norm and gradient of h in one pass
over pairs of blocks. The backward computes the probabilities anew for the gradient of the candidates. Neither uses
atomics: where there are fewer blocks of rows than processors, the columns are split, and the parts are added in a fixed
order. The same tensors give the same bits on the same kind of device.

**What it costs** (estimates for an H100: 990 TFLOP/s dense bf16, 3.35 TB/s of memory, about 5.5 TB/s of L2 cache; none
measured yet). One unit is a product of 2 x targets x candidates x dim FLOP. With 32,768 targets and candidates there
are 1.07e9 logits, and a unit is .137 TFLOP or .14 ms at dim 64, 1.10 TFLOP or 1.11 ms at dim 512.

- These kernels: 4 units (scores, sum of candidates; scores again, sum of outputs), not the 5 of a backward that
  recomputes for both gradients: .56 and 4.4 ms at the peak, 1.0 and 8.0 at the 55% that Triton's attention reaches. Per
  logit and pass an exponential (16 a cycle and processor) and about 8 other operations (128 a cycle): .27 + .27 ps, so
  1.1 ms for two passes if nothing overlaps. Memory: vectors, sums and gradients, 75 MB at dim 64 and 600 MB at dim
  512, at most .2 ms. L2: each block of rows reads all columns, 1.1 GB a pass at dim 64 (128 rows), 17 GB at dim 512 (64
  rows): .2 and 3.1 ms. Together about 2.1 ms at dim 64 and 9 ms at dim 512.
- Chunks of bf16 logits, `model.loss`: 3 units, .42 and 3.3 ms at the peak, .6 and 4.7 at 70%. Logits are written by the
  first product, read and written by the exponential, read by two products: 10 bytes, 10.7 GB, 3.2 ms, unless a chunk
  stays in L2. The products hide their part of it at dim 512 (6.0 ms in all), not at dim 64 (3.2 ms).

So this pays where dim is small, and where logits in chunks would not fit. `prefers_fused` is this arithmetic. float32
without TF32 runs outside the tensor cores, at less than 67 TFLOP/s: to compare with, not to train with.
"""

from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_DIM = 512
"""64 sums of this many float32 fill half of a processor's registers."""
JOIN_ROWS = 16
"""Targets per program of the kernel that joins the parts."""


class Tiles(NamedTuple):
    """What a program works on: a block of `rows` vectors stays, blocks of `columns` vectors pass by.

    Shared memory holds rows x width elements for the block that stays, columns x width per stage of the others. KB by
    width, in bf16: 64: 16 + 3 x 8; 128: 32 + 3 x 16; 256: 64 + 2 x 32; 512: 64 + 2 x 64. In TF32: 64: 32 + 2 x 16;
    128: 32 + 2 x 32; 256: 64 + 2 x 32; 512: 64 + 2 x 32. Triton 3.7.1 reports 42, 82, 129, 193 and 65, 97, 129, 129
    for an H100 (227 usable), at most 137 for an A100 (163), where a stage less is held. Sums and scores, rows x (width
    + columns) float32, take 64 to 160 of a thread's 255 registers; ptxas spills at most 108 bytes a thread. Outside the
    tensor cores (ieee) blocks of that size spill kilobytes, so they are smaller.
    """

    width: int
    """dim rounded up to a power of two, at least 16."""
    rows: int
    columns: int
    warps: int
    stages: int


TILES = {
    "half": {64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (128, 64, 8, 2), 512: (64, 64, 8, 2)},
    "tf32": {64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2), 512: (32, 16, 8, 2)},
    "ieee": {64: (64, 32, 8, 2), 128: (32, 16, 8, 2), 256: (32, 16, 8, 2), 512: (16, 16, 8, 2)},
}
"""Rows, columns, warps and stages by what multiplies and by width; narrower vectors take those of 64."""


def tiles(dim: int, itemsize: int, precision: str = "tf32") -> Tiles:
    """Sizes of the blocks for vectors of `dim` elements of `itemsize` bytes; `precision` as in `fused_softmax_loss`."""
    width = max(16, 1 << (dim - 1).bit_length())
    return Tiles(width, *TILES["half" if itemsize == 2 else precision][max(width, 64)])


def shared_bytes(dim: int, itemsize: int, precision: str = "tf32") -> int:
    """Upper bound of the shared memory of a program, in bytes; arguments as of `tiles`."""
    width, rows, columns, _, stages = tiles(dim, itemsize, precision)
    return (rows + stages * columns) * width * itemsize + 2048


@lru_cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 1 for Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _split(row_blocks: int, columns: int, step: int, device: torch.device) -> tuple[int, int]:
    """(splits, columns per split): about two programs per processor; a split has a multiple of `step` columns."""
    blocks = -(-columns // step)
    splits = max(1, min(blocks, 2 * processors(device) // max(row_blocks, 1)))
    per_split = max(1, -(-blocks // splits)) * step
    return max(1, -(-columns // per_split)), per_split


@torch.library.custom_op("recgpt::fused_softmax", mutates_args=())
def _forward(
    h: Tensor,
    positive: Tensor,
    candidates: Tensor,
    log_q: Tensor,
    target_index: Tensor,
    weight: Tensor,
    precision: str,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss [], gradient of h [targets, dim] (no rows without `gradient`), error and log2 of the norm [targets]."""
    from recgpt_torchrec.model.losses import fused_loss_kernels as kernels

    (targets, dim), count = h.shape, len(candidates)
    width, rows, columns, warps, stages = tiles(dim, h.itemsize, precision)
    row_blocks = -(-targets // rows)
    splits, per_split = _split(row_blocks, count, columns, h.device)
    sums = h.new_empty(splits if gradient else 0, targets, dim, dtype=torch.float32)
    tops, norms = h.new_empty(2, splits, targets, dtype=torch.float32)
    loss, error, log_norm = (h.new_empty(targets, dtype=torch.float32) for _ in range(3))
    grad_h = h.new_empty(targets if gradient else 0, dim)
    if targets:
        with torch.cuda.device_of(h):
            kernels.attend[(row_blocks, splits)](
                h, candidates, log_q, target_index, sums, tops, norms, targets, count, dim, per_split,
                ROWS=rows, COLUMNS=columns, DIM=width, PRECISION=precision, GRADIENT=gradient,
                num_warps=warps, num_stages=stages,
            )  # fmt: skip
            kernels.join[(-(-targets // JOIN_ROWS),)](
                h, positive, weight, sums, tops, norms, loss, error, log_norm, grad_h, targets, dim, splits,
                ROWS=JOIN_ROWS, DIM=width, GRADIENT=gradient,
            )  # fmt: skip
    return loss.sum(), grad_h, error, log_norm


@_forward.register_fake
def _(
    h: Tensor,
    positive: Tensor,
    candidates: Tensor,
    log_q: Tensor,
    target_index: Tensor,
    weight: Tensor,
    precision: str,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    targets, dim = h.shape
    per_target = h.new_empty(targets, dtype=torch.float32)
    grad_h = h.new_empty(targets if gradient else 0, dim)
    return h.new_empty((), dtype=torch.float32), grad_h, per_target, torch.empty_like(per_target)


@torch.library.custom_op("recgpt::fused_softmax_candidates", mutates_args=())
def _candidates_gradient(
    h: Tensor,
    candidates: Tensor,
    log_q: Tensor,
    target_index: Tensor,
    weight: Tensor,
    log_norm: Tensor,
    precision: str,
) -> Tensor:
    """Gradient of the candidates, [candidates, dim] float32."""
    from recgpt_torchrec.model.losses import fused_loss_kernels as kernels

    (targets, dim), count = h.shape, len(candidates)
    width, rows, columns, warps, stages = tiles(dim, h.itemsize, precision)
    row_blocks = -(-count // rows)
    splits, per_split = _split(row_blocks, targets, columns, h.device)
    sums = h.new_empty(splits, count, dim, dtype=torch.float32)
    if count:
        with torch.cuda.device_of(h):
            kernels.gather[(row_blocks, splits)](
                h, candidates, log_q, target_index, weight, log_norm, sums, targets, count, dim, per_split,
                ROWS=rows, COLUMNS=columns, DIM=width, PRECISION=precision, num_warps=warps, num_stages=stages,
            )  # fmt: skip
    return sums[0] if splits == 1 else sums.sum(0)


@_candidates_gradient.register_fake
def _(
    h: Tensor,
    candidates: Tensor,
    log_q: Tensor,
    target_index: Tensor,
    weight: Tensor,
    log_norm: Tensor,
    precision: str,
) -> Tensor:
    return candidates.new_empty(candidates.shape, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h, _, candidates, log_q, target_index, weight, precision, _ = inputs
    ctx.save_for_backward(h, candidates, log_q, target_index, weight, *output[1:])
    ctx.precision = precision
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    h, candidates, log_q, target_index, weight, grad_h, error, log_norm = ctx.saved_tensors
    grad_candidates = _candidates_gradient(h, candidates, log_q, target_index, weight, log_norm, ctx.precision)
    grad_positive = ((error * grad)[:, None] * h).to(h.dtype)
    return grad_h * grad, grad_positive, (grad_candidates * grad).to(candidates.dtype), *(None,) * 5


_forward.register_autograd(_backward, setup_context=_save)


def fused_softmax_loss(
    h: Tensor,
    positive: Tensor,
    candidates: Tensor,
    log_q: Tensor,
    target_index: Tensor,
    target_weight: Tensor | None = None,
    precision: str = "ieee",
) -> Tensor:
    """Sum over targets of the (sampled) softmax loss, as `model.loss.softmax_loss`.

    Args:
        h: [targets, dim] bfloat16, float16 or float32 outputs of the tokens that predict them; dim at most 512.
        positive: [targets, dim] vectors of the targets; cast to the dtype of `h`.
        candidates: [candidates, dim] vectors; cast to the dtype of `h`.
        log_q: [candidates] log of each candidate's expected count; +inf for one that does not count (padding).
        target_index: [targets] int64 index of each target among the candidates, -1 where it is not one.
        target_weight: [targets] float32 factors of the losses, or None for ones. Targets of weight 0 add nothing; their
            vectors must be finite.
        precision: "ieee" or "tf32", of products of float32; sums are float32 whatever the dtype.

    Returns:
        [] float32.

    Raises:
        ValueError: if dim is above 512.
    """
    if h.shape[1] > MAX_DIM:
        raise ValueError(f"the fused loss takes dim up to {MAX_DIM}, not {h.shape[1]}")
    weight = h.new_ones(len(h), dtype=torch.float32) if target_weight is None else target_weight.float()
    h, positive, candidates = h.contiguous(), positive.to(h.dtype).contiguous(), candidates.to(h.dtype).contiguous()
    gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (h, positive, candidates))
    loss, *_ = _forward(
        h, positive, candidates, log_q.float().contiguous(), target_index.contiguous(), weight.contiguous(), precision,
        gradient,
    )  # fmt: skip
    return loss


def picoseconds_per_logit(dim: int, candidates: int, chunk: int, itemsize: int = 2) -> tuple[float, float]:
    """(fused, in chunks of `chunk` targets): time per logit on an H100, the module docstring's estimate.

    `itemsize` is that of vectors and logits: 2 for bf16, 4 for TF32, which has half the tensor cores' rate.
    """
    width, rows, *_ = tiles(dim, itemsize)
    fused = 2 * max(4 * width * itemsize / 1100 + 0.5, itemsize * width / rows / 5.5)
    bandwidth = 5.5 if chunk * candidates * itemsize < 25e6 else 3.35  # half of the L2 cache
    launches = 8 * 4e6 / (chunk * max(candidates, 1))  # eight kernels of 4 us each
    products = 3 * max(2 * dim * itemsize / 1400, itemsize / bandwidth)
    return fused, products + 2 * itemsize / bandwidth + launches


def prefers_fused(dim: int, candidates: int, device: torch.device, precision: str = "bf16", chunk: int = 4096) -> bool:
    """Whether `auto` takes the fused loss: Triton is there, the device has the tensor cores and the shared memory, and
    the estimate is below that of the loss in chunks of `chunk` targets. To be asked once, outside of compiled code.

    Args:
        dim: of the vectors.
        candidates: number of candidates, or of items where all are.
        device: of the training.
        precision: "bf16", "tf32" or "fp32", of products.
        chunk: targets scored at once by `model.loss` on CUDA.
    """
    if device.type != "cuda" or torch.version.hip is not None or find_spec("triton") is None:
        return False
    if dim > MAX_DIM or precision == "fp32":
        return False
    itemsize = 2 if precision == "bf16" else 4
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 48 * 1024)  # torch's stubs lack it
    if properties.major < 8 or shared < shared_bytes(dim, itemsize):
        return False
    fused, chunked = picoseconds_per_logit(dim, candidates, chunk, itemsize)
    return fused < chunked
