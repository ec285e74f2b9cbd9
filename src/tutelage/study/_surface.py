"""The loss around a model's weights, along two random directions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StudyError

__all__ = ["Surface", "filter_normalised", "loss_surface"]


@dataclass(frozen=True)
class Surface:
    """A loss over a square of weights.

    Attributes:
        steps: Where it was measured along either direction; 0 are the model's own weights, 1 is a
            change of every row as long as the row.
        losses: ``losses[i][j]`` at ``steps[i]`` along the first direction and ``steps[j]`` along
            the second; ``None`` where it was not finite.
        parameters: Number of weights that were moved.
    """

    steps: tuple[float, ...]
    losses: tuple[tuple[float | None, ...], ...]
    parameters: int

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return asdict(self)


def filter_normalised(weights: Sequence[Tensor], made: torch.Generator) -> list[Tensor]:
    """Draws a direction whose rows are as long as those of the weights.

    With d a Gaussian row and w the weight's: ``d |w| / |d|`` (Li et al., arXiv 1712.09913, section
    4). A row, the weights of one output feature or table entry, is what a filter is in a
    convolution.

    Args:
        weights: Two or more dimensions each; the rows run over all but the first.
        made: Source of the draw, on the CPU.
    """
    directions = []
    for weight in weights:
        drawn = torch.randn(weight.shape, generator=made).to(weight)
        rows, own = drawn.flatten(1), weight.detach().flatten(1)
        length = rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
        rows = rows * (own.norm(dim=1, keepdim=True) / length)
        directions.append(rows.view_as(weight))
    return directions


def loss_surface(
    model: nn.Module,
    loss: Callable[[], float],
    *,
    points: int = 11,
    reach: float = 0.5,
    seed: int = 0,
) -> Surface:
    """Measures a loss where all matrices of a model move along two filter-normalised directions.

    Latent weights move; a student is quantized anew at every point, so that its codes and scales
    change with them. Vectors (biases, norms) stay, as in Li et al. (arXiv 1712.09913), and so do
    learned gains of scales. All weights are put back, bit for bit.

    Args:
        model: A student, or a plain model.
        loss: Called at every point; evaluates the model.
        points: Points along each direction, odd, so that the model's own weights are one of them.
        reach: The directions are measured from ``-reach`` to ``reach``.
        seed: Seed of the directions; equal shapes and seeds give equal Gaussian draws.

    Raises:
        StudyError: The number of points is even or below 3, or the reach is not positive.
    """
    if points < 3 or points % 2 == 0 or not reach > 0:
        raise StudyError(
            f"a surface of {points} points over {reach:g}; use an odd number of points from 3 on, "
            "and a positive reach."
        )
    weights = [
        p for name, p in model.named_parameters() if p.dim() > 1 and "_quantizer." not in name
    ]
    own = [weight.detach().clone() for weight in weights]
    made = torch.Generator().manual_seed(seed)
    first, second = (filter_normalised(weights, made) for _ in range(2))
    half = points // 2
    steps = tuple(reach * (index - half) / half for index in range(points))
    found = []
    try:
        with torch.no_grad():
            for a, b in itertools.product(steps, steps):
                for weight, start, one, other in zip(weights, own, first, second, strict=True):
                    weight.copy_(start).add_(one, alpha=a).add_(other, alpha=b)
                value = loss()
                found.append(value if math.isfinite(value) else None)
    finally:
        with torch.no_grad():
            for weight, start in zip(weights, own, strict=True):
                weight.copy_(start)
    grid = tuple(tuple(found[i * points : (i + 1) * points]) for i in range(points))
    return Surface(steps, grid, sum(weight.numel() for weight in weights))
