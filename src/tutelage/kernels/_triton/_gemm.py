"""Tiled product of planes of activations with packed weights, on tensor cores."""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from ._parts import field, float_code

__all__ = ["gemm_kernel"]


@triton.jit
@no_type_check
def _plane_tile(at, k, start, PLANE: tl.constexpr, BLOCK_K: tl.constexpr):
    if PLANE % BLOCK_K == 0:
        return tl.load(at)
    return tl.load(at, mask=(k < PLANE - start)[:, None], other=0)


@triton.jit
@no_type_check
def gemm_kernel(
    planes,
    scales,
    sums,
    weight,
    weight_scale,
    bias,
    y,
    M,
    N,
    WIDTH: tl.constexpr,
    PLANE: tl.constexpr,
    BUCKET: tl.constexpr,
    BITS: tl.constexpr,
    LO: tl.constexpr,
    STEP: tl.constexpr,
    TERMS: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Computes a tile (BLOCK_N outputs, BLOCK_M tokens) and stores it transposed.

    Outputs are the rows of the product: a handful of tokens then fills its narrow side. Every
    field of the bytes has its own plane of activations, so that no codes are ever interleaved.
    With ``TERMS`` 0 the planes are int8 codes, the sum is in int32 and gets the weights' zero
    point from ``sums``; otherwise the planes are 16-bit floats and the sum is in float32.
    """
    FIELDS: tl.constexpr = 8 // BITS
    PARTS: tl.constexpr = TERMS if TERMS else 1
    BF16: tl.constexpr = planes.dtype.element_ty == tl.bfloat16
    tile = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    first = tile // (GROUP * tiles_n) * GROUP
    group = tl.minimum(tiles_m - first, GROUP)
    tile_m = first + tile % (GROUP * tiles_n) % group
    tile_n = tile % (GROUP * tiles_n) // group

    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    # What is beyond the end reads the last row again and is not stored.
    rows = weight + tl.minimum(n, N - 1).to(tl.int64)[:, None] * WIDTH + k[None, :]
    columns = (
        planes + tl.minimum(m, M - 1).to(tl.int64)[None, :] * (PARTS * FIELDS * PLANE) + k[:, None]
    )
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32 if TERMS else tl.int32)
    for start in range(0, WIDTH, BLOCK_K):
        if WIDTH % BLOCK_K == 0:
            byte = tl.load(rows)
        else:
            byte = tl.load(rows, mask=(k < WIDTH - start)[None, :], other=0)
        for j in tl.static_range(FIELDS):
            if TERMS:
                code = float_code(byte, j, BITS, LO, STEP, BF16, INTERPRETED)
                for term in tl.static_range(TERMS):
                    x = _plane_tile(columns + (term * FIELDS + j) * PLANE, k, start, PLANE, BLOCK_K)
                    acc = tl.dot(code, x.to(code.dtype), acc)
            else:
                x = _plane_tile(columns + j * PLANE, k, start, PLANE, BLOCK_K)
                acc = tl.dot(field(byte, j, BITS, INTERPRETED), x, acc, out_dtype=tl.int32)
        rows += BLOCK_K
        columns += BLOCK_K

    if TERMS:
        value = acc
    else:
        total = acc * STEP + (tl.load(sums + m, mask=m < M, other=0) * LO)[None, :]
        value = total.to(tl.float32) * tl.load(scales + m, mask=m < M, other=0.0)[None, :]
    if ROW_SCALE:
        value = value * tl.load(weight_scale + n, mask=n < N, other=0.0)[:, None]
    else:
        value = value * tl.load(weight_scale)
    if HAS_BIAS:
        value = value + tl.load(bias + n, mask=n < N, other=0.0)[:, None]
    to = y + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(to, tl.trans(value), mask=(m < M)[:, None] & (n < N)[None, :])
