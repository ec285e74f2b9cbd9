"""Weight quantizers: a threshold from the mean magnitude, then the least-squares scale.

For codes c the scale that minimises ||w - s c||^2 is s = sum(|w| |c|) / sum(c^2) wherever the
signs of w and c agree. Binary weights have c = sign(w), ternary weights drop what is below a
threshold, four levels count what is above one three times.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ._base import BaseQuantizer
from ._grid import BINARY, FOUR_LEVEL, TERNARY, Quantized

__all__ = ["BinaryQuantizer", "FourLevelQuantizer", "TernaryQuantizer"]


class TernaryQuantizer(BaseQuantizer):
    """Ternary weight networks, TWN (Li et al., arXiv 1605.04711; TernaryBERT, arXiv 2009.12812).

    With m the mean of |w| over a row (or the tensor) and the threshold d = 0.7 m::

        code  = sign(w) where |w| > d, else 0
        scale = mean of |w| over the weights with |w| > d

    A row of zeros has codes 0 and scale 0.

    Examples:
        >>> codes, scale = TernaryQuantizer().quantize(torch.tensor([[0.1, -0.8, 0.6, 0.5]]))
        >>> codes.tolist(), round(scale.item(), 4)
        ([[0.0, -1.0, 1.0, 1.0]], 0.6333)
    """

    grid = TERNARY
    threshold = 0.7

    def quantize(self, x: Float[Tensor, "*shape"]) -> Quantized:
        """Returns codes in {-1, 0, 1} and one scale per row or tensor."""
        w = self._prepare(x)
        magnitude = w.abs()
        mean = self._sum(magnitude) / max(self._count(w), 1)
        keep = (magnitude > mean * self.threshold).float()
        scale = self._sum(magnitude.mul_(keep)) / self._sum(keep).clamp_(min=1.0)
        # Adding 0 makes -0 the 0 that is packed; mean * 0 is NaN for a row that is not finite.
        codes = keep.mul_(torch.sign(w)).add_(0.0)
        return self.with_gain(Quantized(codes, scale + mean * 0.0))


class BinaryQuantizer(BaseQuantizer):
    """Binary weight networks, BWN (Rastegari et al., arXiv 1603.05279).

    ``code = sign(w)`` with ``sign(0) = +1``, ``scale = mean |w|``; a row of zeros has scale 0.

    Examples:
        >>> BinaryQuantizer()(torch.tensor([[0.25, -0.75, 0.5, 0.5]])).tolist()
        [[0.5, -0.5, 0.5, 0.5]]
    """

    grid = BINARY

    def quantize(self, x: Float[Tensor, "*shape"]) -> Quantized:
        """Returns codes in {-1, 1} and one scale per row or tensor."""
        w = self._prepare(x)
        codes = torch.where(w < 0, -1.0, 1.0)
        scale = self._sum(w.abs()) / max(self._count(w), 1)
        return self.with_gain(Quantized(codes, scale))


class FourLevelQuantizer(BaseQuantizer):
    """Four symmetric levels at 2 bits: {-1.5, -0.5, 0.5, 1.5} times a step.

    The threshold between the inner and the outer level is 1.248 mean |w|, the optimum of the
    uniform four-level quantizer for a Gaussian (Max, 1960: step 0.9957 standard deviations);
    the step is then the least-squares one for those codes. Codes are the odd integers
    {-3, -1, 1, 3}, the scale half the step; ``sign(0) = +1``.
    """

    grid = FOUR_LEVEL
    threshold = 1.248

    def quantize(self, x: Float[Tensor, "*shape"]) -> Quantized:
        """Returns codes in {-3, -1, 1, 3} and one scale per row or tensor."""
        w = self._prepare(x)
        magnitude = w.abs()
        mean = self._sum(magnitude) / max(self._count(w), 1)
        codes = (magnitude > mean * self.threshold).float().mul_(2.0).add_(1.0)
        scale = self._sum(magnitude.mul_(codes)) / self._sum(codes.square()).clamp_(min=1.0)
        codes = torch.where(w < 0, -codes, codes)
        # mean * 0 is NaN for a row that is not finite.
        return self.with_gain(Quantized(codes, scale + mean * 0.0))
