"""What a quantizer is, and the part that all of them share."""

from __future__ import annotations

from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ._estimators import ClippedSTE, GradientEstimator, StraightThrough
from ._grid import Grid, Quantized

__all__ = ["BaseQuantizer", "Granularity", "Quantizer"]

Granularity = Literal["tensor", "row"]
"""One scale for the whole tensor, or one for every vector along the last dimension.

For an activation of shape (batch, tokens, features) a row is a token; for a weight of shape
(out, in) it is an output channel; for (batch, heads, tokens, width) a token of one head.
"""


@runtime_checkable
class Quantizer(Protocol):
    """Rounds a tensor to a grid.

    ``quantize`` says which integers and which scale; the packed files, the kernels and the
    training forward all use what it returns, so that the integers trained are those shipped.
    """

    grid: Grid
    estimator: GradientEstimator

    def quantize(self, x: Float[Tensor, "*shape"]) -> Quantized:
        """Returns codes and scale of ``x``, without gradient."""
        ...

    def __call__(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Returns the quantized values; the gradient passes through ``estimator``."""
        ...


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: Quantizer) -> Tensor:
        quantized = quantizer.quantize(x)
        ctx.save_for_backward(x, *quantized)
        ctx.quantizer = quantizer
        return quantized.dequantize()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        x, codes, scale = ctx.saved_tensors
        quantizer = ctx.quantizer
        return quantizer.estimator(grads[0], x, Quantized(codes, scale), quantizer.grid), None


class BaseQuantizer(nn.Module):
    """Shared part of the quantizers: granularity, clipping, gradient.

    Subclasses set ``grid`` and implement ``quantize``.
    """

    grid: Grid
    estimator: GradientEstimator

    def __init__(
        self,
        granularity: Granularity = "row",
        *,
        clip: float | None = None,
        estimator: GradientEstimator | None = None,
    ) -> None:
        """Sets what all quantizers have in common.

        Args:
            granularity: One scale per ``"tensor"`` or per ``"row"``.
            clip: Values are clamped to [-clip, clip] before anything else; ``None`` for no clamp.
            estimator: How gradients pass; by default ``ClippedSTE(clip)``, or the plain
                straight-through estimator where nothing is clipped.
        """
        super().__init__()
        if granularity not in ("tensor", "row"):
            raise ValueError(f"granularity is {granularity!r}; use 'tensor' or 'row'.")
        if clip is not None and not clip > 0:
            raise ValueError(f"clip is {clip}; use a positive number, or None for no clipping.")
        self.granularity: Granularity = granularity
        self.clip = clip
        if estimator is None:
            estimator = StraightThrough() if clip is None else ClippedSTE(clip)
        self.estimator = estimator

    def quantize(self, x: Float[Tensor, "*shape"]) -> Quantized:
        """Returns codes and scale of ``x``, without gradient.

        Args:
            x: Any shape, any float dtype.

        Returns:
            Integer-valued codes of the shape of ``x`` and a scale that broadcasts against them,
            both float32.
        """
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Returns the quantized values of ``x``; the gradient passes through the estimator."""
        return cast("Tensor", _FakeQuantize.apply(x, self))

    def _prepare(self, x: Tensor) -> Tensor:
        x = x.detach().float()
        return x if self.clip is None else x.clamp(-self.clip, self.clip)

    def _sum(self, x: Tensor) -> Tensor:
        if self.granularity == "tensor":
            # Rounds as the published TernaryBERT code does.
            return x.sum().reshape([1] * x.dim())
        # In float64 sums of magnitudes within 2^19 of each other are exact, whatever their order:
        # every kernel and machine finds the same scales.
        exact = torch.float32 if x.device.type == "mps" else torch.float64
        return x.sum(-1, keepdim=True, dtype=exact).float()

    def _count(self, x: Tensor) -> int:
        return x.numel() if self.granularity == "tensor" or x.dim() == 0 else x.shape[-1]

    def extra_repr(self) -> str:
        """Shows the settings."""
        clip = "" if self.clip is None else f", clip={self.clip:g}"
        return f"{self.granularity!r}{clip}, estimator={self.estimator!r}"
