"""A student between full precision and quantized, for the first part of its training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor, nn

from ._attention_quantizer import AttentionQuantizer
from ._gate import GATE, gate_of
from ._weight import QuantWeight

__all__ = ["ramp_gate", "ramped"]


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
    modules = list(_blended(student))
    before = ramp_gate(student)
    try:
        _set(modules, gate)
        yield
    finally:
        _set(modules, before)


def ramp_gate(student: nn.Module) -> Float[Tensor, ""] | None:
    """Returns how far a student is quantized inside ``ramped``; ``None`` outside.

    Args:
        student: A prepared model.
    """
    # All have the same gate, and every recorded step asks: the first answers for all.
    return next((gate_of(module) for module in _blended(student)), None)


def _blended(student: nn.Module) -> Iterator[nn.Module]:
    return (m for m in student.modules() if isinstance(m, QuantWeight | AttentionQuantizer))


def _set(modules: list[nn.Module], gate: Tensor | None) -> None:
    for module in modules:
        if gate is None:
            module.__dict__.pop(GATE, None)
        else:
            module.__dict__[GATE] = gate
