"""The integers a quantizer may emit, and the pair (codes, scale) that stands for a tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float, Shaped
from torch import Tensor

__all__ = ["BINARY", "FOUR_LEVEL", "TERNARY", "Grid", "Quantized", "signed", "unsigned"]


@dataclass(frozen=True)
class Grid:
    """Integer codes ``lo, lo + step, ..., hi``.

    Attributes:
        lo: Smallest code.
        hi: Largest code.
        step: Distance of neighbouring codes.

    Examples:
        >>> grid = Grid(-3, 3, step=2)
        >>> grid.levels, grid.bits
        (4, 2)
    """

    lo: int
    hi: int
    step: int = 1

    def __post_init__(self) -> None:
        """Checks that the range is a whole number of steps."""
        if self.step < 1 or self.hi <= self.lo or (self.hi - self.lo) % self.step:
            raise ValueError(f"{self} is no grid: hi - lo must be a positive multiple of step.")

    @property
    def levels(self) -> int:
        """Number of codes."""
        return (self.hi - self.lo) // self.step + 1

    @property
    def bits(self) -> int:
        """Bits that hold one code in plain binary storage."""
        return math.ceil(math.log2(self.levels))


BINARY = Grid(-1, 1, step=2)
"""Codes -1 and 1."""

TERNARY = Grid(-1, 1)
"""Codes -1, 0 and 1."""

FOUR_LEVEL = Grid(-3, 3, step=2)
"""Codes -3, -1, 1 and 3: the levels -1.5, -0.5, 0.5 and 1.5 at twice the scale."""


def signed(bits: int) -> Grid:
    """Returns the symmetric grid of ``bits`` bits: 127 levels on each side of zero at 8 bits.

    Args:
        bits: Word length, 2 to 8.
    """
    top = 2 ** (bits - 1) - 1
    return Grid(-top, top)


def unsigned(bits: int) -> Grid:
    """Returns the grid 0 to ``2**bits - 1``.

    Args:
        bits: Word length, 1 to 8.
    """
    return Grid(0, 2**bits - 1)


class Quantized(NamedTuple):
    """A tensor on a grid: ``codes * scale``.

    Attributes:
        codes: Integer-valued, in the shape of the tensor; float32, packed modules hold int8.
        scale: Broadcasts against ``codes``, float32, never negative.
    """

    codes: Shaped[Tensor, "*shape"]
    scale: Float[Tensor, "..."]

    def dequantize(self) -> Float[Tensor, "*shape"]:
        """Returns ``codes * scale``."""
        return self.codes * self.scale
