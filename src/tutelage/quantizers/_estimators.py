"""Gradient estimators: how a gradient passes the rounding."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from ._grid import Grid, Quantized

__all__ = ["ClippedSTE", "GradientEstimator", "StraightThrough"]


@runtime_checkable
class GradientEstimator(Protocol):
    """Turns the gradient of the quantized value into one of the latent value.

    An estimator whose class says ``identity = True`` returns the gradient as it is, so that a
    training step keeps no latent value for it.
    """

    def __call__(
        self,
        grad: Float[Tensor, "*shape"],
        x: Float[Tensor, "*shape"],
        quantized: Quantized,
        grid: Grid,
    ) -> Float[Tensor, "*shape"]:
        """Returns dL/dx.

        Args:
            grad: dL/dq, the gradient of the dequantized value ``codes * scale``.
            x: The latent value that was quantized.
            quantized: Its codes and scale.
            grid: The codes that were possible.
        """
        ...


class StraightThrough:
    """The plain straight-through estimator: dL/dx = dL/dq (Bengio et al., arXiv 1308.3432)."""

    identity = True

    def __call__(
        self,
        grad: Float[Tensor, "*shape"],
        x: Float[Tensor, "*shape"],
        quantized: Quantized,
        grid: Grid,
    ) -> Float[Tensor, "*shape"]:
        """Returns ``grad``."""
        return grad

    def __repr__(self) -> str:
        """Shows the name."""
        return "StraightThrough()"


class ClippedSTE:
    """Straight-through inside a fixed interval: dL/dx = dL/dq * [-clip < x < clip].

    This is the estimator of TernaryBERT's published code (arXiv 2009.12812) with clip 2.5.
    """

    def __init__(self, clip: float) -> None:
        """Sets the interval.

        Args:
            clip: Half its width; the gradient is zero at and beyond it.
        """
        self.clip = float(clip)

    def __call__(
        self,
        grad: Float[Tensor, "*shape"],
        x: Float[Tensor, "*shape"],
        quantized: Quantized,
        grid: Grid,
    ) -> Float[Tensor, "*shape"]:
        """Returns ``grad`` where ``|x| < clip``, zero elsewhere."""
        return grad.masked_fill(x.abs() >= self.clip, 0.0)

    def __repr__(self) -> str:
        """Shows the interval."""
        return f"ClippedSTE({self.clip:g})"
