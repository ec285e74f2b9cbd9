"""A student between full precision and quantized, for the first part of its training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import cast

from jaxtyping import Float
from torch import Tensor, nn

from ._attention_quantizer import AttentionQuantizer
from ._gate import GATE
from ._weight import QuantWeight

__all__ = ["ramped"]


@contextlib.contextmanager
def ramped(student: nn.Module, gate: Float[Tensor, ""]) -> Iterator[None]:
    """Blends quantized with full-precision values inside the context.

    Every weight, activation and signal x that is quantized becomes ``x + gate (Q(x) - x)``, in
    float32: at 0 the student is its full-precision model, at 1 it is quantized up to rounding. The
    gradient of x is that of Q times ``gate`` plus ``1 - gate``. Backward passes belong inside, too,
    where activations are recomputed. Outside the student is quantized as always.

    Args:
        student: A prepared model.
        gate: From 0 to 1, on the student's device.
    """
    modules = [m for m in student.modules() if isinstance(m, QuantWeight | AttentionQuantizer)]
    try:
        for module in modules:
            cast("nn.Module", module).__dict__[GATE] = gate
        yield
    finally:
        for module in modules:
            cast("nn.Module", module).__dict__.pop(GATE, None)
