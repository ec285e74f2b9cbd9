"""What a module looks at to know whether its values are blended, see ``ramped``."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["GATE", "blend", "gate_of"]

GATE = "_tutelage_gate"


def gate_of(module: nn.Module) -> Float[Tensor, ""] | None:
    """Returns how far a module is quantized, ``None`` where it is so altogether.

    Args:
        module: A module with quantizers.
    """
    gate: Tensor | None = module.__dict__.get(GATE)
    return gate


def blend(
    x: Float[Tensor, "*shape"], quantized: Float[Tensor, "*shape"], gate: Float[Tensor, ""]
) -> Float[Tensor, "*shape"]:
    """Returns ``x + gate (quantized - x)``.

    Args:
        x: Values in full precision.
        quantized: The same, quantized.
        gate: From 0 to 1.
    """
    return x + gate * (quantized - x)
