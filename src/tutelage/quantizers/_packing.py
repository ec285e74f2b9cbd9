"""Codes as bytes: 1 bit a binary weight, 2 bits a four-level one, 2 or 1.6 a ternary one."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Int8, Shaped, UInt8
from torch import Tensor

from ._grid import Grid

__all__ = ["ENCODINGS", "Encoding", "are_codes", "pack", "packed_width", "recode", "unpack"]

Encoding = Literal["bits", "base3"]
"""How codes become bytes: whole bits a code, or five ternary digits a byte.

Grids of 2 or 4 levels fill their bits and are stored alike in both.
"""

ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)

_DIGITS = 5
_TOP = 3**_DIGITS
_CHUNK = 2**20


def packed_width(width: int, grid: Grid, encoding: Encoding = "bits") -> int:
    """Returns the bytes that a row of ``width`` codes takes.

    Args:
        width: Codes in a row.
        grid: Their grid, at most 4 levels.
        encoding: How codes become bytes.
    """
    return -(-width // _per_byte(grid, encoding))


def pack(
    codes: Shaped[Tensor, "rows width"], grid: Grid, encoding: Encoding = "bits"
) -> UInt8[Tensor, "rows packed"]:
    """Packs integer codes, the first of a row into the lowest bits (or digit) of its first byte.

    Args:
        codes: Integer-valued codes on ``grid``.
        grid: The grid; a code is stored as (code - lo) / step.
        encoding: How codes become bytes.

    Returns:
        One row of bytes for every row; unused bits and digits of the last byte are zero.

    Examples:
        >>> from tutelage.quantizers import TERNARY
        >>> codes = torch.tensor([[-1, 0, 1, 1, 0]])
        >>> pack(codes, TERNARY).tolist(), pack(codes, TERNARY, "base3").tolist()
        ([[164, 1]], [[156]])
        >>> unpack(pack(codes, TERNARY), 5, TERNARY).tolist()
        [[-1, 0, 1, 1, 0]]
    """
    return _pack_index(((codes - grid.lo) / grid.step).to(torch.uint8), grid, encoding)


def unpack(
    packed: UInt8[Tensor, "*rows packed"], width: int, grid: Grid, encoding: Encoding = "bits"
) -> Int8[Tensor, "*rows width"]:
    """Undoes ``pack``.

    Args:
        packed: Bytes made by ``pack``.
        width: Codes in a row.
        grid: The grid they are on.
        encoding: How they became bytes.
    """
    index = _unpack_index(packed, width, grid, encoding).to(torch.int8)
    return index * grid.step + grid.lo


def are_codes(
    packed: UInt8[Tensor, "rows packed"], width: int, grid: Grid, encoding: Encoding = "bits"
) -> bool:
    """Whether ``pack`` can have made these bytes.

    It cannot have made a code beyond the grid (bits 11 or a byte from 243 of a ternary weight),
    nor a last byte whose unused bits or digits are not zero.

    Args:
        packed: Bytes.
        width: Codes in a row.
        grid: The grid they should be on.
        encoding: How they should have become bytes.
    """
    if not packed.numel():
        return True
    used = width - (packed.shape[-1] - 1) * _per_byte(grid, encoding)
    if _is_base3(grid, encoding):
        return int(packed.max()) < _TOP and int(packed[:, -1].max()) < 3**used
    if used * grid.bits < 8 and bool((packed[:, -1] >> used * grid.bits).any()):
        return False
    if grid.levels != 3:
        return True
    pieces = packed.reshape(-1).split(_CHUNK)
    return not any(bool((piece & (piece >> 1) & 0b01010101).any()) for piece in pieces)


def recode(
    packed: UInt8[Tensor, "rows packed"],
    width: int,
    grid: Grid,
    before: Encoding,
    after: Encoding,
) -> UInt8[Tensor, "rows recoded"]:
    """Returns the same codes in another encoding, without unpacking all of them at once.

    Args:
        packed: Bytes made by ``pack``.
        width: Codes in a row.
        grid: The grid they are on.
        before: How they became bytes.
        after: How they shall be.
    """
    if _is_base3(grid, before) == _is_base3(grid, after):
        return packed
    size = (len(packed), packed_width(width, grid, after))
    made = torch.empty(size, dtype=torch.uint8, device=packed.device)
    step = max(_CHUNK // max(width, 1), 1)
    for start in range(0, len(packed), step):
        rows = slice(start, start + step)
        made[rows] = _pack_index(_unpack_index(packed[rows], width, grid, before), grid, after)
    return made


def _pack_index(index: Tensor, grid: Grid, encoding: Encoding) -> Tensor:
    """Packs numbers from 0 to levels - 1, uint8, (rows, width)."""
    per_byte = _per_byte(grid, encoding)
    base = 3 if _is_base3(grid, encoding) else 2**grid.bits
    rows, width = index.shape
    size = (rows, -(-width // per_byte), per_byte)
    lanes = torch.nn.functional.pad(index, (0, -width % per_byte)).view(size)
    made = lanes[..., -1].clone(memory_format=torch.contiguous_format)
    for place in reversed(range(per_byte - 1)):
        made.mul_(base).add_(lanes[..., place])
    return made


def _unpack_index(packed: Tensor, width: int, grid: Grid, encoding: Encoding) -> Tensor:
    """Undoes ``_pack_index``."""
    if _is_base3(grid, encoding):
        values = torch.arange(256, dtype=torch.int16, device=packed.device).unsqueeze(-1)
        powers = torch.tensor([3**place for place in range(_DIGITS)], device=packed.device)
        table = (values.div(powers, rounding_mode="floor") % 3).to(torch.uint8)
        lanes = table[packed.int()]
    else:
        shifts = torch.arange(0, 8, grid.bits, dtype=torch.uint8, device=packed.device)
        lanes = (packed.unsqueeze(-1) >> shifts) & (2**grid.bits - 1)
    return lanes.flatten(-2)[..., :width]


def _is_base3(grid: Grid, encoding: Encoding) -> bool:
    return encoding == "base3" and grid.levels == 3


def _per_byte(grid: Grid, encoding: Encoding) -> int:
    if grid.bits not in (1, 2):
        raise ValueError(f"{grid} has {grid.levels} levels; only 2 to 4 can be packed.")
    if encoding not in ENCODINGS:
        known = " or ".join(map(repr, ENCODINGS))
        raise ValueError(f"there is no encoding {encoding!r}; use {known}.")
    return _DIGITS if _is_base3(grid, encoding) else 8 // grid.bits
