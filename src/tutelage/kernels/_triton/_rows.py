"""The passes of a training step over rows, each of which reads its operands once or from cache."""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from ._parts import magnitude_bits, token_scale

__all__ = ["error_kernel", "error_sum_kernel", "sums_kernel", "uniform_kernel", "weight_kernel"]


@triton.jit
@no_type_check
def _starts(row, size1, size2, stride0, stride1, stride2):
    """Where rows of a tensor of up to four dimensions begin; the last dimension is left out."""
    row = row.to(tl.int64)
    rest = row // size2
    return row % size2 * stride2 + rest % size1 * stride1 + rest // size1 * stride0


@triton.jit
@no_type_check
def _rounded(x, scale):
    """round(x / scale), ties to even, float32: its own rounding where one unit is 1."""
    return (tl.div_rn(x, scale) + 12582912.0) - 12582912.0


@triton.jit
@no_type_check
def uniform_kernel(
    x,
    factor,
    codes,
    scale,
    R,
    size1,
    size2,
    x0,
    x1,
    x2,
    f0,
    f1,
    f2,
    K: tl.constexpr,
    LEVELS: tl.constexpr,
    SIGNED: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantizes ROWS rows of ``x * factor`` uniformly; codes lie row by row, float32 or int8."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    from_x = x + _starts(row, size1, size2, x0, x1, x2)[:, None]
    from_factor = factor + _starts(row, size1, size2, f0, f1, f2)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    inside = (row < R)[:, None]
    top = tl.zeros((ROWS, BLOCK), tl.int32)
    for start in range(0, K, BLOCK):
        k = start + lane
        value = tl.load(from_x + k, mask=inside & (k < K), other=0.0)
        if HAS_FACTOR:
            value = value * tl.load(from_factor + k, mask=inside & (k < K), other=0.0)
        if not SIGNED:
            value = tl.where(value < 0.0, 0.0, value)
        top = tl.maximum(top, magnitude_bits(value))
    own = token_scale(tl.max(top, axis=1), LEVELS)
    tl.store(scale + row, own, mask=row < R)
    wide = tl.broadcast_to(own[:, None], (ROWS, BLOCK))
    for start in range(0, K, BLOCK):
        k = start + lane
        value = tl.load(from_x + k, mask=inside & (k < K), other=0.0)
        if HAS_FACTOR:
            value = value * tl.load(from_factor + k, mask=inside & (k < K), other=0.0)
        code = _rounded(value, wide)
        if not SIGNED:
            code = tl.maximum(code, 0.0)
        code = tl.where(wide == wide, code, 0.0)
        to = codes + row.to(tl.int64)[:, None] * K + k
        tl.store(to, code.to(codes.dtype.element_ty), mask=inside & (k < K))


@triton.jit
@no_type_check
def weight_kernel(
    x,
    codes,
    scale,
    R,
    K: tl.constexpr,
    KIND: tl.constexpr,
    THRESHOLD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantizes ROWS rows of a weight: ternary (0), binary (1) or four levels (2); float64 sums."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = row.to(tl.int64)[:, None] * K
    lane = tl.arange(0, BLOCK)[None, :]
    inside = (row < R)[:, None]
    total = tl.zeros((ROWS,), tl.float64)
    for start in range(0, K, BLOCK):
        k = start + lane
        value = tl.load(x + at + k, mask=inside & (k < K), other=0.0)
        total += tl.sum(tl.abs(value).to(tl.float64), axis=1)
    mean = tl.div_rn(total.to(tl.float32), tl.full((ROWS,), K, tl.float32))
    least = tl.broadcast_to((mean * THRESHOLD)[:, None], (ROWS, BLOCK))
    kept = tl.zeros((ROWS,), tl.float64)
    above = tl.zeros((ROWS,), tl.int32)
    for start in range(0, K, BLOCK):
        k = start + lane
        mask = inside & (k < K)
        value = tl.load(x + at + k, mask=mask, other=0.0)
        size = tl.abs(value)
        outer = (size > least) & mask
        if KIND == 0:
            level = tl.where(outer, 1.0, 0.0)
            counted = tl.where(outer, size, 0.0)
        elif KIND == 1:
            level = tl.full((ROWS, BLOCK), 1.0, tl.float32)
            counted = size
        else:
            level = tl.where(outer, 3.0, 1.0)
            counted = size * level
        kept += tl.sum(counted.to(tl.float64), axis=1)
        above += tl.sum(outer.to(tl.int32), axis=1)
        code = tl.where(value < 0.0, 0.0 - level, level)
        tl.store(codes + at + k, code.to(codes.dtype.element_ty), mask=mask)
    if KIND == 1:
        best = mean
    else:
        squares = above if KIND == 0 else above * 8 + K
        best = tl.div_rn(kept.to(tl.float32), tl.maximum(squares, 1).to(tl.float32))
        best = tl.where(tl.abs(mean) < float("inf"), best, float("nan"))
    tl.store(scale + row, best, mask=row < R)


@triton.jit
@no_type_check
def sums_kernel(
    sums,
    row_scale,
    column_scale,
    bias,
    y,
    M,
    N,
    PER_ROW: tl.constexpr,
    PER_COLUMN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """((sums * row scale) * column scale) + bias of int32 sums, (M, N)."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (m < M)[:, None] & (n < N)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    value = tl.load(sums + at, mask=mask, other=0).to(tl.float32)
    if PER_ROW:
        value = value * tl.load(row_scale + m, mask=m < M, other=0.0)[:, None]
    else:
        value = value * tl.load(row_scale)
    if PER_COLUMN:
        value = value * tl.load(column_scale + n, mask=n < N, other=0.0)[None, :]
    else:
        value = value * tl.load(column_scale)
    if HAS_BIAS:
        value = value + tl.load(bias + n, mask=n < N, other=0.0)[None, :]
    tl.store(y + at, value, mask=mask)


@triton.jit
@no_type_check
def _differences(
    own, other, mask, row, k, R, size1, size2, m0, m1, m2, m3, K: tl.constexpr, MASKED: tl.constexpr
):
    """(own - other) * mask of some rows; the mask has the strides m0 to m3."""
    inside = (row < R)[:, None] & (k < K)
    at = row.to(tl.int64)[:, None] * K + k
    found = tl.load(own + at, mask=inside, other=0.0) - tl.load(other + at, mask=inside, other=0.0)
    if MASKED:
        start = _starts(row, size1, size2, m0, m1, m2)[:, None]
        found = found * tl.load(mask + start + k * m3, mask=inside, other=0.0)
    return found, at, inside


@triton.jit
@no_type_check
def error_sum_kernel(
    own,
    other,
    mask,
    out,
    R,
    size1,
    size2,
    m0,
    m1,
    m2,
    m3,
    K: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One sum of squared differences for every program, in float64."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((ROWS,), tl.float64)
    for start in range(0, K, BLOCK):
        found, _, _ = _differences(
            own, other, mask, row, start + lane, R, size1, size2, m0, m1, m2, m3, K, MASKED
        )
        total += tl.sum((found * found).to(tl.float64), axis=1)
    tl.store(out + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
@no_type_check
def error_kernel(
    own,
    other,
    mask,
    gain,
    out,
    R,
    size1,
    size2,
    m0,
    m1,
    m2,
    m3,
    K: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """((own - other) * mask) * gain."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK)[None, :]
    factor = tl.load(gain)
    for start in range(0, K, BLOCK):
        found, at, inside = _differences(
            own, other, mask, row, start + lane, R, size1, size2, m0, m1, m2, m3, K, MASKED
        )
        tl.store(out + at, found * factor, mask=inside)
