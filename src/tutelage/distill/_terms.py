"""What a loss term is, and the squared error that many of them share."""

from __future__ import annotations

from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor

from .. import kernels
from ..sites import Site
from ._context import BatchItems, LossValue, StepContext

__all__ = ["LossTerm", "floats", "squared_error"]


@runtime_checkable
class LossTerm(Protocol):
    """One thing that is penalised.

    Attributes:
        name: Key in ``step.terms``.
        requires: Sites that must be recorded in student and teacher.
        needs_labels: Whether labels of the batch are used.
    """

    @property
    def name(self) -> str:
        """Key in ``step.terms``."""
        ...

    @property
    def requires(self) -> tuple[Site, ...]:
        """Sites to record."""
        ...

    @property
    def needs_labels(self) -> bool:
        """Whether labels are used."""
        ...

    def count(self, items: BatchItems) -> Tensor | int:
        """Returns the number of items in a batch, without its values: the count of the result."""
        ...

    def __call__(self, context: StepContext) -> LossValue:
        """Returns sum and count."""
        ...


class _SquaredError(torch.autograd.Function):
    """Sum of squared differences under a mask; the differences are made again for the gradient.

    The backward pass has a gradient of its own where one is asked for (``create_graph=True``).
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, other: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(own, other, mask)
        return kernels.squared_error(own, other, mask)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        own, other, mask = ctx.saved_tensors
        weight = None if mask is None else mask.square()
        if torch.is_grad_enabled():
            difference = own - other if weight is None else (own - other) * weight
            return difference * (2.0 * grads[0]), None, None
        return kernels.squared_error_gradient(own, other, weight, 2.0 * grads[0]), None, None


def squared_error(own: Tensor, other: Tensor, mask: Tensor | None) -> Tensor:
    return cast("Tensor", _SquaredError.apply(own, other.detach(), mask))


def floats(mask: Bool[Tensor, "..."], like: Tensor) -> Tensor:
    return mask.to(like.dtype)
