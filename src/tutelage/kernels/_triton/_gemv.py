"""One token times packed weights: bound by the bytes of the weight, all in one launch."""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from ._parts import dot4, magnitude_bits, round_to_codes, token_scale, word_field

__all__ = ["gemv_kernel"]


@triton.jit
@no_type_check
def _words_of(code, FIELDS: tl.constexpr):
    """Packs codes (words, 4 bytes * FIELDS) to (words, FIELDS) words of four int8."""
    code = tl.reshape(code & 0xFF, (code.shape[0], 4, FIELDS))
    shift = tl.arange(0, 4) * 8
    return tl.sum(code << shift[None, :, None], axis=1)


@triton.jit
@no_type_check
def _add_field(word, x, acc, J: tl.constexpr, BITS: tl.constexpr, INTERPRETED: tl.constexpr):
    wide = tl.broadcast_to(x[None, :], word.shape)
    return dot4(word_field(word, J, BITS), wide, acc, INTERPRETED)


@triton.jit
@no_type_check
def _add_four(
    word, x, acc, J: tl.constexpr, SKIP: tl.constexpr, BITS: tl.constexpr, INTERPRETED: tl.constexpr
):
    """Adds the fields J, J + SKIP, ... of four; x is (words, 2, 2), the second index the finer."""
    even, odd = tl.split(x)
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    acc = _add_field(word, x0, acc, J, BITS, INTERPRETED)
    acc = _add_field(word, x1, acc, J + SKIP, BITS, INTERPRETED)
    acc = _add_field(word, x2, acc, J + 2 * SKIP, BITS, INTERPRETED)
    return _add_field(word, x3, acc, J + 3 * SKIP, BITS, INTERPRETED)


@triton.jit
@no_type_check
def _quantized_words(token, start, scale, FIELDS: tl.constexpr, WORDS: tl.constexpr):
    """Quantizes a block of the token; returns its words and the sum of its codes."""
    BLOCK_W: tl.constexpr = token.shape[0]
    inside = tl.arange(0, BLOCK_W) < WORDS - start
    value = tl.load(token + start * 4 * FIELDS, mask=inside[:, None], other=0.0).to(tl.float32)
    code = round_to_codes(value, tl.broadcast_to(scale, value.shape))
    packed = _words_of(code, FIELDS)
    if FIELDS == 4:
        packed = tl.reshape(packed, (BLOCK_W, 2, 2))
    else:
        packed = tl.reshape(packed, (BLOCK_W, 2, 2, 2))
    return packed, tl.sum(tl.sum(code, axis=1), axis=0)


@triton.jit
@no_type_check
def _products(word, packed, BITS: tl.constexpr, INTERPRETED: tl.constexpr):
    acc = tl.zeros(word.shape, tl.int32)
    if BITS == 2:
        acc = _add_four(word, packed, acc, 0, 1, BITS, INTERPRETED)
    else:
        even, odd = tl.split(packed)
        acc = _add_four(word, even, acc, 0, 2, BITS, INTERPRETED)
        acc = _add_four(word, odd, acc, 1, 2, BITS, INTERPRETED)
    return tl.sum(acc, axis=1)


@triton.jit
@no_type_check
def gemv_kernel(
    x,
    weight,
    weight_scale,
    bias,
    y,
    N,
    WORDS: tl.constexpr,
    LEVELS: tl.constexpr,
    BITS: tl.constexpr,
    LO: tl.constexpr,
    STEP: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Computes ROUNDS times BLOCK_N outputs of one token, which every program quantizes itself.

    The token is float, the weight is read as int32 words, (N, WORDS). A token of one block is
    quantized once for all rounds.
    """
    FIELDS: tl.constexpr = 8 // BITS
    SPAN: tl.constexpr = 4 * FIELDS
    first = tl.program_id(0) * (ROUNDS * BLOCK_N)
    lane = tl.arange(0, BLOCK_N)
    w = tl.arange(0, BLOCK_W)
    # What is beyond the end reads the last row again and is not stored.
    row = tl.minimum(first + lane, N - 1).to(tl.int64)
    # Under way while the scale is computed.
    word = tl.load(weight + row[:, None] * WORDS + w[None, :], mask=(w < WORDS)[None, :], other=0)
    token = x + w[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    top = tl.zeros((BLOCK_W, SPAN), tl.int32)
    for start in range(0, WORDS, BLOCK_W):
        value = tl.load(token + start * SPAN, mask=(w < WORDS - start)[:, None], other=0.0)
        top = tl.maximum(top, magnitude_bits(value.to(tl.float32)))
    scale = token_scale(tl.max(tl.max(top, axis=1), axis=0), LEVELS)
    if WORDS <= BLOCK_W:
        packed, total = _quantized_words(token, 0, scale, FIELDS, WORDS)

    for i in range(0, ROUNDS):
        n = first + i * BLOCK_N + lane
        following = tl.minimum(n + BLOCK_N, N - 1).to(tl.int64)
        ahead = weight + following[:, None] * WORDS + w[None, :]
        if WORDS <= BLOCK_W:
            now = word
            word = tl.load(ahead, mask=((w < WORDS) & (i + 1 < ROUNDS))[None, :], other=0)
            exact = _products(now, packed, BITS, INTERPRETED)
        else:
            row = tl.minimum(n, N - 1).to(tl.int64)
            at = weight + row[:, None] * WORDS + w[None, :]
            exact = tl.zeros((BLOCK_N,), tl.int32)
            total = 0
            for start in range(0, WORDS, BLOCK_W):
                now = word
                left = WORDS - start - BLOCK_W
                word = tl.load(at + (start + BLOCK_W), mask=(w < left)[None, :], other=0)
                packed, part = _quantized_words(token, start, scale, FIELDS, WORDS)
                exact += _products(now, packed, BITS, INTERPRETED)
                total += part
            word = tl.load(ahead, mask=((w < WORDS) & (i + 1 < ROUNDS))[None, :], other=0)
        value = (exact * STEP + total * LO).to(tl.float32) * scale
        if ROW_SCALE:
            value = value * tl.load(weight_scale + n, mask=n < N, other=0.0)
        else:
            value = value * tl.load(weight_scale)
        if HAS_BIAS:
            value = value + tl.load(bias + n, mask=n < N, other=0.0)
        tl.store(y + n, value, mask=n < N)
