"""Uniform quantizers of activations, scaled by the largest magnitude at hand."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ._base import BaseQuantizer, Granularity
from ._estimators import GradientEstimator
from ._grid import Quantized, signed, unsigned

__all__ = ["UniformQuantizer", "UnsignedQuantizer"]

_TINY = torch.finfo(torch.float32).tiny


class UniformQuantizer(BaseQuantizer):
    """Symmetric uniform quantization with a dynamic scale.

    With a the largest magnitude of a row (or the tensor) and L = 2^(bits - 1) - 1::

        scale = a / L        (1 where a is zero)
        code  = round(x / scale)

    Rounding is to even. ``reciprocal=True`` computes ``round(x * (L / a))`` instead, which differs
    in the last bit; the published TernaryBERT code does so.
    """

    def __init__(
        self,
        bits: int = 8,
        granularity: Granularity = "row",
        *,
        clip: float | None = None,
        reciprocal: bool = False,
        estimator: GradientEstimator | None = None,
    ) -> None:
        """Sets word length and granularity.

        Args:
            bits: Word length, 2 to 8.
            granularity: One scale per ``"tensor"`` or per ``"row"`` (per token).
            clip: Clamp before everything else, or ``None``.
            reciprocal: Multiply by the rounded reciprocal instead of dividing.
            estimator: See ``BaseQuantizer``.
        """
        super().__init__(granularity, clip=clip, estimator=estimator)
        if not 2 <= bits <= 8:
            raise ValueError(f"bits is {bits}; a signed uniform grid takes 2 to 8.")
        self.bits = bits
        self.reciprocal = reciprocal
        self.grid = signed(bits)

    def quantize(self, x: Float[Tensor, "*shape"]) -> Quantized:
        """Returns codes in [-L, L] and one scale per row or tensor."""
        x = self._prepare(x)
        top = _amax(x, self.granularity)
        if self.reciprocal:
            top = torch.where(top < _TINY * self.grid.hi, float(self.grid.hi), top)
            factor = self.grid.hi / top
            return Quantized((x * factor).round_(), factor.reciprocal())
        scale = _usable(top / self.grid.hi)
        return Quantized((x / scale).round_(), scale)

    def extra_repr(self) -> str:
        """Shows the settings."""
        return f"{self.bits} bits, {super().extra_repr()}"


class UnsignedQuantizer(BaseQuantizer):
    """Uniform quantization of values that are never negative, such as a softmax output.

    ``scale = max / (2^bits - 1)`` per row (or tensor), ``code = round(x / scale)``; negative
    values are outside the contract and are clamped to zero. A fixed scale would map a uniform
    row over many keys to zero, hence the dynamic one.
    """

    def __init__(
        self,
        bits: int = 8,
        granularity: Granularity = "row",
        *,
        estimator: GradientEstimator | None = None,
    ) -> None:
        """Sets word length and granularity.

        Args:
            bits: Word length, 1 to 8.
            granularity: One scale per ``"tensor"`` or per ``"row"``.
            estimator: See ``BaseQuantizer``.
        """
        super().__init__(granularity, estimator=estimator)
        if not 1 <= bits <= 8:
            raise ValueError(f"bits is {bits}; an unsigned uniform grid takes 1 to 8.")
        self.bits = bits
        self.grid = unsigned(bits)

    def quantize(self, x: Float[Tensor, "*shape"]) -> Quantized:
        """Returns codes in [0, 2^bits - 1] and one scale per row or tensor."""
        x = self._prepare(x)
        if x.numel() == 0:
            top = x.new_zeros([1] * x.dim() if self.granularity == "tensor" else (*x.shape[:-1], 1))
        elif self.granularity == "tensor":
            top = x.amax().reshape([1] * x.dim())
        else:
            top = x.amax(-1, keepdim=True)
        scale = _usable(top / self.grid.hi)
        return Quantized((x / scale).round_().clamp_(min=0.0), scale)

    def extra_repr(self) -> str:
        """Shows the settings."""
        return f"{self.bits} bits, {super().extra_repr()}"


def _usable(scale: Tensor) -> Tensor:
    # 1 on zero rows, and where the scale is subnormal and has too few digits. NaN stays NaN.
    return torch.where(scale < _TINY, 1.0, scale)


def _amax(x: Tensor, granularity: Granularity) -> Tensor:
    if x.numel() == 0:
        return x.new_zeros([1] * x.dim() if granularity == "tensor" else (*x.shape[:-1], 1))
    if granularity == "tensor":
        return torch.maximum(-x.amin(), x.amax()).reshape([1] * x.dim())
    # Two passes without a temporary tensor; several times faster than torch.aminmax over rows.
    return torch.maximum(x.amin(-1, keepdim=True).neg_(), x.amax(-1, keepdim=True))
