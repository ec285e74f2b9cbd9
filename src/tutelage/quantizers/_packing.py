"""Codes as bytes: 1 bit a binary weight, 2 bits a ternary or four-level one."""

from __future__ import annotations

import torch
from jaxtyping import Int8, Shaped, UInt8
from torch import Tensor

from ._grid import Grid

__all__ = ["pack", "packed_width", "unpack"]


def packed_width(width: int, grid: Grid) -> int:
    """Returns the bytes that a row of ``width`` codes takes.

    Args:
        width: Codes in a row.
        grid: Their grid, at most 4 levels.
    """
    return -(-width // _per_byte(grid))


def pack(codes: Shaped[Tensor, "rows width"], grid: Grid) -> UInt8[Tensor, "rows packed"]:
    """Packs integer codes, the first of a row into the lowest bits of its first byte.

    Args:
        codes: Integer-valued codes on ``grid``.
        grid: The grid; a code is stored as (code - lo) / step.

    Returns:
        One row of bytes for every row; unused bits of the last byte are zero.
    """
    per_byte = _per_byte(grid)
    index = ((codes - grid.lo) / grid.step).to(torch.uint8)
    rows, width = index.shape
    index = torch.nn.functional.pad(index, (0, -width % per_byte))
    shifts = _shifts(grid, codes.device)
    lanes = index.reshape(rows, packed_width(width, grid), per_byte) << shifts
    return lanes.sum(-1, dtype=torch.uint8)


def unpack(
    packed: UInt8[Tensor, "*rows packed"], width: int, grid: Grid
) -> Int8[Tensor, "*rows width"]:
    """Undoes ``pack``.

    Args:
        packed: Bytes made by ``pack``.
        width: Codes in a row.
        grid: The grid they are on.
    """
    lanes = (packed.unsqueeze(-1) >> _shifts(grid, packed.device)) & (2**grid.bits - 1)
    index = lanes.flatten(-2)[..., :width].to(torch.int8)
    return index * grid.step + grid.lo


def _per_byte(grid: Grid) -> int:
    if grid.bits not in (1, 2):
        raise ValueError(f"{grid} has {grid.levels} levels; only 2 to 4 can be packed.")
    return 8 // grid.bits


def _shifts(grid: Grid, device: torch.device) -> Tensor:
    return torch.arange(0, 8, grid.bits, dtype=torch.uint8, device=device)
