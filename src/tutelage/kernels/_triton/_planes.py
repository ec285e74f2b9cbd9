"""Activations as the products read them: one plane for every field of a byte of weights."""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from ._parts import magnitude_bits, round_to_codes, token_scale

__all__ = ["quantize_kernel", "spread_kernel"]


@triton.jit
@no_type_check
def quantize_kernel(
    x,
    planes,
    scales,
    sums,
    K: tl.constexpr,
    PLANE: tl.constexpr,
    LEVELS: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantizes one token, (K) float, to (FIELDS, PLANE) int8 with its scale and sum of codes.

    Code k goes to place k // FIELDS of plane k % FIELDS; what is beyond K is zero.
    """
    row = tl.program_id(0).to(tl.int64)
    x += row * K
    planes += row * FIELDS * PLANE
    place = tl.arange(0, BLOCK)
    lane = tl.arange(0, FIELDS)
    inner = place[:, None] * FIELDS + lane[None, :]
    top = tl.zeros((BLOCK, FIELDS), tl.int32)
    for start in range(0, PLANE, BLOCK):
        k = start * FIELDS + inner
        value = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        top = tl.maximum(top, magnitude_bits(value))
    scale = token_scale(tl.max(tl.max(top, axis=1), axis=0), LEVELS)
    total = tl.zeros((BLOCK, FIELDS), tl.int32)
    for start in range(0, PLANE, BLOCK):
        k = start * FIELDS + inner
        value = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        code = round_to_codes(value, tl.broadcast_to(scale, (BLOCK, FIELDS)))
        total += code
        at = lane[:, None] * PLANE + (start + place)[None, :]
        tl.store(planes + at, tl.trans(code.to(tl.int8)), mask=(start + place < PLANE)[None, :])
    tl.store(scales + row, scale)
    tl.store(sums + row, tl.sum(tl.sum(total, axis=1), axis=0))


@triton.jit
@no_type_check
def spread_kernel(
    x,
    planes,
    K: tl.constexpr,
    PLANE: tl.constexpr,
    FIELDS: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Spreads a block of one token, (K) float, over (TERMS, FIELDS, PLANE) of its 16-bit dtype.

    With three terms a float32 token becomes the sum of three bfloat16 ones, exactly.
    """
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, FIELDS)
    k = place[:, None] * FIELDS + lane[None, :]
    value = tl.load(x + row * K + k, mask=k < K, other=0.0)
    at = lane[:, None] * PLANE + place[None, :]
    for term in tl.static_range(TERMS):
        part = value.to(planes.dtype.element_ty)
        to = planes + (row * TERMS + term) * FIELDS * PLANE
        tl.store(to + at, tl.trans(part), mask=(place < PLANE)[None, :])
        if TERMS > 1:
            value = value - part.to(tl.float32)
