"""What a quantizer is, and the part that all of them share."""

from __future__ import annotations

from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import SchemeError
from ._estimators import ClippedSTE, GradientEstimator, StraightThrough
from ._grid import Grid, Quantized

__all__ = ["BaseQuantizer", "Granularity", "Quantizer", "gain_gradient"]

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
    def forward(ctx: Any, x: Tensor, log_gain: Tensor | None, quantizer: Quantizer) -> Tensor:
        quantized = quantizer.quantize(x)
        ctx.save_for_backward(x, *quantized)
        ctx.quantizer = quantizer
        return quantized.dequantize()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, codes, scale = ctx.saved_tensors
        quantizer, quantized = ctx.quantizer, Quantized(codes, scale)
        gain = gain_gradient(grads[0], quantized) if ctx.needs_input_grad[1] else None
        return quantizer.estimator(grads[0], x, quantized, quantizer.grid), gain, None


def gain_gradient(
    grad: Float[Tensor, "rows width"], quantized: Quantized
) -> Float[Tensor, "scales 1"]:
    """Returns the gradient of ``log_gain``: with q = c s e^g it is the sum of dL/dq * q.

    Args:
        grad: dL/dq, the gradient of the dequantized values.
        quantized: Codes c and scale s e^g, one scale a row or a single one.
    """
    sums = (grad * quantized.codes).sum(-1, keepdim=True)
    if quantized.scale.numel() == 1:
        sums = sums.sum().reshape(1, 1)
    return sums * quantized.scale.reshape(-1, 1)


class BaseQuantizer(nn.Module):
    """Shared part of the quantizers: granularity, clipping, gradient.

    Subclasses set ``grid`` and implement ``quantize``.

    Attributes:
        log_gain: Logarithm of what the scales are multiplied by, learned with the weights, shape
            (scales, 1); ``None`` where scales follow from the values alone. See ``learn_scale``.
    """

    grid: Grid
    estimator: GradientEstimator
    log_gain: nn.Parameter | None

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
        self.register_parameter("log_gain", None)
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
        return cast("Tensor", _FakeQuantize.apply(x, self.log_gain, self))

    def learn_scale(self, rows: Float[Tensor, "rows width"]) -> None:
        """Adds a learned factor e^g to every scale; g begins at 0 and is a parameter.

        The scale of learned step size quantization (LSQ, arXiv 1902.08153) and of BiT
        (arXiv 2205.13016), relative to the one that follows from the weights: a step of the
        optimizer changes it by a share, whatever its size, and it cannot become negative.

        Args:
            rows: The weight that is quantized; g is made beside it.

        Raises:
            SchemeError: ``quantize`` does not pass its result through ``with_gain``.
        """
        count = len(rows) if self.granularity == "row" else 1
        probe = torch.ones(count, 2)
        plain = self.quantize(probe).scale
        self.log_gain = nn.Parameter(torch.ones(count, 1))
        if torch.equal(self.quantize(probe).scale, plain):
            self.log_gain = None
            raise SchemeError(
                f"{type(self).__name__} has no learned scale; end its quantize with "
                "self.with_gain(...), or leave out learned_scale."
            )
        self.log_gain = nn.Parameter(torch.zeros(count, 1, device=rows.device))

    def with_gain(self, quantized: Quantized) -> Quantized:
        """Returns codes and scale with the learned factor in the scale, where there is one.

        Args:
            quantized: Codes and the scale that follows from the values.
        """
        if self.log_gain is None:
            return quantized
        gain = self.log_gain.detach().exp().reshape(quantized.scale.shape)
        return Quantized(quantized.codes, quantized.scale * gain)

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
