"""Triton kernels of the fused softmax loss; imported only where they run, since Triton may be absent.

`attend` and `gather` hold one block of vectors and stream another past it, as flash attention does: scores exist for
one pair of blocks, in registers. `join` puts the parts of `attend` together. Scores, maxima and norms are in base 2:
exp(x) = exp2(x log2 e), which the hardware has. No sum crosses programs, so their order changes nothing.
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LOWEST: tl.constexpr = tl.constexpr(-1e30)
"""A maximum to start from that is finite: differences of infinities are NaN."""


@triton.jit
def attend(
    h, candidates, log_q, target_index,  # inputs, as in `fused_softmax_loss`
    sums, tops, norms,  # outputs: [splits, targets, dim], [splits, targets], [splits, targets], all float32
    targets, count, dim, per_split,  # sizes; candidates per split, a multiple of COLUMNS
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """For a block of targets and a part of the candidates: maximum of the scores `tops`, sum of exp2(score - maximum)
    `norms` and, with GRADIENT, sum of the candidates with these weights."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    place = tl.arange(0, DIM)
    row_ok = row < targets
    tile_ok = row_ok[:, None] & (place < dim)[None, :]
    x = tl.load(h + row.to(tl.int64)[:, None] * dim + place[None, :], mask=tile_ok, other=0.0)
    own = tl.load(target_index + row, mask=row_ok, other=-1).to(tl.int32)
    top = tl.full((ROWS,), LOWEST, tl.float32)
    norm = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, DIM), tl.float32)
    begin = split * per_split
    for start in range(begin, min(begin + per_split, count), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        column_ok = column < count
        v_tile = column.to(tl.int64)[:, None] * dim + place[None, :]
        v = tl.load(candidates + v_tile, mask=column_ok[:, None] & (place < dim)[None, :], other=0.0)
        shift = tl.load(log_q + column, mask=column_ok, other=float("inf")) * LOG2_E
        s = tl.dot(x, tl.trans(v), input_precision=PRECISION) * LOG2_E - shift[None, :]
        s = tl.where(own[:, None] == column[None, :], float("-inf"), s)
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        scale = tl.exp2(top - new_top)
        norm = norm * scale + tl.sum(p, 1)
        if GRADIENT:
            total = tl.dot(p.to(v.dtype), v, total * scale[:, None], input_precision=PRECISION)
        top = new_top
    part = split * targets + row
    tl.store(tops + part, top, mask=row_ok)
    tl.store(norms + part, norm, mask=row_ok)
    if GRADIENT:
        tl.store(sums + part.to(tl.int64)[:, None] * dim + place[None, :], total, mask=tile_ok)


@triton.jit
def join(
    h, positive, weight, sums, tops, norms,  # inputs: the loss's, and the outputs of `attend`
    loss, error, log_norm, grad_h,  # outputs: [targets] float32 three times, [targets, dim]
    targets, dim, splits,
    ROWS: tl.constexpr, DIM: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Add the parts of `attend` to the target's own score: weighted losses, weighted errors (probability of the target
    less 1), log2 of the norms and, with GRADIENT, the gradients of the outputs h."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = tl.arange(0, DIM)
    row_ok = row < targets
    tile_ok = row_ok[:, None] & (place < dim)[None, :]
    tile = row.to(tl.int64)[:, None] * dim + place[None, :]
    w = tl.load(weight + row, mask=row_ok, other=0.0)
    x = tl.load(h + tile, mask=tile_ok, other=0.0).to(tl.float32)
    y = tl.load(positive + tile, mask=tile_ok, other=0.0).to(tl.float32)
    score = tl.sum(x * y, 1) * LOG2_E
    top = score
    norm = tl.full((ROWS,), 1.0, tl.float32)
    total = y
    for split in range(0, splits):
        part = split * targets + row
        part_top = tl.load(tops + part, mask=row_ok, other=LOWEST)
        new_top = tl.maximum(top, part_top)
        before, now = tl.exp2(top - new_top), tl.exp2(part_top - new_top)
        norm = norm * before + tl.load(norms + part, mask=row_ok, other=0.0) * now
        if GRADIENT:
            part_tile = part.to(tl.int64)[:, None] * dim + place[None, :]
            total = total * before[:, None] + tl.load(sums + part_tile, mask=tile_ok, other=0.0) * now[:, None]
        top = new_top
    log2_norm = top + tl.log2(norm)
    tl.store(log_norm + row, log2_norm, mask=row_ok)
    tl.store(loss + row, tl.where(w != 0.0, (log2_norm - score) / LOG2_E * w, 0.0), mask=row_ok)
    tl.store(error + row, tl.where(w != 0.0, (tl.exp2(score - log2_norm) - 1.0) * w, 0.0), mask=row_ok)
    if GRADIENT:
        gradient = tl.where((w != 0.0)[:, None], (total / norm[:, None] - y) * w[:, None], 0.0)
        tl.store(grad_h + tile, gradient.to(grad_h.dtype.element_ty), mask=tile_ok)


@triton.jit
def gather(
    h, candidates, log_q, target_index, weight, log_norm,  # inputs: the loss's, and log2 of the norms
    sums,  # output: [splits, candidates, dim] float32
    targets, count, dim, per_split,  # sizes; targets per split, a multiple of COLUMNS
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For a block of candidates and a part of the targets: sum of the outputs h, weighted by the candidate's
    probabilities (computed anew) and the targets' weights."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    place = tl.arange(0, DIM)
    row_ok = row < count
    tile_ok = row_ok[:, None] & (place < dim)[None, :]
    v = tl.load(candidates + row.to(tl.int64)[:, None] * dim + place[None, :], mask=tile_ok, other=0.0)
    shift = tl.load(log_q + row, mask=row_ok, other=float("inf")) * LOG2_E
    total = tl.zeros((ROWS, DIM), tl.float32)
    begin = split * per_split
    for start in range(begin, min(begin + per_split, targets), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        column_ok = column < targets
        x_tile = column.to(tl.int64)[:, None] * dim + place[None, :]
        x = tl.load(h + x_tile, mask=column_ok[:, None] & (place < dim)[None, :], other=0.0)
        own = tl.load(target_index + column, mask=column_ok, other=-1).to(tl.int32)
        norm = tl.load(log_norm + column, mask=column_ok, other=float("inf"))
        w = tl.load(weight + column, mask=column_ok, other=0.0)
        s = tl.dot(v, tl.trans(x), input_precision=PRECISION) * LOG2_E - shift[:, None] - norm[None, :]
        s = tl.where(own[None, :] == row[:, None], float("-inf"), s)
        p = tl.exp2(s) * w[None, :]
        total = tl.dot(p.to(x.dtype), x, total, input_precision=PRECISION)
    part = split * count + row
    tl.store(sums + part.to(tl.int64)[:, None] * dim + place[None, :], total, mask=tile_ok)
