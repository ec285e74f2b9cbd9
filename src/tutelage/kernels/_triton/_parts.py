"""What the kernels share: the scale and the codes of a token, the fields of a byte."""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

__all__ = [
    "dot4",
    "field",
    "float_code",
    "magnitude_bits",
    "round_to_codes",
    "token_scale",
    "word_field",
]


@triton.jit
@no_type_check
def magnitude_bits(x):
    """Bits of |x|: as integers they order like the magnitudes, NaN above infinity above all."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
@no_type_check
def token_scale(top_bits, LEVELS: tl.constexpr):
    """Scale of a token: top / LEVELS, 1 where that is subnormal, NaN where top is not finite."""
    top = top_bits.to(tl.float32, bitcast=True)
    scale = tl.div_rn(top, tl.full(top.shape, LEVELS, tl.float32))
    scale = tl.where(scale < 1.1754943508222875e-38, 1.0, scale)
    return tl.where(top_bits >= 0x7F800000, float("nan"), scale)


@triton.jit
@no_type_check
def round_to_codes(x, scale):
    """round(x / scale) as int32, ties to even; ``scale`` has the shape of ``x``."""
    # Where one unit in the last place is 1, float32's own rounding is the one asked for.
    lifted = tl.div_rn(x, scale) + 12582912.0
    low = lifted.to(tl.int32, bitcast=True) & 0xFF  # 8 bits also of what is not finite
    return (low ^ 0x80) - 0x80


@triton.jit
@no_type_check
def field(byte, INDEX: tl.constexpr, BITS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Field ``INDEX`` of every byte, int8: (byte >> INDEX * BITS) & (2^BITS - 1)."""
    if INTERPRETED:
        return ((byte.to(tl.int32) >> (INDEX * BITS)) & ((1 << BITS) - 1)).to(tl.int8)
    # Four bytes at a time: Triton itself spends a register and three instructions on each.
    MASK: tl.constexpr = 0x01010101 * ((1 << BITS) - 1)
    SHIFT: tl.constexpr = INDEX * BITS
    return tl.inline_asm_elementwise(
        f"shr.b32 $0, $1, {SHIFT}; and.b32 $0, $0, {MASK};",
        "=r,r",
        [byte],
        dtype=tl.int8,
        is_pure=True,
        pack=4,
    )


@triton.jit
@no_type_check
def float_code(
    byte,
    INDEX: tl.constexpr,
    BITS: tl.constexpr,
    LO: tl.constexpr,
    STEP: tl.constexpr,
    BF16: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Code of field ``INDEX`` of every byte, bfloat16 or float16 (float32 if interpreted)."""
    if INTERPRETED:  # its products take bfloat16 for integers
        return (field(byte, INDEX, BITS, True).to(tl.int32) * STEP + LO).to(tl.float32)
    # A field becomes the low byte of 128 (1024 in float16) plus itself; that base goes exactly.
    MASK: tl.constexpr = 0x01010101 * ((1 << BITS) - 1)
    SHIFT: tl.constexpr = INDEX * BITS
    NAME: tl.constexpr = "bf16x2" if BF16 else "f16x2"
    BASE: tl.constexpr = 0x43434343 if BF16 else 0x64646464
    ONE: tl.constexpr = 0x3F803F80 if BF16 else 0x3C003C00
    MINUS_BASE: tl.constexpr = 0xC300C300 if BF16 else 0xE400E400
    FACTOR: tl.constexpr = 0x40004000 if STEP == 2 else ONE
    MINUS_ONE: tl.constexpr = ONE + 0x80008000
    MINUS_THREE: tl.constexpr = 0xC040C040 if BF16 else 0xC200C200
    OFFSET: tl.constexpr = MINUS_THREE if LO == -3 else MINUS_ONE
    tl.static_assert(LO == -1 or LO == -3, "codes start at -1 or -3")
    tl.static_assert(STEP == 1 or STEP == 2, "codes are 1 or 2 apart")
    return tl.inline_asm_elementwise(
        f"""{{
        .reg .b32 t, one, base, factor, offset;
        mov.b32 one, {ONE};
        mov.b32 base, {MINUS_BASE};
        mov.b32 factor, {FACTOR};
        mov.b32 offset, {OFFSET};
        shr.b32 t, $2, {SHIFT};
        and.b32 t, t, {MASK};
        prmt.b32 $0, t, {BASE}, 0x4140;
        prmt.b32 $1, t, {BASE}, 0x4342;
        fma.rn.{NAME} $0, $0, one, base;
        fma.rn.{NAME} $1, $1, one, base;
        fma.rn.{NAME} $0, $0, factor, offset;
        fma.rn.{NAME} $1, $1, factor, offset;
        }}""",
        "=&r,=&r,r",
        [byte],
        dtype=tl.bfloat16 if BF16 else tl.float16,
        is_pure=True,
        pack=4,
    )


@triton.jit
@no_type_check
def word_field(word, INDEX: tl.constexpr, BITS: tl.constexpr):
    """As ``field``, for the four bytes of an int32 word at once."""
    MASK: tl.constexpr = 0x01010101 * ((1 << BITS) - 1)
    return (word >> (INDEX * BITS)) & MASK


@triton.jit
@no_type_check
def dot4(a, b, total, INTERPRETED: tl.constexpr):
    """``total`` plus the product of four signed bytes with four others, one instruction."""
    if INTERPRETED:
        for i in tl.static_range(4):
            total += ((a << (24 - 8 * i)) >> 24) * ((b << (24 - 8 * i)) >> 24)
        return total
    return tl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, $3;",
        "=r,r,r,r",
        [a, b, total],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )
