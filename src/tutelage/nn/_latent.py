"""What a backward pass keeps of the values that were quantized."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from ..quantizers import Quantized, Quantizer

__all__ = ["latent", "passed"]


def latent(quantizer: Quantizer, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"] | None:
    """Returns what the backward pass needs of ``x``: nothing where gradients pass unchanged."""
    return None if getattr(quantizer.estimator, "identity", False) else x


def passed(
    quantizer: Quantizer,
    grad: Float[Tensor, "*shape"],
    x: Float[Tensor, "*shape"] | None,
    quantized: Quantized,
) -> Float[Tensor, "*shape"]:
    """Returns the gradient of the latent value, through the quantizer's estimator.

    Args:
        quantizer: What rounded it.
        grad: Gradient of the rounded value.
        x: What ``latent`` returned.
        quantized: Codes and scale.
    """
    if x is None:
        return grad
    return quantizer.estimator(grad, x, quantized, quantizer.grid)
